"""Evaluate a checkpoint. `python evaluate.py checkpoint=outputs/train/demo suite=demo` scores the demo's run."""

from instructblip.config.entry import main
from instructblip.config.schema import EvaluateConfig
from instructblip.evaluation.run import evaluate

if __name__ == "__main__":
    main("evaluate", EvaluateConfig, evaluate)
