"""The routing of real text through a trained mixture: what policies and predictors are for shows there alone."""

import json

import numpy as np
import pytest

import shoal
from shoal.converters.text import HELDOUT
from shoal.runtime import kernels
from shoal.runtime.experts.policies import POLICIES, simulate
from shoal.runtime.experts.trace import Trace

pytestmark = pytest.mark.skipif(not kernels.available(), reason=f"no kernels: {kernels.missing()}")
SEQUENCES, LENGTH = 20, 120


@pytest.fixture(scope="module")
def trace(mixture_bundle, tmp_path_factory) -> Trace:
    """Of stretches of the held-out text, spread over all of it."""
    path = tmp_path_factory.mktemp("traces") / "a.trace"
    with shoal.load(mixture_bundle) as model, model.trace_experts(path):
        ids = model.tokenizer.encode(HELDOUT)
        for start in range(0, len(ids) - LENGTH, len(ids) // SEQUENCES):
            model.generate(ids[start : start + LENGTH], max_tokens=1).finish()
    return Trace.load(path)


def test_neighbours_are_as_alike_as_in_training(trace, mixture_folder):
    """What torch counted over all of the text is what the runtime records of a part of it."""
    layers = json.loads((mixture_folder / "figures.json").read_text())["layers"]
    assert trace.ids.shape == (SEQUENCES * LENGTH, len(layers), 4)
    again = (trace.ids[1:, :, :, None] == trace.ids[:-1, :, None]).any(-1)
    again = np.delete(again, trace.starts[1:] - 1, 0).mean((0, 2))
    np.testing.assert_allclose(again, [layer["used_again"] for layer in layers], atol=0.03)


@pytest.mark.parametrize("share", [2, 4])
def test_the_usual_policy_beats_lru_and_not_the_future(trace, share):
    slots = trace.layers * trace.experts // share
    scores = trace.scores.astype(np.float32)
    found = {policy: simulate(trace.ids, trace.experts, slots, policy, scores=scores, starts=trace.starts).total()
             for policy in POLICIES}  # fmt: skip
    assert min(found, key=lambda policy: found[policy]["misses"]) == "belady"
    assert found["hobbit"]["misses"] < found["lru"]["misses"]
    # Slots that hold anybody
    assert found["hobbit"]["hits"] / trace.ids.size > 1 / share
