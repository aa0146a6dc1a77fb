"""Evaluate a checkpoint. `python evaluate.py checkpoint=outputs/train/demo suite=demo` scores the demo's run."""

from instructblip.evaluation.run import main

if __name__ == "__main__":
    main()
