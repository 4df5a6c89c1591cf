"""What is simulated is what runs: a store's counters beside the simulator's, on the trace that the run recorded."""

from pathlib import Path

import numpy as np
import pytest

import shoal
from shoal.converters.convert import convert
from shoal.runtime import kernels
from shoal.runtime.experts.policies import POLICIES, simulate
from shoal.runtime.experts.store import Options
from shoal.runtime.experts.trace import Trace

pytestmark = pytest.mark.skipif(not kernels.available(), reason=f"no kernels: {kernels.missing()}")
TINY = Path(__file__).parents[2] / "data" / "tiny" / "qwen3_moe"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    """3 layers of 8 experts, random."""
    path = tmp_path_factory.mktemp("experts") / "mixture.shoal"
    convert(TINY, path, "int8", check_parity=False)
    return path


@pytest.mark.parametrize(
    ("kind", "slots"), [("bundle", 4), ("bundle", 7), ("bundle", 12), ("mixture_bundle", 16), ("mixture_bundle", 32)]
)
@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "belady"])
def test_the_store_reads_what_the_simulator_reads(kind, slots, policy, tmp_path, request):
    path = request.getfixturevalue(kind)
    with shoal.load(path, context=100, experts=Options(policy=policy, guess=False, threads=1)) as model:
        model.set_entries(slots)
        before = model.experts.counters()
        with model.trace_experts(tmp_path / "a"):
            for prompt in (5, 9):  # a token, so that every step is one token's
                model.generate([prompt], max_tokens=40, ignore_end=True).finish()
        counted = model.experts.counters().since(before)
    trace = Trace.load(tmp_path / "a")
    assert len(trace.starts) == 2 and trace.scores is not None
    scores = trace.scores.astype(np.float32)
    found = simulate(trace.ids, trace.experts, slots, policy, scores=scores, starts=trace.starts)
    assert counted.hits + counted.misses == found.uses.sum()
    # A trace has scores in fp16, and the trained model has some that differ by less: mrs, alone, decides by scores
    near = 0.01 if (kind, policy) == ("mixture_bundle", "mrs") else 0
    assert abs(counted.misses - found.misses.sum()) <= near * found.uses.sum()
