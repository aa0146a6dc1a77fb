"""Turn a dataset's official files into shards. `python prepare.py dataset=easy_vqa` fetches and converts the demo's."""

from instructblip.data.prepare.command import main

if __name__ == "__main__":
    main()
