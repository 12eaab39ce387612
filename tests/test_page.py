"""The page in headless Chromium, driven over its pipe: what a person would do, and what they would see."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from served import Served, listening, serve

from ae.tokenizer_adapter import TokenizerAdapter

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
SCREENSHOTS = os.environ.get("SCREENSHOTS")  # a folder, to look at them

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt install chromium)")


class Browser:
    """A tab, through Chromium's own protocol: JSON between NUL bytes on file descriptors 3 and 4."""

    def __init__(self, profile: Path) -> None:
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        flags = "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --disable-background-networking"
        command = f'exec "$0" {flags} --remote-debugging-pipe "--user-data-dir=$1" about:blank 3<&{theirs_in} 4>&{theirs_out}'
        self.process = subprocess.Popen(
            ["bash", "-c", command, str(CHROMIUM), str(profile)], pass_fds=(theirs_in, theirs_out), stderr=subprocess.DEVNULL
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._held, self._number, self._session = b"", 0, ""
        self.requests: list[str] = []
        self.errors: list[str] = []
        target = next(t for t in self("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self._session = self("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **params: Any) -> dict[str, Any]:
        """A command's result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._held:
                piece = os.read(self._in, 1 << 20)
                assert piece, "Chromium has ended"
                self._held += piece
            line, self._held = self._held.split(b"\0", 1)
            answer = json.loads(line)
            if answer.get("method") == "Network.requestWillBeSent":
                self.requests.append(answer["params"]["request"]["url"])
            if answer.get("method") == "Runtime.exceptionThrown" or (
                answer.get("method") == "Log.entryAdded" and answer["params"]["entry"]["source"] in ("security", "javascript")
            ):
                self.errors.append(line.decode())
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def js(self, expression: str) -> Any:
        return self("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def wait(self, expression: str, seconds: float = 30.0) -> None:
        end = time.monotonic() + seconds
        while not self.js(expression):
            assert time.monotonic() < end, (expression, self.js("document.body?.innerText"), self.errors)
            time.sleep(0.02)

    def screenshot(self, name: str) -> None:
        if SCREENSHOTS:
            shot = self("Page.captureScreenshot", captureBeyondViewport=True)["data"]
            (Path(SCREENSHOTS) / f"{name}.png").write_bytes(base64.b64decode(shot))

    def close(self) -> None:
        self._session = ""
        self("Browser.close")
        self.process.wait(20)
        os.close(self._out)
        os.close(self._in)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    it = Browser(tmp_path / "profile")
    yield it
    it.close()


@pytest.fixture
def served(tokenizer: TokenizerAdapter, monkeypatch: pytest.MonkeyPatch) -> Served:
    """A server whose steps take a while, and whose rows do not end by themselves."""
    monkeypatch.setattr(tokenizer, "stop_ids", frozenset())
    it = serve(tokenizer)
    step = it.batcher.sampler.step
    monkeypatch.setattr(it.batcher.sampler, "step", lambda: time.sleep(0.03) or step())
    return it


def text(browser: Browser, id: str) -> str:
    return browser.js(f"document.getElementById('{id}').textContent")


def test_the_page(browser: Browser, served: Served) -> None:
    """Type, generate, watch the chunks come, stop; on a phone's width, light and dark; nothing is asked from elsewhere."""
    with listening(served.app) as url:
        browser("Page.navigate", url=url)
        browser.wait("document.getElementById('about')?.textContent.includes('4 tokens a latent step')")
        assert browser.js("document.getElementById('max_new_tokens').max") == "248"
        assert browser.js("document.getElementById('key').offsetParent") is None  # no key, no field
        set_value = (
            "(id, value) => { const e = document.getElementById(id); e.value = value; e.dispatchEvent(new Event('input')) }"
        )
        for id, value in (("prompt", "def <b>main</b>"), ("max_new_tokens", "48"), ("seed", "7")):
            browser.js(f"({set_value})('{id}', '{value}')")
        assert browser.js("document.getElementById('max_new_tokens').previousElementSibling.value") == "48"
        browser.js("document.getElementById('go').click()")
        browser.wait("document.querySelectorAll('.chunk').length >= 2")
        assert browser.js("document.getElementById('go').disabled")  # it is still writing: the chunks come one by one
        browser.wait("document.getElementById('reason').textContent == 'length'")
        assert browser.js("document.querySelectorAll('.chunk').length") == 12
        assert (text(browser, "tokens"), text(browser, "steps")) == ("48", "12")
        assert float(text(browser, "rate")) > 0
        assert text(browser, "student-says").endswith(": 12") and text(browser, "token-says").endswith(": 48")
        assert browser.js("document.querySelectorAll('#out b').length") == 0  # text stays text
        assert text(browser, "out").startswith("def <b>main</b>")
        first = text(browser, "out")

        for theme in ("light", "dark"):
            browser("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
            for name, width, height in (("desk", 1100, 900), ("phone", 360, 780)):
                browser(
                    "Emulation.setDeviceMetricsOverride",
                    width=width,
                    height=height,
                    deviceScaleFactor=1,
                    mobile=name == "phone",
                )
                assert browser.js("document.documentElement.scrollWidth <= window.innerWidth"), (theme, name)
                browser.screenshot(f"{theme}_{name}")
        dark = browser.js("getComputedStyle(document.body).backgroundColor")
        assert sum(int(part) for part in dark.strip("rgb()").split(",")) < 150

        browser.js("document.getElementById('go').click()")  # the same seed
        browser.wait("document.getElementById('reason').textContent == 'length'")
        assert text(browser, "out") == first

        browser.js(f"({set_value})('max_new_tokens', '200'); document.getElementById('go').click()")
        browser.wait("document.querySelectorAll('.chunk').length >= 2 && document.getElementById('reason').textContent == '-'")
        browser.js("document.getElementById('halt').click()")
        browser.wait("document.getElementById('reason').textContent == 'you'")
        assert browser.js("document.querySelectorAll('.chunk').length") < 50
        browser.js(f"({set_value})('prompt', 'x'.repeat(5000)); document.getElementById('go').click()")
        browser.wait("document.getElementById('message').textContent.includes('context')")
        assert {request.removeprefix(url) for request in browser.requests if request != "about:blank"} <= {
            "/", "/version", "/generate", "data:,",
        }  # fmt: skip
        assert not browser.errors


def test_the_page_asks_for_the_key(browser: Browser, tokenizer: TokenizerAdapter) -> None:
    with listening(serve(tokenizer, key="secret").app) as url:
        browser("Page.navigate", url=url)
        browser.wait("document.getElementById('key-label')?.hidden === false")
        browser.js("{ const e = document.getElementById('key'); e.value = 'secret'; e.dispatchEvent(new Event('change')) }")
        browser.wait("document.getElementById('about').textContent != ''")
        browser.js("document.getElementById('go').click()")
        browser.wait("document.querySelectorAll('.chunk').length >= 1")
