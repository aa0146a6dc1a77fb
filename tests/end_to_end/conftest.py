"""Fixtures of several files here."""

from collections.abc import Iterator

import pytest

from tests.kit.browser import Browser, browser


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A tab of a headless browser; the tests that ask for it are skipped where there is none."""
    with browser(tmp_path_factory.mktemp("profile")) as tab:
        yield tab
