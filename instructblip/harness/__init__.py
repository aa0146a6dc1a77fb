"""A trained model as a model of lmms-eval, under the name `instructblip_native`.

lmms-eval finds `registration` by the package's entry point; nothing else here is imported before that model is asked for.
"""

from typing import Any

NAME = "instructblip_native"


def registration() -> Any:
    """What lmms-eval's registry takes."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=NAME, simple_class_path="instructblip.harness.plugin.InstructBLIPNative")
