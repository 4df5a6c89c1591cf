"""Prompts on the Hexagon's matrix processor as QNN's library emulates it, in fp16 there, answers on the CPU."""

import json

import numpy as np
import pytest

import shoal
from shoal import cli
from shoal.runtime import backends
from shoal.runtime.errors import BackendError

pytestmark = pytest.mark.deep


@pytest.fixture(scope="module", autouse=True)
def qnn():
    try:
        return backends.choose("npu:qnn")
    except BackendError as error:
        pytest.skip(str(error))


def test_every_node_is_there_and_the_logits_are_the_cpu_s(npu_bundle):
    draw = np.random.default_rng(5)
    with shoal.load(npu_bundle, context=100, backend="npu:qnn") as model:
        assert model.placement.share == 1 and model.placement.provider == "QNNExecutionProvider"
        assert model.prefill.times is None  # an emulator's speed is nobody's
        decoder = model.scheduler.decoder
        for length in (1, 7, 8, 9, 16, 17, 24, 45):
            ids = draw.integers(3, 250, length).tolist()
            found = decoder.take(0, ids, 0, True).copy()
            whole = decoder.forward(0, np.array([ids]), [0], [length - 1])
            assert np.abs(found - whole).max() < 0.02 * np.abs(whole).max()


def test_a_trace_shows_both_processors(capsys, npu_bundle, tmp_path):
    out = tmp_path / "trace.json"
    words = ["bench", str(npu_bundle), "--trace", str(out), "-p", "60", "--backend", "npu:qnn", "--json"]
    assert cli.main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["backend"] == "npu" and set(found["busy_s"]) == {"npu", "cpu"}
    assert found["bound_s"] <= found["seconds"]


def test_run_prompts_there(capsys, npu_bundle):
    assert cli.main(["run", str(npu_bundle), "abc", "--raw", "--backend", "npu:qnn", "--max-tokens", "3"]) == 0
    assert "nodes on QNNExecutionProvider" in capsys.readouterr().err
