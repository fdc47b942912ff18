"""Headless Chromium without network access, controlled by WebDriver over HTTP."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import urllib.request
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SWITCHES = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
            "--disable-component-update", "--disable-sync", "--disable-quic", "--disable-dev-shm-usage",
            "--host-resolver-rules=MAP * ~NOTFOUND", "--force-device-scale-factor=1"]  # fmt: skip


class Browser:
    """The WebDriver commands that the tests need."""

    def __init__(self, port: int, profile: Path) -> None:
        self.base = f"http://127.0.0.1:{port}/session"
        options = {"args": [*SWITCHES, f"--user-data-dir={profile}"], "binary": shutil.which("chromium")}
        capabilities = {"alwaysMatch": {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}}
        self.base += "/" + self("POST", "", {"capabilities": capabilities})["sessionId"]

    def __call__(self, verb: str, path: str, body: dict | None = None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base + path, data, {"Content-Type": "application/json"}, method=verb)
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, page: Path, size: tuple[int, int] = (1200, 900), scheme: str = "light") -> None:
        screen = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size[0] < 600}
        self.cdp("Emulation.setDeviceMetricsOverride", screen)
        self.cdp("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
        self("POST", "/url", {"url": page.as_uri()})
        self.wait("document.body.dataset.ready === 'yes' || !document.getElementById('fault').hidden")
        assert not self.js("return document.getElementById('fault').textContent")

    def cdp(self, command: str, params: dict) -> None:
        self("POST", "/goog/cdp/execute", {"cmd": command, "params": params})

    def js(self, script: str, *args):
        return self("POST", "/execute/sync", {"script": script, "args": list(args)})

    def wait(self, condition: str) -> None:
        waits = "const done = arguments[0]; (function look() {(%s) ? done(1) : setTimeout(look, 20)})()"
        self("POST", "/execute/async", {"script": waits % condition, "args": []})

    def find(self, selector: str) -> str:
        return next(iter(self("POST", "/element", {"using": "css selector", "value": selector}).values()))

    def click(self, selector: str) -> None:
        self("POST", f"/element/{self.find(selector)}/click", {})

    def press(self, *keys: str) -> None:
        """Send real key events to the focused element."""
        strokes = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": strokes}]})

    def drag(self, selector: str, *shares: float) -> None:
        """Press at the first fraction of the width of an element, move over the others, and release at the last."""
        box = self.js("return document.querySelector(arguments[0]).getBoundingClientRect().toJSON()", selector)
        points = [
            {"x": round(box["x"] + share * box["width"]), "y": round(box["y"] + box["height"] / 2)} for share in shares
        ]
        moves = [{"type": "pointerMove", "duration": 0, **point} for point in points]
        actions = [moves[0], {"type": "pointerDown", "button": 0}, *moves[1:], {"type": "pointerUp", "button": 0}]
        self("POST", "/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": actions}]})

    def choose(self, field: str, value: str) -> None:
        self.click(
            f"#{field} option[value='{value}']" if field != "explanation" else f"#explanation option:nth-child({value})"
        )

    def pixels(self, canvas: str = "explained") -> np.ndarray:
        """Return the pixels (H, W, 3) of a canvas."""
        script = """const c = document.getElementById(arguments[0]);
            return Array.from(c.getContext('2d').getImageData(0, 0, c.width, c.height).data).concat(c.width)"""
        *flat, width = self.js(script, canvas)
        return np.array(flat).reshape(-1, width, 4)[..., :3]

    def text(self, selector: str) -> str:
        return self.js("return document.querySelector(arguments[0]).innerText", selector)

    def screenshot(self) -> Image.Image:
        return Image.open(BytesIO(b64decode(self("GET", "/screenshot")))).convert("RGB")


@contextmanager
def driven(profile: Path) -> Iterator[Browser]:
    """Start a browser with a new profile. Skip the test if Chromium is not installed."""
    missing = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"needs Debian's chromium and chromium-driver; not installed: {', '.join(missing)}")
    with subprocess.Popen(
        ["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as driver:
        try:
            port = next(
                int(found[1]) for line in driver.stdout if (found := re.search(r"successfully on port (\d+)", line))
            )
            session = Browser(port, profile)
            yield session
            session("DELETE", "")
        finally:
            driver.terminate()
