"""Train a model. `python train.py` is the demo; `python train.py --help` lists every choice."""

from instructblip.training.run import main

if __name__ == "__main__":
    main()
