"""Apps and the agent of their device over the Unix socket: answers, deadlines, and bytes that are no frame."""

import asyncio
import contextlib
import json
import os
import socket
import stat
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from paired import Pair, small_network, until

from shoal.device_agents import apps
from shoal.device_agents.agent import App
from shoal.runtime.errors import LinkError, UsageError


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    return small_network(tmp_path_factory.mktemp("network"))


class Serving:
    """An agent in a thread, for the blocking client."""

    def __init__(self, folder: Path, **options):
        self.path = folder / "device/agent.sock"
        self._ready, self._stop = threading.Event(), None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main(folder, options)))

    async def _main(self, folder, options):
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        async with Pair(folder, **options).agent() as agent:
            await until(lambda: len(agent.models.open) == len(options.get("models", {})))
            self._ready.set()
            await self._stop.wait()

    def __enter__(self):
        self._thread.start()
        assert self._ready.wait(20)
        return self

    def __exit__(self, *_):
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(20)


def test_the_client_of_an_app(network, tmp_path):
    _, device, _, images, logits = network
    with Serving(tmp_path, models={"cats": device}) as serving, App(serving.path) as app:
        assert stat.S_IMODE(os.stat(serving.path).st_mode) == 0o600
        for _ in range(2):
            answer = app.infer({"image": images}, deadline=10.0)
            assert answer.where == "local" and answer.outputs["label"].shape == (4,)
            np.testing.assert_allclose(answer.outputs["logits"], logits, atol=1e-4)
            with pytest.raises(UsageError, match="dogs|image"):
                app.infer({"picture": images}, deadline=10.0)
        status = app.status()
        assert status["models"][0]["name"] == "cats" and status["health"]["temperature_c"] is None
        with pytest.raises(UsageError):
            app.infer({"image": images}, deadline=0)
        with pytest.raises(UsageError):
            app.infer({"image": [1, 2]})  # type: ignore[dict-item]
        with pytest.raises(UsageError, match="Which model"):
            list(app.generate("Hello"))
    with App(serving.path) as app, pytest.raises(LinkError, match="No agent"):
        app.status()


def test_an_app_outlives_a_restart_of_the_agent(network, tmp_path):
    _, device, _, images, _ = network
    with Serving(tmp_path, models={"cats": device}) as serving:
        app = App(serving.path)
        assert app.infer({"image": images[:1]}, 10.0).where == "local"
    with Serving(tmp_path, models={"cats": device}):
        assert app.infer({"image": images[:1]}, 10.0).where == "local"
    app.close()


def test_an_agent_that_does_not_answer_costs_an_app_its_deadline_and_no_more(tmp_path):
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "dead.sock"))
    listener.listen()
    began = time.monotonic()
    with App(tmp_path / "dead.sock") as app, pytest.raises(LinkError, match="in time"):
        app.infer({"x": np.zeros(3, np.float32)}, deadline=0.1)
    assert time.monotonic() - began < 5.0
    listener.close()


def tensor(**fields) -> bytes:
    """An infer request whose one tensor has these fields, and no bytes."""
    said = {"name": "a", "dtype": "int8", "shape": [1]} | fields
    head = json.dumps({"op": "infer", "tensors": [said]}).encode()
    return apps.LENGTH.pack(len(head)) + head


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xff\xff\xff",
        b"\x00\x00\x00\x00",
        apps.LENGTH.pack(4) + b"null",
        apps.LENGTH.pack(3) + b"{{{",
        apps.LENGTH.pack(100) + (b"[" * 100),
        tensor(shape=[1 << 32]),
        tensor(shape=[(1 << 31) - 1] * 2),
        tensor(shape=[-1]),
        tensor(shape=[1] * 9),
        tensor(dtype="object"),
        tensor(name=7),
        b"GET / HTTP/1.1\r\n\r\n",
    ],
)
def test_what_is_no_frame_is_refused_and_the_next_app_served(tmp_path, data):
    with Serving(tmp_path) as serving:
        with socket.socket(socket.AF_UNIX) as bad:
            bad.connect(str(serving.path))
            bad.sendall(data)
            bad.settimeout(5)
            answer = bad.recv(1 << 16)
            assert b"error" in answer
            with contextlib.suppress(OSError):
                while bad.recv(1 << 16):
                    pass
        with App(serving.path) as app:
            assert app.status()["name"]


@pytest.mark.parametrize(
    "said", [{"op": "dance"}, {}, {"op": "status", "deadline": "soon"}, {"op": "infer", "deadline": 1e9}]
)
def test_requests_that_make_no_sense_are_answered(tmp_path, said):
    with Serving(tmp_path) as serving, socket.socket(socket.AF_UNIX) as odd:
        odd.connect(str(serving.path))
        odd.settimeout(5)
        for _ in range(2):  # and the connection goes on
            odd.sendall(apps.frame(said))
            assert b'"error"' in odd.recv(1 << 16)


def test_frames_hold_any_tensor():
    rng = np.random.default_rng(0)
    tensors = {
        "a": rng.standard_normal((2, 3)).astype(np.float16), "b": np.array(3, np.int64), "no": np.zeros((0, 4), bool),
        "big-endian": rng.standard_normal(5).astype(">f4"), "strided": np.arange(24).reshape(4, 6)[::2, 1::2],
    }  # fmt: skip
    found = apps.unpack(apps.layout(apps.describe(tensors)), apps.raw(tensors))
    assert found.keys() == tensors.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(found[name], array)
