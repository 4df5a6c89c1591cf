"""`shoal experts`: a trace of a real mixture, its analysis, and what is refused."""

import json

import numpy as np
import pytest

from shoal import cli
from shoal.converters.convert import convert
from shoal.runtime import kernels
from shoal.runtime.experts.trace import Trace

pytestmark = pytest.mark.skipif(not kernels.available(), reason=f"no kernels: {kernels.missing()}")


@pytest.fixture(scope="module")
def bundle(tiny_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("experts") / "mixture.shoal"
    convert(tiny_folder.parent / "qwen3_moe", path, "int8", check_parity=False)
    return path


@pytest.fixture(scope="module")
def trace(bundle, tmp_path_factory):
    path = tmp_path_factory.mktemp("traces") / "a.trace"
    words = ["--inputs", "--tokens", "300", "--length", "60", "--context", "100"]
    assert cli.main(["experts", "trace", str(bundle), "-o", str(path), *words]) == 0
    return path


def shoal(capsys, *arguments, code=0):
    status = cli.main(["experts", *(str(word) for word in arguments)])
    said = capsys.readouterr()
    assert status == code, said.err
    return said.out, said.err


def test_a_text_is_traced_sequence_by_sequence(trace):
    found = Trace.load(trace)
    assert found.tokens == 300 and found.starts.tolist() == [0, 60, 120, 180, 240]
    assert (found.layers, found.experts, found.top_k) == (3, 8, 2) and found.record > 0
    # The chosen are those of the largest scores, the heaviest first
    best = np.argsort(-found.scores.astype(np.float32), axis=-1, kind="stable")[..., :2]
    assert (best == found.ids).mean() > 0.99
    assert found.inputs.shape[:2] == (300, 3)


def test_answers_are_traced(capsys, bundle, tmp_path):
    out = tmp_path / "a.trace"
    words = ["--prompt", "Hello", "--prompt", "You", "--max-tokens", 8, "--context", 64, "--json"]
    said = json.loads(shoal(capsys, "trace", bundle, "-o", out, *words)[0])
    assert said["sequences"] == 2 and said["tokens"] >= 4
    assert Trace.load(out).inputs is None


def test_an_analysis_is_shown_and_is_json(capsys, bundle, trace):
    words = ["analyze", trace, "--bundle", bundle, "--bandwidth", "2GB/s", "--speed", 50]
    shown, _ = shoal(capsys, *words)
    assert "gate" in shown and "belady" in shown and "this model: with half of the experts" in shown
    assert "not tried" not in shown
    found = json.loads(shoal(capsys, *words, "--json", "--policies", "lru,belady", "--predictors", "gate")[0])
    assert found["bandwidth"] == 2e9 and found["compute_seconds"] == 0.02 and found["record_bytes"] > 0
    assert {run["predictor"] for run in found["runs"]} == {"none", "gate"}
    recall = {one["name"]: one["recall"] for one in found["predictors"]}
    assert recall["gate"] > 2 / 8  # more than chance, though the first layer is never guessed
    without, _ = shoal(capsys, "analyze", trace, "--all")
    assert "gate: not tried" in without and len(without) > len(shown)


def test_an_accelerator_s_share_is_computed_from_stated_costs(capsys, trace):
    words = ["analyze", trace, "--policies", "lru", "--predictors", "none"]
    shown, _ = shoal(capsys, *words, "--second", "cpu=900,accelerator=100,link=400")
    assert "by the costs that were stated, not measured" in shown and "1800.0" in shown  # two experts on the CPU
    found = json.loads(shoal(capsys, *words, "--second", "link=400,cpu=900,accelerator=100", "--json")[0])["second"]
    assert found[-1]["hit_rate"] == 1 and found[-1]["split_seconds"] == pytest.approx(200e-6)
    assert "stated" not in shoal(capsys, *words)[0]
    for wrong in ("cpu=1,link=1", "cpu=1,accelerator=1,link=-1", "cpu=1,accelerator=1,link=1,disk=1", "cpu=fast", ""):
        assert "in microseconds" in shoal(capsys, "analyze", trace, "--second", wrong, code=2)[1]


def test_a_predictor_is_written(capsys, trace, tmp_path):
    shoal(capsys, "predictor", trace, "-o", tmp_path / "a.npy")
    found = np.load(tmp_path / "a.npy")
    assert found.dtype == np.float32 and found.shape[:2] == (2, 8)


def test_what_cannot_be_is_refused(capsys, bundle, trace, tiny_bundle, tmp_path):
    assert "no experts" in shoal(capsys, "trace", tiny_bundle, "-o", tmp_path / "a", code=2)[1]
    assert "both given" in shoal(
        capsys, "trace", bundle, "-o", tmp_path / "a", "--text", "a", "--prompt", "b", code=2
    )[1]  # fmt: skip
    assert "cannot be read" in shoal(capsys, "trace", bundle, "-o", tmp_path / "a", "--text", tmp_path / "b", code=2)[1]
    assert "no trace" in shoal(capsys, "analyze", bundle, code=2)[1]
    assert "not a size" in shoal(capsys, "analyze", trace, "--bandwidth", "fast", code=2)[1]
    assert "tokens/s" in shoal(capsys, "analyze", trace, "--speed", 0, code=2)[1]
    assert "lru, lfu" in shoal(capsys, "analyze", trace, "--policies", "best", code=2)[1]
    shoal(capsys, "analyze", trace, "--predictors", "best", code=2)
    shoal(capsys, "analyze", trace, "--bundle", tiny_bundle, code=5)
    assert not list(tmp_path.iterdir())
