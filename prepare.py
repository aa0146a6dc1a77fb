"""Turn a dataset's official files into shards. `python prepare.py dataset=easy_vqa` fetches and converts the demo's."""

from instructblip.config.entry import main
from instructblip.config.schema import PrepareConfig
from instructblip.data.prepare.command import prepare

if __name__ == "__main__":
    main("prepare", PrepareConfig, prepare)
