"""A headless Chromium, driven by its DevTools protocol: for the tests of pages and for the PDF.

The protocol goes through two pipes, so that neither a driver program nor a port nor another package
is needed. The browser reaches no network: every name fails to resolve. Every wait has a limit.

The protocol: https://chromedevtools.github.io/devtools-protocol/
"""

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import tempfile
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
HOW_TO_GET = (
    "no Chromium was found: install one (Debian: apt install chromium), "
    "or set CHROMIUM to the path of one"
)
SECONDS = 60  # for any one command; the longest takes some seconds

OPTIONS = (
    "--headless=new",
    "--remote-debugging-pipe",
    "--no-sandbox",  # root in a container has no sandbox; all pages are our own
    "--disable-dev-shm-usage",  # which is tiny in a container
    "--disable-gpu",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--no-default-browser-check",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
)


class BrowserError(RuntimeError):
    """Chromium ended, took too long, or refused a command."""


def find() -> str | None:
    """The path of a Chromium: the variable CHROMIUM, else the first of its names on PATH."""
    named = os.environ.get("CHROMIUM")
    if named:
        if shutil.which(named) is None:
            raise BrowserError(f"CHROMIUM={named!r} must be the path of a Chromium: it is not run")
        return named
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """A running Chromium; a context manager that ends it."""

    def __init__(self, path: str | None = None):
        path = path or find()
        if path is None:
            raise BrowserError(HOW_TO_GET)
        self._profile = tempfile.mkdtemp(prefix="convt_lab-chromium-")
        # Numbers above 9, so that neither is in the way of 3 and 4, where Chromium wants its ends.
        (out, self._write), (self._read, back) = (map(_high, os.pipe()) for _ in range(2))
        self.errors = Path(self._profile, "stderr")
        flags = os.O_WRONLY | os.O_CREAT
        self._pid = os.posix_spawn(
            shutil.which(path),
            [path, *OPTIONS, f"--user-data-dir={self._profile}", "about:blank"],
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
                (os.POSIX_SPAWN_OPEN, 2, str(self.errors), flags, 0o600),
                (os.POSIX_SPAWN_DUP2, out, 3),
                (os.POSIX_SPAWN_DUP2, back, 4),
            ],
            setsid=True,  # a process group of its own, which is ended as a whole
        )
        os.close(out)
        os.close(back)
        self._bytes = bytearray()
        self._last_id = 0
        self._answers: dict[int, dict] = {}
        self.events: list[dict] = []

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """End Chromium and all of its processes, and delete its profile."""
        if self._pid is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        self._pid = None
        os.close(self._write)
        os.close(self._read)
        shutil.rmtree(self._profile, ignore_errors=True)

    def send(self, method: str, session: str | None = None, seconds=SECONDS, **parameters) -> dict:
        """Give a command and wait for its answer."""
        self._last_id += 1
        message = {"id": self._last_id, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        try:
            os.write(self._write, json.dumps(message).encode() + b"\0")
        except BrokenPipeError as error:
            raise BrowserError(self._ended()) from error
        limit = time.monotonic() + seconds
        while self._last_id not in self._answers:
            self._receive(limit, method)
        answer = self._answers.pop(self._last_id)
        if "error" in answer:
            raise BrowserError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def wait_for(self, method: str, session: str, seconds: float = SECONDS) -> dict:
        """Wait until an event of a page has come since it was loaded; return what it says."""
        limit = time.monotonic() + seconds
        seen = 0
        while True:
            for event in self.events[seen:]:
                if (event["method"], event.get("sessionId")) == (method, session):
                    return event["params"]
            seen = len(self.events)
            self._receive(limit, method)

    def page(self) -> "Page":
        """Open an empty page."""
        return Page(self)

    def _receive(self, limit: float, waits_for: str) -> None:
        """Read what has come, at least something, and sort it into answers and events."""
        left = limit - time.monotonic()
        if left <= 0 or not select.select([self._read], [], [], left)[0]:
            raise BrowserError(f"Chromium has not answered in time: {waits_for}")
        got = os.read(self._read, 1 << 20)
        if not got:
            raise BrowserError(self._ended())
        self._bytes += got
        *messages, rest = self._bytes.split(b"\0")
        self._bytes = rest
        for message in map(json.loads, messages):
            if "id" in message:
                self._answers[message["id"]] = message
            else:
                self.events.append(message)

    def _ended(self) -> str:
        said = self.errors.read_text(errors="replace").strip().splitlines()[-5:]
        return "\n".join(["Chromium has ended by itself; its last words:", *said])


class Page:
    """A page of a browser: load an address, run JavaScript, point, type, print."""

    def __init__(self, browser: Browser):
        self.browser = browser
        target = browser.send("Target.createTarget", url="about:blank")["targetId"]
        attached = browser.send("Target.attachToTarget", targetId=target, flatten=True)
        self._target, self._session = target, attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, seconds: float = SECONDS, **parameters) -> dict:
        """Give this page a command."""
        return self.browser.send(method, self._session, seconds, **parameters)

    def close(self) -> None:
        """Close the page."""
        self.browser.send("Target.closeTarget", targetId=self._target)

    def resize(self, width: int, height: int = 900) -> None:
        """Show the page in a window of this size, in CSS pixels."""
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def go(self, url: str) -> None:
        """Load an address, and wait until all that it loads is there and formulas are set."""
        self.browser.events.clear()
        gone = self.send("Page.navigate", url=url)
        if "errorText" in gone:
            raise BrowserError(f"{url}: {gone['errorText']}")
        if "loaderId" in gone:  # else only the hash has changed
            self.browser.wait_for("Page.loadEventFired", self._session)
        self.evaluate("window.MathJax?.startup?.promise?.then(() => true)")
        # Asking for a size lays the page out, which is when fonts begin to load.
        self.evaluate("document.body.offsetHeight && document.fonts.ready.then(() => true)")

    def evaluate(self, expression: str):
        """The value of a JavaScript expression, or of the promise that it is."""
        answer = self.send(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"]
            raise BrowserError(details.get("exception", {}).get("description", details["text"]))
        return answer["result"].get("value")

    def complaints(self) -> list[str]:
        """What the page has sent to the console as an error or a warning, since it was loaded."""
        found = []
        for event in self.browser.events:
            if event.get("sessionId") != self._session:
                continue
            said = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                details = said["exceptionDetails"]
                found.append(details.get("exception", {}).get("description", details["text"]))
            elif event["method"] == "Runtime.consoleAPICalled":
                if said["type"] in ("error", "warning", "assert"):
                    found.append(" ".join(str(a.get("value", a)) for a in said["args"]))
            elif event["method"] == "Log.entryAdded" and said["entry"]["level"] != "verbose":
                found.append(f"{said['entry']['text']} {said['entry'].get('url', '')}".strip())
            elif event["method"] == "Network.loadingFailed" and not said.get("canceled"):
                found.append(f"not loaded: {said['errorText']}")
        return found

    def requests(self) -> list[str]:
        """The addresses that the page has asked for, since it was loaded."""
        return [
            event["params"]["request"]["url"]
            for event in self.browser.events
            if event["method"] == "Network.requestWillBeSent"
            and event.get("sessionId") == self._session
        ]

    def point(self, x: float, y: float, *, click: bool = False) -> None:
        """Move the mouse to a place of the window, and perhaps click there."""
        kinds = ["mouseMoved", *(["mousePressed", "mouseReleased"] if click else [])]
        for kind in kinds:
            button = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, **button)

    def touch(self, x: float, y: float) -> None:
        """Tap with a finger."""
        self.send("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        self.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def press(self, key: str, *, control: bool = False, shift: bool = False) -> None:
        """Press and let go a key: an arrow, Home, Tab, the space bar on a button."""
        codes = {"Tab": 9, " ": 32, "End": 35, "Home": 36}
        codes |= {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
        for kind in ("rawKeyDown", "keyUp"):
            self.send(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=codes[key],
                modifiers=2 * control + 8 * shift,
            )

    def pdf(self, seconds: float, **options) -> bytes:
        """The page in print, as a PDF."""
        stream = self.send("Page.printToPDF", seconds, transferMode="ReturnAsStream", **options)
        parts = []
        while True:
            part = self.send("IO.read", handle=stream["stream"])
            data = part["data"]
            parts.append(base64.b64decode(data) if part.get("base64Encoded") else data.encode())
            if part["eof"]:
                return b"".join(parts)


def _high(fd: int) -> int:
    """The same file under a number of at least 10, which no child inherits."""
    moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(fd)
    return moved
