"""What the server that tests fork their processes from does first, so that none of them pays for it again."""

# ruff: noqa: E402
import gc
from pathlib import Path

gc.disable()  # all that is imported here stays

import matplotlib.axes
import matplotlib.backends.backend_agg
import matplotlib.figure
import matplotlib.font_manager
import scipy.interpolate
import scipy.stats
import torch.profiler
import wandb
import yaml

import tests.kit.runs
from instructblip.evaluation.report import page
from instructblip.html import page_environment

LOADED = (matplotlib, scipy, torch, wandb, tests)
page_environment(Path(page.__file__).parent).get_template(page._TEMPLATE)  # compiled once, too
# OmegaConf derives a loader from this one for each file that Hydra composes; libyaml reads the same eight times as fast.
yaml.SafeLoader = yaml.CSafeLoader  # type: ignore[misc, assignment]
gc.enable()
gc.freeze()  # a collection in a forked process does not touch, and so copy, what lies here
