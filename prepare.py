"""Turn a dataset's official files into shards. `python prepare.py dataset=easy_vqa` fetches and converts the demo's."""

import signal

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `main`: a Ctrl-C during the imports needs no traceback

from instructblip.data.prepare.command import main

if __name__ == "__main__":
    main()
