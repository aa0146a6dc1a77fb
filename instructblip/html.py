"""Self-contained HTML pages: one file, nothing fetched, every text escaped."""

import base64
import functools
import hashlib
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined


@functools.cache  # it compiles a template once for all pages of a process
def page_environment(folder: Path) -> Environment:
    """Jinja over the templates of a folder: texts are escaped, unknown names are errors.

    The filter `sha256` gives the hash by which a page's Content-Security-Policy admits its own style or script.
    """
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,  # every text of a dataset or a model is escaped
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["sha256"] = _csp_hash
    return environment


def _csp_hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
