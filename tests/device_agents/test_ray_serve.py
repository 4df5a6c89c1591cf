"""The tail as a Ray Serve application: batching and protocol without Ray, then on a real local Ray."""

import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from shoal.converters.split.tail import pack_tail
from shoal.device_agents.oip import RemoteSession
from shoal.device_agents.ray_serve import Served
from shoal.runtime.errors import RemoteError, UsageError
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


def test_everybody_gets_their_own_rows_and_equal_shapes_run_together(network):
    path, latents, expected = network
    served = Served(path, "tail")
    sizes = [latents[:1], latents[1:4], latents[4:6]]
    found = served.run([{"latent": part} for part in sizes])
    assert [len(part["label"]) for part in found] == [1, 3, 2] and served.tail.session is not None
    assert np.concatenate([part["label"] for part in found]).tolist() == expected["label"].tolist()
    with pytest.raises(UsageError):
        served.check({"latent": latents.astype(np.float64)})
    with pytest.raises(UsageError):
        served.check({"other": latents})
    served.tail.close()


@pytest.mark.deep
def test_a_real_ray_serves_the_tail(network, monkeypatch):
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray = pytest.importorskip("ray", reason="Ray is not installed (pip install 'ray[serve]')")
    from ray import serve

    from shoal.device_agents.ray_serve import application

    path, latents, expected = network
    with socket.create_server(("127.0.0.1", 0)) as bound:
        port = bound.getsockname()[1]
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        handle = serve.run(application(path, max_wait=0.01), name="tail", route_prefix="/")
        assert handle.infer.remote({"latent": latents}).result()["label"].tolist() == expected["label"].tolist()
        with RemoteSession(f"http://127.0.0.1:{port}", "tail", timeout=60) as session, ThreadPoolExecutor(8) as pool:
            assert session.binary and session.ready() and session.inputs["latent"].dims == (None, 16, 8, 8)
            labels = list(pool.map(lambda i: session.run({"latent": latents[i : i + 1]})["label"][0], [*range(6)] * 8))
            assert labels == expected["label"].tolist() * 8
            with pytest.raises(RemoteError, match="do not fit"):
                session.run({"latent": latents[:, :2]})
    finally:
        serve.shutdown()
        ray.shutdown()
