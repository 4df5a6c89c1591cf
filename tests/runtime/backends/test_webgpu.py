"""The gpu through WebGPU: a real card where there is one, else SwiftShader."""

import numpy as np
import onnx
import pytest

from shoal.runtime import backends, session
from shoal.runtime.bundle import Bundle
from shoal.runtime.card import Card
from shoal.runtime.errors import BackendError
from shoal.runtime.language.decoder import rotary
from shoal.runtime.model import _places, load
from shoal.runtime.portable import portable
from shoal.runtime.providers import CPU


@pytest.fixture(scope="module")
def int8_bundle(tiny_folder, tmp_path_factory):
    from shoal.converters.convert import convert

    path = tmp_path_factory.mktemp("webgpu") / "tiny.shoal"
    convert(tiny_folder, path, "int8", check_parity=False)
    return path


def in_floats(graph):
    """The graph with activations of its products as they are: MatMulNBits may round them to 8 bits, each provider in
    its way."""
    model = onnx.ModelProto.FromString(graph)
    for node in model.graph.node:
        kept = [attribute for attribute in node.attribute if attribute.name != "accuracy_level"]
        del node.attribute[:]
        node.attribute.extend(kept)
    return model.SerializeToString()


@pytest.mark.deep
def test_a_decoder_agrees_with_the_cpu(webgpu, int8_bundle, tmp_path):
    """Blocks of attention with rotation and feed-forward in 8 bits: 8 tokens at once, then 3, one at a time."""
    with Bundle.open(int8_bundle) as bundle:
        card = Card.from_json(bundle.bytes(bundle.section("card")))
        graph = next(one for one in bundle.graphs if one.name == "decode")
        lowered = portable(bundle.bytes(bundle.section("graph", graph.section)), _places(bundle), tmp_path / "cache")
        plain = in_floats(lowered.graph)
        opened, placement = backends.open_graph(webgpu, plain, lowered.places)
        with opened, session.open_graph(plain, lowered.places) as cpu:
            assert placement.share == 1 and CPU not in opened.placement() and len(placement.nodes) > 40
            tables = [rotary(rope, 16) for rope in card.ropes]
            for (step, there), (_, here) in zip(_steps(opened, card, tables), _steps(cpu, card, tables), strict=True):
                error = np.abs(there - here).max() / np.abs(here).max()
                assert error < 1e-5, (step, error)
        lowered.close()


def _steps(graph, card, tables):
    """(step, logits) of a prompt of 8 tokens and 3 more, the cache growing by what each step gives."""
    past = np.zeros((1, card.kv_heads, 0, card.head_dim), np.float32)
    held = {f"past_{part}_{block}": past for block in card.span for part in ("key", "value")}
    common = {f"cos_{j}": cos for j, (cos, _) in enumerate(tables)}
    common |= {f"sin_{j}": sin for j, (_, sin) in enumerate(tables)}
    done = 0
    for count in (8, 1, 1, 1):
        tokens = np.arange(done, done + count, dtype=np.int64)[None] * 7 + 3
        done += count
        feeds = {"tokens": tokens, "last": np.array([done - 1], np.int32), "total": np.array([done], np.int32)}
        found = graph.run({**feeds, "rows": np.arange(count), **common, **held})
        held = {name.replace("present", "past"): array for name, array in found.items() if name.startswith("present")}
        yield done, found["logits"]


@pytest.mark.deep
def test_a_model_says_which_nodes_fell_back_or_fail(webgpu, minilm_bundle):
    with pytest.raises(BackendError) as refused:
        load(minilm_bundle, backend="gpu:webgpu", require={"gpu": 0.5})
    assert "MultiHeadAttention stops at an input key_padding_mask" in refused.value.why
    assert {node.op for node in refused.value.placement.fallen} == {"MultiHeadAttention", "Cast", "Shape"}


def test_a_language_model_s_cache_is_not_there_yet(webgpu, int8_bundle):
    with pytest.raises(BackendError, match="cannot run on the gpu yet"):
        load(int8_bundle, backend="gpu:webgpu", context=32)
