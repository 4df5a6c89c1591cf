"""A remote tail: a real network behind a real server, servers that lie, stall and die, and a real MLServer."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from shoal.converters.split.tail import pack_tail
from shoal.device_agents.oip import RemoteSession
from shoal.device_agents.ray_serve import Served
from shoal.runtime.errors import BusyError, LinkError, RemoteError, UsageError
from shoal.runtime.session import open_graph

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))
from make_split import split  # noqa: E402


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """(path of a tail's bundle, latents fp32 [6, 16, 8, 8], its outputs for them)."""
    made, path = split(), tmp_path_factory.mktemp("tail") / "tail.shoal"
    latents = np.random.default_rng(2).random((6, 16, 8, 8), np.float32)
    pack_tail(made.tail, path)
    with open_graph(made.tail, {}, threads=1) as tail:
        return path, latents, tail.run({"latent": latents})


@pytest.fixture(scope="module")
def server(network):
    """A real tail behind protocol v2 on a real port: the HTTP face of the Ray Serve deployment, without Ray."""
    uvicorn = pytest.importorskip("uvicorn")
    from starlette.requests import Request

    served = Served(network[0], "tail")

    async def infer(feeds):
        served.check(feeds)
        result = served.run([feeds])[0]
        if isinstance(result, Exception):
            raise result
        return result

    async def app(scope, receive, send):
        response = await served.answer(Request(scope, receive), infer)
        await response(scope, receive, send)

    bound = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, lifespan="off", log_config=None, ws="none")
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    running.should_exit = True
    thread.join(10)
    served.tail.close()


@pytest.mark.parametrize("binary", [None, False])
def test_a_remote_tail_answers_as_the_local_one(server, network, binary):
    _, latents, expected = network
    with RemoteSession(server, "tail", binary=binary) as session:
        assert session.binary is (binary is None) and session.ready()
        assert session.inputs["latent"].dims == (None, 16, 8, 8) and list(session.outputs) == ["logits", "label"]
        found = session.run({"latent": latents})
        assert found["label"].tolist() == expected["label"].tolist()
        np.testing.assert_allclose(found["logits"], expected["logits"], rtol=1e-5, atol=1e-5)
        assert list(session.run({"latent": latents[:1]}, ["label"])) == ["label"]
        with pytest.raises(RemoteError, match="HTTP 400.*do not fit"):
            session.run({"latent": latents[:, :3]})
        with pytest.raises(RemoteError, match="no output"):
            session.run({"latent": latents}, ["nothing"])
    with pytest.raises(UsageError):
        session.run({"latent": latents})


def test_threads_share_a_session(server, network):
    _, latents, expected = network
    with RemoteSession(server, "tail") as session, ThreadPoolExecutor(8) as pool:
        labels = list(pool.map(lambda i: session.run({"latent": latents[i : i + 1]})["label"][0], [*range(6)] * 8))
    assert labels == expected["label"].tolist() * 8


def test_a_model_that_is_not_there_is_said(server):
    with pytest.raises(RemoteError, match="404"):
        RemoteSession(server, "other/../tail")


@pytest.mark.parametrize("url", ["tail", "ftp://host", "http://", "http://h:99999", "http://u:p@h", "http://h/?x=1"])
def test_what_is_no_address_is_refused(url):
    with pytest.raises(UsageError):
        RemoteSession(url, "tail")


def test_an_address_where_nobody_listens_is_a_broken_link():
    with socket.create_server(("127.0.0.1", 0)) as bound:
        port = bound.getsockname()[1]
    with pytest.raises(LinkError, match="refused"):
        RemoteSession(f"http://127.0.0.1:{port}", "tail")


class Scripted:
    """Answers the two questions of an opening session, then each request with what `script` does to its connection."""

    def __init__(self):
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.script, self.connections = None, 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                connection = self.socket.accept()[0]
                self.connections += 1
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection):
        with connection, connection.makefile("rb") as lines, contextlib.suppress(OSError, ValueError):
            while head := lines.readline():
                length = 0
                while (line := lines.readline()) not in (b"\r\n", b""):
                    if line.lower().startswith(b"content-length:"):
                        length = int(line.split(b":")[1])
                lines.read(length)
                if head.startswith(b"GET"):
                    connection.sendall(reply(b'{"extensions": ["binary_tensor_data"]}'))
                elif self.script(connection) is False:
                    return


def reply(body: bytes, status: str = "200 OK", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


@pytest.fixture
def scripted():
    server = Scripted()
    yield server
    server.socket.close()


FEEDS = {"x": np.zeros((1, 4), np.float32)}
GOOD = b'{"outputs":[{"name":"y","datatype":"INT8","shape":[2],"data":[1,2]}]}'


@pytest.mark.parametrize(
    ("said", "error", "match"),
    [
        (reply(b"busy", "503 Busy"), BusyError, "503"),
        (reply(b'{"error": "no\\u001b[31m \\u202e tensor"}', "400 Bad"), RemoteError, r"400: no\?\[31m \? tensor"),
        (reply(b"<html>", "500 Oops"), RemoteError, "500"),
        (reply(b"", "302 Found", "Location: http://127.0.0.1:1/"), RemoteError, "302"),
        (reply(b"{}"), LinkError, "outputs"),
        (reply(b"\x1f\x8b", "200 OK", "Content-Encoding: gzip"), LinkError, "compressed"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n", LinkError, "at most"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", LinkError, None),
        (b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 200 + b"\r\n", LinkError, None),
        (b"HTTP/1.1 200 OK\r\nA: " + b"b" * 70_000, LinkError, None),
        (b"SSH-2.0-OpenSSH_9.2\r\n", LinkError, None),
        (b"\x00" * 4096, LinkError, None),
        (b"", LinkError, None),
        (reply(GOOD)[:-7], LinkError, "IncompleteRead"),
    ],
    ids=lambda value: repr(value)[:40] if isinstance(value, bytes) else "",
)  # fmt: skip
def test_a_hostile_answer_is_an_error_with_a_reason(scripted, said, error, match):
    def script(connection):
        connection.sendall(said)
        return False

    scripted.script = script
    with RemoteSession(scripted.url, "m", timeout=5) as session, pytest.raises(error, match=match):
        session.run(FEEDS)


def test_an_answer_without_end_is_cut_at_the_limit(scripted):
    sent = 0

    def script(connection):
        nonlocal sent
        connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            connection.sendall(b"8000\r\n" + bytes(0x8000) + b"\r\n")
            sent += 0x8000

    scripted.script = script
    with RemoteSession(scripted.url, "m", timeout=20, max_bytes=1 << 20) as session:
        with pytest.raises(LinkError, match="more than"):
            session.run(FEEDS)
    assert sent < 32 << 20


@pytest.mark.parametrize(
    "first", [b"", b"HTTP/1.1 200 OK\r\nContent-Le", b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n"]
)
def test_a_server_that_stalls_or_drips_takes_no_longer_than_the_time_out(scripted, first):
    def script(connection):
        connection.sendall(first)
        for _ in range(200):
            time.sleep(0.05)
            connection.sendall(b"x")

    scripted.script = script
    with RemoteSession(scripted.url, "m") as session:
        begun = time.monotonic()
        with pytest.raises(LinkError, match="longer than 0.3 s"):
            session.run(FEEDS, timeout=0.3)
        assert time.monotonic() - begun < 5


def test_a_connection_is_kept_and_one_that_died_idle_is_replaced_unseen(scripted):
    scripted.script = lambda connection: connection.sendall(reply(GOOD))
    with RemoteSession(scripted.url, "m") as session:
        for _ in range(5):
            assert session.run(FEEDS)["y"].tolist() == [1, 2]
        assert scripted.connections == 1

        def die(connection):
            connection.sendall(reply(GOOD))
            return False

        scripted.script = die
        for _ in range(5):
            assert session.run(FEEDS)["y"].tolist() == [1, 2]
            time.sleep(0.02)
        assert scripted.connections == 5
        scripted.script = lambda connection: connection.sendall(reply(b'{"error":"no"}', "400 Bad"))
        for _ in range(3):  # a refusal costs no connection
            with pytest.raises(RemoteError):
                session.run(FEEDS)
        assert scripted.connections == 6


MLSERVER_MODEL = """
import numpy as np
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceResponse, MetadataTensor

class Affine(MLModel):
    async def load(self):
        self.weights = np.load(self.settings.parameters.uri)
        return True

    async def predict(self, payload):
        x = NumpyCodec.decode_input(payload.inputs[0])
        if x.shape[1] != len(self.weights):
            raise ValueError("wrong width")
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("y", x @ self.weights)])
"""


@pytest.fixture(scope="module")
def mlserver(tmp_path_factory):
    """(URL of a real MLServer, the weights of its model "affine": y = x @ weights)."""
    command = os.environ.get("SHOAL_MLSERVER") or shutil.which("mlserver")
    if not command:
        pytest.skip(
            "MLServer is not installed (pip install mlserver in a venv of its own; SHOAL_MLSERVER=its mlserver)"
        )
    folder = tmp_path_factory.mktemp("mlserver")
    weights = np.random.default_rng(3).random((4, 3)).astype(np.float32)
    np.save(folder / "weights.npy", weights)
    (folder / "affine.py").write_text(MLSERVER_MODEL)
    with contextlib.ExitStack() as stack:
        bound = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
        http, grpc, metrics = (sock.getsockname()[1] for sock in bound)
    settings = {
        "host": "127.0.0.1",
        "http_port": http,
        "grpc_port": grpc,
        "metrics_port": metrics,
        "parallel_workers": 0,
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    about = {
        "name": "affine", "implementation": "affine.Affine", "parameters": {"uri": str(folder / "weights.npy")},
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}],
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 3]}],
    }  # fmt: skip
    (folder / "model-settings.json").write_text(json.dumps(about))
    log = open(folder / "log", "wb")
    process = subprocess.Popen([command, "start", str(folder)], cwd=folder, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{http}"
    try:
        for _ in range(240):
            with contextlib.suppress(OSError):
                if urllib.request.urlopen(f"{url}/v2/models/affine/ready", timeout=2).status == 200:
                    break
            assert process.poll() is None, (folder / "log").read_text()
            time.sleep(0.25)
        else:
            pytest.fail((folder / "log").read_text())
        yield url, weights
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
        log.close()


@pytest.mark.deep
def test_a_real_mlserver_runs_the_tail(mlserver):
    url, weights = mlserver
    x = np.random.default_rng(4).random((5, 4)).astype(np.float32)
    with RemoteSession(url, "affine", timeout=30) as session:
        assert session.ready() and not session.binary  # it lists no such extension
        assert session.inputs["x"].dims == (None, 4) and session.outputs["y"].dtype == np.float32
        with ThreadPoolExecutor(4) as pool:
            for found in pool.map(lambda _: session.run({"x": x}), range(20)):
                np.testing.assert_allclose(found["y"], x @ weights, rtol=1e-5)
        with pytest.raises(RemoteError, match="HTTP"):
            session.run({"x": x[:, :3]})
        with pytest.raises(RemoteError):
            RemoteSession(url, "nothing")
    with pytest.raises(RemoteError, match="404"):
        RemoteSession(url, "affine", "v9")
