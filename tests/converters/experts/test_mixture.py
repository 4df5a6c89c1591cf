"""What a mixture computes: the dense model it was cut from, and the same from records as from ordinary matrices."""

import io
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from shoal.converters.experts import records
from shoal.converters.experts.names import all_experts
from shoal.converters.graph import GraphBuilder
from shoal.converters.recipe import Format, Recipe
from shoal.converters.walk import Scratch, Stored, Walk
from shoal.runtime import session
from shoal.runtime.kernels import layout

EXPERTS = 4
FAMILIES = ("qwen2_moe", "qwen3_moe", "olmoe", "mixtral", "smallthinker", "shoal_moe")


@pytest.fixture
def cut(tiny, tmp_path):
    """cut(**config): the tiny llama, its feed-forwards cut into four experts each and routers of zeros."""

    def make(**config):
        folder = tmp_path / "cut"
        shutil.copytree(tiny / "llama", folder)
        said = json.loads((folder / "config.json").read_text()) | {
            "model_type": "shoal_moe", "num_experts": EXPERTS, "num_experts_per_tok": EXPERTS,
            "moe_intermediate_size": 72 // EXPERTS, "routed_scaling_factor": float(EXPERTS),
        }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(said | config))
        found = {}
        for name, value in load_file(tiny / "llama" / "model.safetensors").items():
            if ".mlp." not in name:
                found[name] = value
                continue
            part = name.split(".mlp.")[1]
            for expert, rows in enumerate(np.split(value, EXPERTS, axis=part.startswith("down"))):
                found[name.replace(part, f"experts.{expert}.{part}")] = np.ascontiguousarray(rows)
        total = EXPERTS + config.get("zero_experts", 0)
        for block in range(3):
            found[f"model.layers.{block}.mlp.gate.weight"] = np.zeros((total, 48), np.float32)
        save_file(found, folder / "model.safetensors")
        return folder

    return make


def logits(model, tokens: np.ndarray) -> np.ndarray:
    with model.open() as opened:
        return model.step(opened, tokens[None], [0], {})[0][0]


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("early", [False, True])
def test_all_experts_are_the_dense_model(converted, tiny, cut, normalised, early):
    """Equal logits, and a scale of as many as there are, make every weight one."""
    with np.load(tiny / "llama" / "reference.npz") as stored:
        tokens, expected = stored["tokens"], stored["logits"]
    found = logits(converted(cut(norm_topk_prob=normalised, early_routing=early)), tokens)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_of_equals_the_first_are_chosen(converted, tiny, cut):
    """Zero experts come last: with four places of six they get none; with the others gone, all of them."""
    with np.load(tiny / "llama" / "reference.npz") as stored:
        tokens, expected = stored["tokens"], stored["logits"]
    folder = cut(zero_experts=2, routed_scaling_factor=6.0)
    np.testing.assert_allclose(logits(converted(folder), tokens), expected, atol=1e-4)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 2}))
    two = logits(converted(folder), tokens)
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if any(f"experts.{expert}.down_proj" in name for expert in (2, 3)):
            tensors[name] = np.zeros_like(tensors[name])
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    np.testing.assert_allclose(two, logits(converted(folder), tokens), atol=1e-4)
    assert np.abs(two - expected).max() > 0.1


def test_chosen_zeros_leave_the_stream_alone(converted, cut):
    """A router that sums its input sends a positive stream to the zeros, whatever the weights are multiplied by."""
    folder = cut(zero_experts=2, num_experts_per_tok=2)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.post_attention_layernorm.weight"][:] = 1
    tensors["model.layers.1.mlp.gate.weight"][:] = np.where(np.arange(EXPERTS + 2) < EXPERTS, -1, 1)[:, None]
    save_file(tensors, folder / "model.safetensors")
    # Attention changes it little; of its negative everything goes to the others
    stream = np.abs(np.random.default_rng(1).standard_normal((1, 5, 48))).astype("f4") * 100
    config, found = json.loads((folder / "config.json").read_text()), []
    for scale, sign in ((1.0, 1), (1000.0, 1), (1.0, -1), (1000.0, -1)):
        (folder / "config.json").write_text(json.dumps(config | {"routed_scaling_factor": scale}))
        model = converted(folder)
        with model.open(range(1, 2)) as opened:
            found.append(model.step(opened, sign * stream, [0], {})[0])
    np.testing.assert_array_equal(found[0], found[1])
    assert np.abs(found[2] - found[3]).max() > 1


class Rounded:
    """A source whose experts are what records hold."""

    def __init__(self, source, replaced: dict[str, np.ndarray]):
        self.source, self.replaced = source, replaced

    def tensors(self):
        return self.source.tensors()

    def read(self, name, start=0, stop=None):
        found = self.replaced.get(name)
        return self.source.read(name, start, stop) if found is None else found[start:stop].copy()


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_records_compute_what_matrices_of_their_values_do(converted, tiny, tmp_path, family, bits):
    """Block by block, each from the same stream, so that no router meets another input. What differs is that the
    kernels round activations to 8 bits."""
    recipe = Recipe("t", experts=Format(bits))
    model = converted(tiny / family, recipe)
    card, names = model.card, model.architecture.EXPERTS
    store, sink, replaced = records.Records(model.source, recipe, card, names, tmp_path), io.BytesIO(), {}
    for block in card.routed_blocks:
        store.add(block)
    store.copy(0, sink)
    data, (precision,) = sink.getvalue(), store.precisions
    for number, (gate, up, down) in enumerate(all_experts(card, names)):
        record = data[number * precision.record :]
        both, last = record[: precision.gate_up.bytes], record[precision.down_at :][: precision.down_bytes]
        if precision.gathered:
            both, last = layout.ungather_up(precision.gate_up, both), layout.ungather_down(precision.down, last)
        else:
            last = layout.unpack(precision.down, last)
        parts = [
            layout.dequantize(precision.gate_up, layout.unpack(precision.gate_up, both)),
            layout.dequantize(precision.down, last),
        ]
        panels = parts[0].reshape(-1, 2, layout.PANEL, card.hidden)
        replaced[gate], replaced[up] = (panels[:, at].reshape(-1, card.hidden) for at in (0, 1))
        replaced[down] = parts[1]
    with np.load(tiny / family / "reference.npz") as stored:
        tokens = stored["tokens"]
    walk, expected = (Walk(model.architecture, card, [tokens]) for _ in range(2))
    model.weights.records = store
    try:
        for block in range(card.blocks):
            before = expected.hidden[0]
            with Scratch(Rounded(model.source, replaced), tmp_path) as scratch:
                expected.advance(range(block, block + 1), scratch)
            graph = walk.graph(range(block, block + 1), model.weights)
            model.file.flush()
            walk.advance(range(block, block + 1), Stored(model.weights, model.places, repack=True))
            kinds = [node.op for node in session.read(graph.serialize(), model.places).nodes if node.domain == "shoal"]
            assert kinds.count("Experts") == int(block in card.routed_blocks)
            change = np.linalg.norm(expected.hidden[0] - (0 if before.ndim < 3 else before))
            assert np.linalg.norm(walk.hidden[0] - expected.hidden[0]) < 0.015 * change, block
            walk.hidden, walk.routing = list(expected.hidden), list(expected.routing)
    finally:
        store.close()


def test_an_early_router_speaks_before_attention(converted, tiny):
    model = converted(tiny / "smallthinker", Recipe("t", experts=Format(4)))
    g = GraphBuilder("t", model.weights)
    model.architecture.build(g, model.card, range(1, 2))
    model.file.flush()
    nodes = session.read(g.serialize(), model.places).nodes
    kinds = [node.op for node in nodes]
    assert kinds.index("RouteExperts") < kinds.index("CachedAttention") < kinds.index("Experts")
    router, route, experts = (next(node for node in nodes if node.op == kind)
                              for kind in ("FusedMatMul", "RouteExperts", "Experts"))  # fmt: skip
    assert router.inputs[0] == "hidden" == route.inputs[0]  # neither normed nor changed by attention
    assert route.inputs[1] == experts.inputs[1] and route.integers["layer"] == experts.integers["layer"] == 1
    assert "hidden" not in [name for node in nodes if node not in (router, route) for name in node.inputs]
