"""The static graphs of a real model on a Hexagon, or on QNN's emulator of its matrix processor."""

import dataclasses

import numpy as np
import pytest

from shoal.converters.convert import convert
from shoal.converters.recipe import NAMED, Static
from shoal.converters.static.runner import Runner
from shoal.converters.text import CALIBRATION
from shoal.runtime import backends
from shoal.runtime.bundle import Bundle
from shoal.runtime.errors import BackendError
from shoal.runtime.language.tokens import Tokenizer
from shoal.runtime.providers import CPU
from shoal.runtime.static import layout

CHUNK, BLOCKS = 32, 3
pytestmark = pytest.mark.deep


@pytest.fixture(scope="module")
def qnn():
    """A Hexagon, or QNN's emulator of one: pip install onnxruntime-qnn."""
    try:
        return backends.choose("npu:qnn")
    except BackendError as error:
        pytest.skip(f"{error.why} {error.fix}")


@pytest.fixture(
    scope="module", params=[{}, {"shadow": 0.0}, {"shadow": 0.0, "rotate": True}],
    ids=["shadows", "fused", "rotated"],
)  # fmt: skip
def bundle(request, smollm2_gguf, tmp_path_factory):
    path = tmp_path_factory.mktemp("static") / "smollm2.shoal"
    chosen = dataclasses.replace(NAMED["npu"], static=Static(chunks=(CHUNK,), **request.param))
    convert(smollm2_gguf, path, chosen, check_parity=False)
    with Bundle.open(path) as opened:
        yield opened


def test_every_node_runs_there_and_each_graph_agrees_with_the_cpu_within_two_steps(qnn, bundle):
    """A step is one of 8 bits over what the graph gives. A product alone is compared on whole steps of its input: the
    device knows numbers of 16 bits, and rounds some of those that lie near the middle of two steps another way. Where
    four products are one graph it does so before each of them, and twice as much comes of it."""
    runner = Runner(bundle, CHUNK, 2 * CHUNK)
    tokenizer = Tokenizer.from_json(bundle.bytes(bundle.section("tokenizer", "")))
    tokens = np.array(tokenizer.encode(CALIBRATION[:3000])[:CHUNK])
    shadows = {(one.block, one.takes): one for one in runner.index.steps if isinstance(one, layout.Shadow)}
    steps, looked = {}, 0

    def watch(step, values):
        nonlocal looked
        if not isinstance(step, layout.Call) or not step.device or step.block >= BLOCKS:
            return
        name = layout.graph_name(step.name, CHUNK)
        data = bundle.bytes(bundle.section("graph", name))
        opened, placement = backends.open_graph(qnn, data, runner.places, share=1)
        feeds = {key: values[key] for key in step.takes}
        shadow = shadows.get((step.block, step.takes[0]))
        with opened:
            assert placement.share == 1 and CPU not in opened.placement()
            if shadow is not None:
                q = np.clip(np.rint(feeds[shadow.takes] / np.float32(shadow.scale)), -128, 127)
                feeds = {shadow.takes: (q * np.float32(shadow.scale)).astype(np.float32)}
            found, expected = opened.run(feeds), runner.open(name).run(feeds)
        for key in step.gives:
            size = np.abs(expected[key]).max() / 127
            steps[step.name, key] = float(np.abs(found[key] - expected[key]).max() / size)
        looked += 1

    runner.stream(tokens, 0, watch)
    runner.close()
    assert looked >= (7 * BLOCKS if shadows else BLOCKS)
    print({f"{name}: {key}": round(value, 2) for (name, key), value in steps.items()})
    assert max(steps.values()) <= (2 if shadows else 4), steps
