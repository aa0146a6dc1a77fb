"""Turn a dataset's official files into shards. `python prepare.py dataset=easy_vqa` fetches and converts the demo's."""

from instructblip.cli import main
from instructblip.config import PrepareConfig
from instructblip.prepared import prepare

if __name__ == "__main__":
    main("prepare", PrepareConfig, prepare)
