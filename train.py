"""Train a model. `python train.py` is the demo; `python train.py --help` lists every choice."""

import signal

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `main`: a Ctrl-C during the imports needs no traceback

from instructblip.training.command import main

if __name__ == "__main__":
    main()
