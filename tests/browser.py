"""Headless Chromium, driven over its debugging pipe: real mouse, touch and key events, no driver and no library."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --hide-scrollbars --remote-debugging-pipe"
)
TIMEOUT_S = 120
KEYS = {"Enter": 13, "Escape": 27, "ArrowDown": 40, "ArrowUp": 38, "Tab": 9}


class Browser:
    """One page. `log` has what it wrote to its console and what its policy refused."""

    def __init__(self, profile: Path) -> None:
        to_read, self._to = os.pipe()
        self._from, to_write = os.pipe()
        shell = f'exec "$0" "$@" 3<&{to_read} 4>&{to_write}'
        command = ["bash", "-c", shell, CHROMIUM, *FLAGS.split(), f"--user-data-dir={profile}", "about:blank"]
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(command, pass_fds=(to_read, to_write), stdout=quiet, stderr=quiet)
        os.close(to_read)
        os.close(to_write)
        self._buffer, self._number, self._session = b"", 0, None
        self.log: list[str] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """A command of the DevTools protocol -> its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self._note(answer)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            part = os.read(self._from, 1 << 16)
            assert part, "the browser ended"
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(line)

    def _note(self, event: dict[str, Any]) -> None:
        params = event.get("params", {})
        if event.get("method") == "Log.entryAdded":
            self.log.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
        elif event.get("method") == "Runtime.exceptionThrown":
            self.log.append(json.dumps(params["exceptionDetails"]))
        elif event.get("method") == "Runtime.consoleAPICalled":
            self.log.append(json.dumps(params["args"]))

    def open(self, url: str, width: int, height: int, *, dark: bool = False) -> None:
        phone = width < 700
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        self.send("Emulation.setTouchEmulationEnabled", enabled=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.send("Page.navigate", url="about:blank")
        self.send("Page.navigate", url=url)

    def js(self, code: str) -> Any:
        """The value of an expression in the page."""
        out = self.send("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in out, out
        return out["result"].get("value")

    def wait(self, condition: str) -> None:
        """Until an expression is true in the page."""
        until = time.monotonic() + TIMEOUT_S
        while not self.js(f"Boolean({condition})"):
            assert time.monotonic() < until, f"never: {condition}\n{self.log}\n{self.js('document.body.innerText')}"
            time.sleep(0.02)

    def _middle(self, selector: str) -> tuple[float, float]:
        self.wait(f"document.querySelector({selector!r})")
        self.js(f"document.querySelector({selector!r}).scrollIntoView({{block: 'nearest', behavior: 'instant'}})")
        self.js("new Promise(drawn => requestAnimationFrame(() => requestAnimationFrame(drawn)))")
        box = f"document.querySelector({selector!r}).getBoundingClientRect()"
        return tuple(self.js(f"(b => [b.x + b.width / 2, b.y + b.height / 2])({box})"))

    def _mouse(self, kind: str, x: float, y: float, buttons: int = 1) -> None:
        self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=buttons, clickCount=1)

    def click(self, selector: str) -> None:
        x, y = self._middle(selector)
        self._mouse("mousePressed", x, y)
        self._mouse("mouseReleased", x, y, 0)

    def tap(self, selector: str) -> None:
        x, y = self._middle(selector)
        self.send("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        self.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def drag(self, selector: str, target: str, *, touch: bool = False) -> None:
        """Press on one element, move in steps, let go over another (where that is once the drag has begun)."""
        x, y = self._middle(selector)
        if touch:
            self.send("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        else:
            self._mouse("mousePressed", x, y)
        for step in range(1, 4):
            to_x, to_y = self._middle(target)
            x, y = x + (to_x - x) * step / 3, y + (to_y - y) * step / 3
            if touch:
                self.send("Input.dispatchTouchEvent", type="touchMove", touchPoints=[{"x": x, "y": y}])
            else:
                self._mouse("mouseMoved", x, y)
        if touch:
            self.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
        else:
            self._mouse("mouseReleased", x, y, 0)

    def key(self, *keys: str, ctrl: bool = False) -> None:
        """Press keys, one after the other: a letter, a digit, or a name of KEYS."""
        for key in keys:
            code = KEYS.get(key, ord(key.upper()[0]))
            event = {"key": key, "windowsVirtualKeyCode": code, "modifiers": 2 * ctrl}
            text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
            self.send(
                "Input.dispatchKeyEvent", type="keyDown", **event, **({"text": text} if text and not ctrl else {})
            )
            self.send("Input.dispatchKeyEvent", type="keyUp", **event)

    def type(self, text: str) -> None:
        self.send("Input.insertText", text=text)

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        shot = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        os.close(self._to)
        os.close(self._from)
        self._process.terminate()
        self._process.wait(timeout=TIMEOUT_S)
