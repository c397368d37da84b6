"""Owns a real browser for tests: Debian's chromium, without a window, steered over a pipe.

Pages are asked by JavaScript; keys and clicks are real input events. It dies with the test run.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from itertools import count
from pathlib import Path
from typing import Any

from gevent.os import make_nonblocking, nb_read, nb_write

from tests.servers import end, find_program, launch

#: What keeps it quiet, small, and off the network.
_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)


#: Chromium reads commands from descriptor 3 and answers on 4.
_ON_3_AND_4 = """
import fcntl, os, sys
for place, fd in zip((3, 4), [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 10) for fd in sys.argv[1:3]]):
    os.dup2(fd, place)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Browser:
    """A running browser.

    Raises:
        MissingServerError: It is not installed.
    """

    def __init__(self, folder: Path) -> None:
        program = find_program("chromium")
        (theirs_in, self._out), (self._in, theirs_out) = os.pipe(), os.pipe()
        for fd in (theirs_in, theirs_out):
            os.set_inheritable(fd, True)
        for fd in (self._in, self._out):
            make_nonblocking(fd)
        starts = [sys.executable, "-c", _ON_3_AND_4, str(theirs_in), str(theirs_out)]
        command = [*starts, program, *_FLAGS, f"--user-data-dir={folder}/profile"]
        self._process: subprocess.Popen[bytes] = launch(
            *command, "about:blank", log=folder / "chromium.log", pass_fds=(theirs_in, theirs_out)
        )
        for fd in (theirs_in, theirs_out):
            os.close(fd)
        self._numbers, self._received = count(1), b""

    def open(self, url: str, width: int = 1280, height: int = 800) -> Page:
        """Open a page in a tab of its own."""
        made = self.command("Target.createTarget", url="about:blank")
        attached = self.command("Target.attachToTarget", targetId=made["targetId"], flatten=True)
        page = Page(self, attached["sessionId"])
        page.command(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        page.command("Page.enable")
        page.command("Page.navigate", url=url)
        return page

    def command(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Send a command and return its result. Switches: yes.

        Raises:
            RuntimeError: The browser refused it.
        """
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[nb_write(self._out, data) :]
        while True:
            answer = self._read()
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                found: dict[str, Any] = answer["result"]
                return found

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._received:
            data = nb_read(self._in, 1 << 16)
            if not data:
                raise RuntimeError("the browser has ended")
            self._received += data
        message, _, self._received = self._received.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def close(self) -> None:
        """End it. Switches: yes."""
        end(self._process)
        os.close(self._in)
        os.close(self._out)


class Page:
    """A page in a tab."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session

    def command(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command about this page."""
        return self._browser.command(method, self._session, **params)

    def run(self, expression: str) -> Any:
        """Return what a JavaScript expression is in the page; a promise is waited for.

        Raises:
            AssertionError: It threw.
        """
        result = self.command(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def press(self, key: str, text: str | None = None) -> None:
        """Press and release a key."""
        code = {"Enter": 13, "Tab": 9, "Escape": 27}.get(key, ord(key[0].upper()))
        typed = {"Enter": "\r"}.get(key, text)
        details: dict[str, Any] = {"key": key, "windowsVirtualKeyCode": code}
        if typed:
            details["text"] = typed
        self.command("Input.dispatchKeyEvent", type="keyDown", **details)
        self.command("Input.dispatchKeyEvent", type="keyUp", **details)

    def type(self, text: str) -> None:
        """Type into what has the focus."""
        self.command("Input.insertText", text=text)

    def screenshot(self, path: Path) -> None:
        """Save what is seen as PNG."""
        found = self.command("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(found["data"]))
