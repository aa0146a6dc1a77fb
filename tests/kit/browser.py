"""A page in headless Chromium, driven as a hand would: real clicks, keys and files through the DevTools protocol.

Chromium speaks it over two pipes (`--remote-debugging-pipe`), JSON messages ended by a zero byte; nothing listens on a port.
Playwright would do the same, with a Node runtime of its own and promises for the browser builds that it downloads; the few
calls below work with whatever Chromium the machine has.
"""

import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

SECONDS = 60  # a browser that takes longer for an answer hangs
_SWITCHES = (
    "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
    "disable-component-update disable-sync remote-debugging-pipe"
)


class Browser:
    """One tab of a running Chromium."""

    def __init__(self, process: subprocess.Popen[bytes], commands: int, replies: int) -> None:
        self.process, self.commands, self.replies = process, commands, replies
        self.unread, self.number, self.session = b"", 0, ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Page.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result."""
        self.number += 1
        message: dict[str, Any] = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while True:
            reply = self._read()
            if reply.get("id") == self.number:
                assert "error" not in reply, f"{method}: {reply['error']}"
                return dict(reply["result"])

    def open(self, path: Path) -> None:
        """Open a file and wait until it and its scripts are there."""
        self.visit(path.as_uri())

    def visit(self, address: str) -> None:
        """Open an address and wait until the page and its scripts are there."""
        self.call("Page.navigate", url=address)
        here = f"document.readyState == 'complete' && location.href.startsWith({json.dumps(address)})"
        self.wait_for(here)

    def wait_for(self, expression: str) -> Any:
        """The value of a JavaScript expression once it is true, or like it."""
        deadline = time.monotonic() + SECONDS
        while not (found := self.value(expression)):
            assert time.monotonic() < deadline, f"not in {SECONDS} s: {expression}; the page says: {self.text()}"
            time.sleep(0.1)
        return found

    def text(self) -> str:
        """What the page says."""
        return str(self.value("document.body.innerText"))

    def value(self, expression: str) -> Any:
        """The value of a JavaScript expression; it only looks, and the page's own policy does not concern it."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def click(self, selector: str) -> None:
        """Press and release the left button in the middle of the first element that a CSS selector finds."""
        place = self.value(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView({{block: 'center'}});"
            "const b = e.getBoundingClientRect(); return {x: b.x + b.width / 2, y: b.y + b.height / 2}; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **place)

    def upload(self, selector: str, path: Path) -> None:
        """Choose a file for the first file input that a CSS selector finds."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def resize(self, width: int, height: int) -> None:
        """The window, in pixels."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def press(self, key: str, code: int) -> None:
        """Press a key that is not text, such as ArrowDown (40)."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def type(self, text: str) -> None:
        """Type into what has the focus, key by key."""
        for letter in text:
            self.call("Input.dispatchKeyEvent", type="char", text=letter)

    def _read(self) -> dict[str, Any]:
        deadline = time.monotonic() + SECONDS
        while b"\0" not in self.unread:
            ready, _, _ = select.select([self.replies], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"no answer from the browser in {SECONDS} s"
            chunk = os.read(self.replies, 1 << 16)
            assert chunk, f"the browser ended with {self.process.wait(SECONDS)}"
            self.unread += chunk
        message, _, self.unread = self.unread.partition(b"\0")
        return dict(json.loads(message))


@contextmanager
def browser(profile: Path, *, width: int = 1280, height: int = 1100) -> Iterator[Browser]:
    """Start Chromium with an empty profile and end it; the test is skipped where there is none."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium on this machine")
    command_in, command_out = os.pipe()
    reply_in, reply_out = os.pipe()
    switches = [f"--{switch}" for switch in _SWITCHES.split()]
    switches += [f"--user-data-dir={profile}", f"--window-size={width},{height}"]
    # Chromium reads commands from descriptor 3 and writes replies to 4.
    script = f'exec 3<&{command_in} 4>&{reply_out}; exec "$@"'
    process = subprocess.Popen(
        ["bash", "-c", script, "bash", program, *switches],
        pass_fds=(command_in, reply_out),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(command_in)
    os.close(reply_out)
    try:
        yield Browser(process, command_out, reply_in)
    finally:
        process.kill()
        process.wait(SECONDS)
        os.close(command_out)
        os.close(reply_in)
