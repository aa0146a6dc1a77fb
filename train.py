"""Train a model. `python train.py` is the demo; `python train.py --help` lists every choice."""

from instructblip.config.entry import main
from instructblip.config.schema import TrainConfig
from instructblip.training.run import train

if __name__ == "__main__":
    main("train", TrainConfig, train)
