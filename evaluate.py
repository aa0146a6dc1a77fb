"""Evaluate a checkpoint. `python evaluate.py checkpoint=outputs/train/demo suite=demo` scores the demo's run."""

import signal

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `main`: a Ctrl-C during the imports needs no traceback

from instructblip.evaluation.command import main

if __name__ == "__main__":
    main()
