"""A stand-in for an edge, with the face that the dashboard needs, and a real Chromium driven over WebDriver's HTTP."""

import asyncio
import base64
import contextlib
import http.client
import json
import math
import shutil
import subprocess
import threading
import time

import pytest

from shoal.device_agents.snapshot import BUCKETS
from shoal.runtime.errors import UsageError

TOKEN = "sea-otter-4b1d-token"


def latency(*seconds: float | None) -> dict:
    """Of requests that took `seconds`, one a span."""
    known = sorted(value for value in seconds if value is not None)
    return {
        "count": len(known),
        "sum": sum(known),
        "buckets": [sum(value <= edge for value in known) for edge in BUCKETS],
        "p50": known[len(known) // 2] if known else None,
        "p95": known[len(known) * 95 // 100] if known else None,
        "recent": list(seconds),
    }


def requests(done=0, busy=0, late=0, failed=0, running=0) -> dict:
    return {"done": done, "busy": busy, "late": late, "failed": failed, "running": running}


class StandIn:
    """An edge as `snapshot.Watched` describes it, whose numbers a test sets; `change()` makes it say "look again"."""

    def __init__(self) -> None:
        self.queues: set[asyncio.Queue] = set()
        self.loop = None
        self.calls: list[tuple] = []
        self.started = time.time() - 8000
        self.value = self._first()

    def snapshot(self) -> dict:
        self.value["time"] = time.time()
        return self.value

    def subscribe(self) -> asyncio.Queue:
        self.loop = asyncio.get_running_loop()
        queue: asyncio.Queue = asyncio.Queue(1)
        self.queues.add(queue)
        return queue

    def unsubscribe(self, queue) -> None:
        self.queues.discard(queue)

    def change(self) -> None:
        for queue in list(self.queues):
            with contextlib.suppress(asyncio.QueueFull):
                queue.put_nowait(None)

    def open_window(self) -> None:
        now = time.time()
        self.value["pairing"] = {
            "state": "open", "code": "4071-2386", "text": "shoal-pair:192.168.1.20:4707#40712386",
            "address": "192.168.1.20:4707", "opened_at": now, "closes_at": now + 120, "tries_left": 3, "paired": "",
        }  # fmt: skip
        self.calls.append(("open",))
        self.change()

    def end_window(self, state: str, paired: str = "") -> None:
        self.value["pairing"] |= {"state": state, "code": "", "text": "", "paired": paired}
        self.change()

    def close_window(self) -> None:
        self.calls.append(("close",))
        self.end_window("closed")

    def rename(self, fingerprint: str, name: str) -> None:
        self.calls.append(("rename", fingerprint, name))
        if name == "taken":
            raise UsageError("The name is taken.", "Another device has it.", "Choose another.")
        next(device for device in self.value["devices"] if device["fingerprint"] == fingerprint)["name"] = name
        self.change()

    def revoke(self, fingerprint: str) -> None:
        self.calls.append(("revoke", fingerprint))
        self.value["devices"] = [row for row in self.value["devices"] if row["fingerprint"] != fingerprint]
        self.change()

    def device(self, number: int, name: str, **changed) -> dict:
        wave = [0.0031 + 0.0012 * math.sin(step / 4 + number) ** 2 for step in range(60)]
        return {
            "fingerprint": f"{number:064x}", "id": f"K{number}QX-7MZA-PT4N-2WVE", "name": name,
            "rights": ["infer"], "paired_at": self.started, "seen_at": time.time(),
            "link": {"name": f"tcp 192.168.1.{30 + number}:50{number}12", "kind": "tcp", "since": self.started,
                     "rate": 11.8e6, "rtt": 0.0014, "sent": 1_204_511, "received": 61_888_002},
            "health": {"battery_percent": 82.0, "on_power": False, "temperature_c": 41.5,
                       "memory_available": 412_000_000, "memory_pressure": 0.1, "cpu_percent": 23.0},
            "chosen": {"model": "mobilenet-tail", "tail": "5b" * 32, "mode": 3, "bits": 4, "bytes": 6912,
                       "accuracy": 0.961, "allowed": [1, 2, 3], "deadline": 0.15, "inflight": 4,
                       "why": "The largest mode whose latent crosses the link within the deadline."},
            "requests": requests(18_442), "latency": latency(*wave), "sent": 1_204_511, "received": 61_888_002,
        } | changed  # fmt: skip

    def _first(self) -> dict:
        serial = {"name": "serial /dev/ttyUSB0 at 115200 baud", "kind": "serial", "since": self.started,
                  "rate": 11_520.0, "rtt": 0.038, "sent": 8_211, "received": 402_118}  # fmt: skip
        gap = [None] * 20 + [0.21, 0.24, 0.22, None, None, 0.31, 0.28, 0.22] + [0.2] * 32
        unknown = dict.fromkeys(
            ("battery_percent", "on_power", "temperature_c", "memory_available", "memory_pressure", "cpu_percent")
        )
        return {
            "name": "attic", "id": "E7MR-Q2XD-LK5B-9TNA", "version": "0.1.0", "time": time.time(),
            "started_at": self.started, "addresses": ["192.168.1.20:4707"], "draining": False,
            "memory": {"used": 312_400_000, "limit": 1_000_000_000},
            "requests": requests(20_110, 12, 3, 1, 2),
            "latency": latency(*(0.003 + 0.002 * (i % 7) for i in range(60))),
            "devices": [
                self.device(1, "camera-front"),
                self.device(2, "camera-yard", requests=requests(1_402, busy=12, late=3)),
                self.device(3, "gate-sensor", link=serial, health=unknown, latency=latency(*gap),
                            requests=requests(266, failed=1), sent=8_211, received=402_118),
                self.device(4, "greenhouse", link=None, health=None, chosen=None, latency=latency(), sent=0, received=0,
                            requests=requests(), seen_at=time.time() - 7300),
            ],
            "models": [
                {"digest": "5b" * 32, "name": "mobilenet-tail", "role": "tail", "bytes": 9_811_200,
                 "resident": 31_000_000, "used_at": time.time(), "served": 19_844, "batches": 8_102, "queued": 1,
                 "where": ""},
                {"digest": "c4" * 32, "name": "smollm2-135m", "role": "decode", "bytes": 88_400_000, "resident": None,
                 "used_at": time.time() - 4000, "served": 266, "batches": 266, "queued": 0, "where": ""},
                {"digest": "07" * 32, "name": "resnet50-tail", "role": "tail", "bytes": 71_000_000, "resident": None,
                 "used_at": None, "served": 0, "batches": 0, "queued": 0, "where": "http://gpu.lan:8000"},
            ],
            "rounds": [
                {"name": "gestures", "number": 4, "rounds": 10, "state": "training", "started_at": time.time() - 48,
                 "ended_at": None, "asked": 3, "answered": 2, "bytes": 41_222, "metric": "loss", "value": 0.4182,
                 "why": ""},
                {"name": "gestures", "number": 3, "rounds": 10, "state": "failed", "started_at": time.time() - 400,
                 "ended_at": time.time() - 300, "asked": 3, "answered": 1, "bytes": 20_110, "metric": "", "value": None,
                 "why": "Two devices did not answer by the deadline."},
            ],
            "pairing": None,
        }  # fmt: skip


@pytest.fixture
def stand_in() -> StandIn:
    return StandIn()


@pytest.fixture
def token() -> str:
    return TOKEN


class Serving:
    """A WebServer in an event loop of its own thread, so that a test may block."""

    def __init__(self, edge):
        self.edge, self.port, self.url = edge, 0, ""
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    def do(self, call, *arguments):
        """`call(*arguments)` in the loop, as an edge would: coroutines are awaited."""

        async def run():
            value = call(*arguments)
            return await value if asyncio.iscoroutine(value) else value

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(20)

    def start(self) -> None:
        from shoal.device_agents.web_server import WebServer

        self.server = WebServer(self.edge, TOKEN, port=self.port)
        self.do(self.server.start)
        self.port, self.url = self.server.port, self.server.url

    def stop(self) -> None:
        self.do(self.server.stop)

    def close(self) -> None:
        self.stop()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(5)
        self.loop.close()


@pytest.fixture
def serving(stand_in):
    """The dashboard of a stand-in."""
    pytest.importorskip("uvicorn")
    server = Serving(stand_in)
    server.start()
    yield server
    server.close()


@pytest.fixture
def real(tmp_path):
    """The dashboard of a real edge, without a device."""
    pytest.importorskip("uvicorn")
    from shoal.device_agents.edge import Edge

    server = Serving(None)
    server.edge = server.do(lambda: Edge(tmp_path / "edge", ["127.0.0.1:0"], name="attic", announce=False))
    server.do(server.edge.start)
    server.start()
    yield server
    server.do(server.edge.stop, 0.0)
    server.close()


class Browser:
    """WebDriver over HTTP: only what these tests ask. A wait is for a JavaScript expression to be true."""

    def __init__(self, port: int, profile: str, chromium: str):
        self.port = port
        options = [
            "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-dev-shm-usage", "--disable-background-networking", "--disable-component-update",
            "--disable-sync", f"--user-data-dir={profile}",
        ]  # fmt: skip
        wanted = {
            "browserName": "chrome",
            "goog:chromeOptions": {"args": options, "binary": chromium},
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        self.session = ""
        self.session = self.ask("POST", "", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]

    def ask(self, method: str, path: str, body: dict | None = None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        address = f"/session/{self.session}{path}" if self.session else "/session"
        connection.request(method, address, None if body is None else json.dumps(body))
        value = json.loads(connection.getresponse().read())["value"]
        connection.close()
        assert not (isinstance(value, dict) and "error" in value), value
        return value

    def open(self, url: str) -> None:
        self.ask("POST", "/url", {"url": url})

    def run(self, script: str):
        return self.ask("POST", "/execute/sync", {"script": script, "args": []})

    def wait(self, expression: str, seconds: float = 15.0) -> None:
        end = time.monotonic() + seconds
        while not self.run(f"return Boolean({expression})"):
            assert time.monotonic() < end, f"never true: {expression}\n{self.run('return document.body.innerText')}"
            time.sleep(0.05)

    def _element(self, selector: str) -> str:
        found = self.ask("POST", "/element", {"using": "css selector", "value": selector})
        return next(iter(found.values()))

    def click(self, selector: str) -> None:
        """Once it is shown: what is hidden has its text already."""
        self.wait(f"document.querySelector({json.dumps(selector)})?.getClientRects().length")
        self.ask("POST", f"/element/{self._element(selector)}/click", {})

    def type(self, selector: str, text: str) -> None:
        element = self._element(selector)
        self.ask("POST", f"/element/{element}/clear", {})
        self.ask("POST", f"/element/{element}/value", {"text": text})

    def keys(self, *keys: str) -> None:
        """Pressed on whatever has the focus."""
        strokes = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self.ask("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": strokes}]})

    def screen(self, width: int, height: int, *, dark: bool = False) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 700}
        self.devtools("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.devtools("Emulation.setEmulatedMedia", {"features": [scheme]})

    def devtools(self, command: str, parameters: dict):
        return self.ask("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def picture(self) -> bytes:
        return base64.b64decode(self.ask("GET", "/screenshot"))

    def log(self) -> list[str]:
        """What the console said since the last look, at a warning's level or above."""
        rows = self.ask("POST", "/se/log", {"type": "browser"})
        return [row["message"] for row in rows if row["level"] in ("SEVERE", "WARNING")]

    def quit(self) -> None:
        with contextlib.suppress(OSError):
            self.ask("DELETE", "")


@pytest.fixture(scope="session")
def _chromedriver():
    driver, chromium = shutil.which("chromedriver"), shutil.which("chromium") or shutil.which("google-chrome")
    if not driver or not chromium:
        pytest.skip("chromium and chromium-driver are not installed (apt-get install chromium chromium-driver)")
    process = subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    port = 0
    for line in process.stdout:
        if "started successfully on port" in line:
            port = int(line.rpartition(" ")[2].strip().rstrip("."))
            break
    threading.Thread(target=process.stdout.read, daemon=True).start()
    yield port, chromium
    process.terminate()
    process.wait(10)


@pytest.fixture(scope="session")
def _browser(_chromedriver, tmp_path_factory):
    port, chromium = _chromedriver
    browser = Browser(port, str(tmp_path_factory.mktemp("chromium")), chromium)
    yield browser
    browser.quit()


@pytest.fixture
def browser(_browser):
    """One Chromium for all tests, without cookies, console lines or a page of the test before."""
    _browser.open("about:blank")
    _browser.devtools("Network.clearBrowserCookies", {})
    _browser.screen(1280, 900)
    _browser.log()
    return _browser
