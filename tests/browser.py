"""A headless Chromium for tests, by chromedriver's protocol (https://www.w3.org/TR/webdriver2)."""

import base64
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the protocol's own name of an element's id
ENTER = "\ue007"


class Browser:
    """One window. Scripts are bodies of functions; elements are named by CSS selectors."""

    def __init__(self, driver: httpx.Client, binary: str, profile: Path):
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        arguments += ["--no-first-run", "--disable-background-networking", "--disable-component-update"]
        chrome = {"binary": binary, "args": [*arguments, f"--user-data-dir={profile}"]}
        wanted = {"alwaysMatch": {"goog:chromeOptions": chrome, "goog:loggingPrefs": {"browser": "ALL"}}}
        self.driver = driver
        self.session = f"/session/{self.call('/session', {'capabilities': wanted})['sessionId']}"

    def call(self, path: str, body: dict | None = None) -> Any:
        answer = self.driver.post(path, json=body) if body is not None else self.driver.get(path)
        value = answer.json()["value"]
        assert answer.status_code == 200, value
        return value

    def do(self, path: str, body: dict | None = None) -> Any:
        return self.call(self.session + path, body)

    def open(self, url: str) -> None:
        self.do("/url", {"url": "about:blank"})  # a changed fragment alone would not load the page anew
        self.do("/url", {"url": url})

    def size(self, width: int, height: int) -> None:
        """The width and height that a page sees; headless Chromium has no window narrower than 500 pixels."""
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        command = {"cmd": "Emulation.setDeviceMetricsOverride", "params": screen}
        self.do("/goog/cdp/execute", command)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.do("/execute/sync", {"script": script, "args": list(arguments)})

    def element(self, selector: str) -> str:
        return self.do("/element", {"using": "css selector", "value": selector})[ELEMENT]

    def click(self, selector: str) -> None:
        self.do(f"/element/{self.element(selector)}/click", {})

    def type(self, selector: str, text: str) -> None:
        """Replace a field's text, as a person does with the keyboard."""
        self.do(f"/element/{self.element(selector)}/clear", {})
        self.do(f"/element/{self.element(selector)}/value", {"text": text})

    def text(self, selector: str) -> str:
        return self.run("return document.querySelector(arguments[0]).textContent", selector)

    def texts(self, selector: str) -> list[str]:
        return self.run("return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)", selector)

    def until(self, script: str, *arguments: Any, seconds: float = 60) -> Any:
        """Wait until a script gives something true, and return it."""
        return wait(lambda: self.run(script, *arguments), seconds, script)

    def errors(self) -> list[str]:
        """Errors of the console since the last call; a status that a page answers to a bad request is none."""
        found = self.do("/se/log", {"type": "browser"})
        severe = [entry["message"] for entry in found if entry["level"] == "SEVERE"]
        return [message for message in severe if "the server responded with" not in message]

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.do("/screenshot")))

    def close(self) -> None:
        self.driver.delete(self.session)


def wait(condition: Callable[[], Any], seconds: float, name: str) -> Any:
    """Wait until a condition is true, and return its value."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"after {seconds} s still not true: {name}"
        time.sleep(0.05)
    return found


@contextmanager
def browsers(folder: Path) -> Iterator[Callable[[], Browser]]:
    """A maker of browsers, each with its own profile below a folder. The test skips where no browser is installed."""
    binary = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
    driver = shutil.which("chromedriver")
    if not (binary and driver):
        pytest.skip("no Chromium with chromedriver here (Debian: apt-get install chromium chromium-driver)")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen([driver, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    opened: list[Browser] = []
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120, trust_env=False) as client:
            wait(lambda: _ready(client), 60, "chromedriver is ready")

            def make() -> Browser:
                opened.append(Browser(client, binary, folder / f"profile{len(opened)}"))
                return opened[-1]

            yield make
            for browser in opened:
                browser.close()
    finally:
        process.terminate()
        process.wait()


def _ready(client: httpx.Client) -> bool:
    try:
        return client.get("/status").json()["value"]["ready"]
    except httpx.TransportError:
        return False
