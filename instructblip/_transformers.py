"""What has to be asked of transformers' own output."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No bars and notes from transformers: our own status line stands there."""
    from transformers import modeling_gguf_pytorch_utils as gguf_utils
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), gguf_utils.tqdm
    had_bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # This module takes tqdm straight from its package, past the switch above.
    gguf_utils.tqdm = lambda tensors, **_: tensors
    try:
        yield
    finally:
        gguf_utils.tqdm = bar
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()
