"""A page in headless Chromium, driven over a pipe by the Chrome DevTools protocol: no server, no network, no driver."""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PATIENCE_S = 60
KEYS = {"Tab": 9, "Enter": 13, "ArrowRight": 39, "ArrowDown": 40}  # name -> virtual key code


def browser() -> str | None:
    """The browser of this machine."""
    return next((found for name in BROWSERS if (found := shutil.which(name))), None)


class Page:
    """A loaded page; the browser is gone after the `with` block.

    Args:
        file: the page.
        folder: an empty one, for the browser's own files and for downloads.
        width: of the window, in CSS pixels; it may be as narrow as a phone.
    """

    def __init__(self, file: Path, folder: Path, *, width: int) -> None:
        command = browser()
        assert command is not None
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()

        def on_3_and_4() -> None:  # where --remote-debugging-pipe looks
            # Not onto 3 or 4 themselves: what is then copied to its own place stays closed to the browser.
            first, second = (fcntl.fcntl(end, fcntl.F_DUPFD, 5) for end in (theirs_in, theirs_out))
            os.dup2(first, 3)
            os.dup2(second, 4)

        self._process = subprocess.Popen(
            [command, *FLAGS, f"--user-data-dir={folder / 'profile'}", "--remote-debugging-pipe"],
            preexec_fn=on_3_and_4,
            close_fds=False,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._write, self._read = os.fdopen(ours_out, "wb", buffering=0), os.fdopen(ours_in, "rb", buffering=0)
        self._buffer, self._last_id, self._session = b"", 0, None
        self._messages: list[dict[str, Any]] = []
        self._downloads = folder / "downloads"
        self._call(
            "Browser.setDownloadBehavior", behavior="allow", downloadPath=str(self._downloads), eventsEnabled=True
        )
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=False)
        self._call("Page.enable")
        self._call("Page.navigate", url=file.resolve().as_uri())
        self._wait_for(lambda message: message.get("method") == "Page.loadEventFired")

    def __enter__(self) -> Page:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()
        self._write.close()
        self._read.close()

    def lay_out_for_print(self, *, width: int) -> None:
        """Show the page as it is printed on paper whose margins are so many CSS pixels apart."""
        self._call("Emulation.setEmulatedMedia", media="print")
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=False)

    def run(self, script: str) -> Any:
        """The value of an expression in the page, as JSON has it; a promise is waited for."""
        found = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def press(self, key: str) -> None:
        """Press and release a key, and wait until the page has drawn what came of it."""
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self._call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=KEYS[key], **text)
            text = {}
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(0))))")

    def download(self, key: str) -> Path:
        """Press a key on a focused link to a file, and return the file."""
        self.press(key)
        ended = self._wait_for(
            lambda message: (
                message.get("method") == "Browser.downloadProgress" and message["params"]["state"] != "inProgress"
            )
        )
        assert ended["params"]["state"] == "completed"
        return max(self._downloads.iterdir(), key=lambda file: file.stat().st_mtime_ns)

    def _call(self, method: str, **parameters: Any) -> Any:
        self._last_id += 1
        order: dict[str, Any] = {"id": self._last_id, "method": method, "params": parameters}
        if self._session is not None:
            order["sessionId"] = self._session
        self._write.write(json.dumps(order).encode() + b"\0")
        message = self._wait_for(lambda message: message.get("id") == self._last_id)
        assert "error" not in message, message
        return message["result"]

    def _wait_for(self, is_wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The first message that is wanted, of those that came and were not looked for, or of the next ones."""
        while True:
            for index, message in enumerate(self._messages):
                if is_wanted(message):
                    return self._messages.pop(index)
            self._messages.append(json.loads(self._next_message()))

    def _next_message(self) -> bytes:
        while b"\0" not in self._buffer:
            assert select.select([self._read], [], [], PATIENCE_S)[0], "the browser does not answer"
            received = self._read.read(1 << 16)
            assert received, "the browser has gone"
            self._buffer += received
        message, _, self._buffer = self._buffer.partition(b"\0")
        return message
