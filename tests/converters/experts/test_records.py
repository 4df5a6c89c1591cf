"""Records of experts: the bytes that the layout says, rounded as any other matrix, and nothing else."""

import dataclasses
import io
import zlib
from contextlib import closing
from itertools import pairwise

import numpy as np
import pytest

import shoal
from shoal.converters import auto
from shoal.converters.convert import convert
from shoal.converters.experts import records
from shoal.converters.experts.moments import moments
from shoal.converters.experts.names import all_experts
from shoal.converters.recipe import NAMED, Calibration, Format, Recipe
from shoal.converters.sources import open_source
from shoal.converters.weights import Weights
from shoal.runtime.bundle import Bundle
from shoal.runtime.errors import BudgetError, ConvertError, UsageError
from shoal.runtime.experts.layout import Index
from shoal.runtime.kernels import layout


@pytest.fixture
def written(converted, tiny, tmp_path):
    """written(family, recipe, what its experts saw and their gates) -> the model, the index and the bytes."""

    def make(family: str, recipe: Recipe, *seen: np.ndarray):
        model, sink = converted(tiny / family, recipe), io.BytesIO()
        with closing(records.Records(model.source, recipe, model.card, model.architecture.EXPERTS, tmp_path)) as made:
            for block in model.card.routed_blocks:
                made.add(block, *seen)
            made.copy(0, sink)
        return model, made.index, sink.getvalue()

    return make


@pytest.mark.parametrize("format", [Format(8, 128), Format(4), Format(3), Format(2)], ids=str)
@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral"])
def test_a_record_is_an_expert_rounded_as_any_matrix(written, family, format):
    model, index, data = written(family, Recipe("t", experts=format))
    (precision,), (checksums,) = index.precisions, index.checksums
    experts = list(all_experts(model.card, model.architecture.EXPERTS))
    assert len(checksums) == len(experts) == model.card.experts * len(model.card.routed_blocks)
    assert len(data) == precision.record * len(experts) and precision.record % 4096 == 0
    assert (index.blocks, index.experts) == (model.card.routed_blocks, model.card.experts)
    assert Index.from_json(index.to_json()) == index
    for number, (gate, up, down) in enumerate(experts):
        layer, expert = divmod(number, model.card.experts)
        record = data[index.offset(0, layer, expert) :][: precision.record]
        assert zlib.crc32(record) == checksums[number]
        ordinary, sink = Recipe("t", linear=format), io.BytesIO()
        weights = Weights(model.source, ordinary, sink)
        both = weights.matrix((gate, up), gated=True)
        other = weights.matrix((down,))
        assert both.gated and (precision.gate_up, precision.down) == (both.layout, other.layout)
        for stored, at in ((both.values, 0), (other.values, precision.down_at)):
            assert record[at : at + stored.length] == sink.getvalue()[stored.offset :][: stored.length]
        assert not any(record[both.values.length : precision.down_at])
        assert not any(record[precision.down_at + other.values.length :])


def test_a_record_means_the_expert(written):
    """What is read back is near the checkpoint: no two experts and no two matrices are mixed up."""
    model, index, data = written("qwen3_moe", Recipe("t", experts=Format(8)))
    (precision,) = index.precisions
    for number, names in enumerate(all_experts(model.card, model.architecture.EXPERTS)):
        record = data[number * precision.record :]
        parts = [
            layout.dequantize(one, layout.unpack(one, record[at : at + one.bytes]))
            for one, at in ((precision.gate_up, 0), (precision.down, precision.down_at))
        ]
        panels = parts[0].reshape(-1, 2, layout.PANEL, model.card.hidden)
        found = [panels[:, 0].reshape(-1, model.card.hidden), panels[:, 1].reshape(-1, model.card.hidden), parts[1]]
        for name, matrix in zip(names, found, strict=True):
            assert np.abs(matrix - model.source.read(name)).max() < 0.02, name


def test_what_an_expert_saw_decides_how_it_is_rounded(written):
    """Inputs that differ much in size: the outputs that matter lose less, and of an expert that saw nothing too."""
    random = np.random.default_rng(1)
    inputs = (random.standard_normal((512, 64)) * np.geomspace(0.1, 4, 64)).astype("f4")
    inputs = inputs @ np.linalg.qr(random.standard_normal((64, 64)))[0].astype("f4")
    gates = np.where(random.random((512, 4)) < 0.5, random.random((512, 4)), 0).astype("f4")
    gates[:, 3] = 0
    recipe = Recipe("t", experts=Format(2))
    errors = []
    for seen in ((), (inputs, gates)):
        model, index, data = written("mixtral", recipe, *seen)
        (precision,) = index.precisions
        errors.append([])
        for number, (gate, up, _) in enumerate(all_experts(model.card, model.architecture.EXPERTS)):
            record = data[number * precision.record :][: precision.gate_up.bytes]
            found = layout.dequantize(precision.gate_up, layout.unpack(precision.gate_up, record))
            panels = found.reshape(-1, 2, layout.PANEL, 64)
            for at, name in enumerate((gate, up)):
                lost = panels[:, at].reshape(-1, 64) - model.source.read(name)
                errors[-1].append(np.linalg.norm(inputs @ lost.T))
    assert np.mean(errors[1]) < 0.8 * np.mean(errors[0]) and max(errors[1]) < min(errors[0])


def test_moments_are_of_the_tokens_that_chose_the_expert():
    random = np.random.default_rng(2)
    inputs, gate, up = (random.standard_normal(shape).astype("f4") for shape in ((5000, 8), (12, 8), (12, 8)))
    gates = np.where(np.arange(5000) % 3 == 0, random.random(5000), 0).astype("f4")
    into, between = moments(inputs, gates, gate, up, "relu")
    x = inputs * gates[:, None]
    np.testing.assert_allclose(into, x.T @ x, rtol=1e-4, atol=1e-2)
    y = np.maximum(inputs @ gate.T, 0) * (inputs @ up.T) * gates[:, None]
    np.testing.assert_allclose(between, y.T @ y, rtol=1e-4, atol=1e-1)
    # Of four that chose it, with a weight of one, there are too few for eight channels: all others count a hundredth
    few = np.zeros(10, np.float32)
    few[[1, 4, 5, 9]] = 1
    into, between = moments(inputs[:10], few, gate, up, "silu")
    x = inputs[:10] * np.where(few > 0, 1, np.float32(0.1))[:, None]
    np.testing.assert_allclose(into, x.T @ x, rtol=1e-4, atol=1e-4)
    assert np.linalg.matrix_rank(between) > 4
    into, _ = moments(inputs[:10], np.zeros(10, np.float32), gate, up, "gelu")
    np.testing.assert_allclose(into, 0.01 * inputs[:10].T @ inputs[:10], rtol=1e-4, atol=1e-4)


def test_blocks_come_in_order(converted, tiny, tmp_path):
    model = converted(tiny / "qwen2_moe")
    recipe = Recipe("t", experts=Format(4))
    with closing(records.Records(model.source, recipe, model.card, model.architecture.EXPERTS, tmp_path)) as made:
        for block in (1, 2):
            with pytest.raises(UsageError, match=f"block {block} cannot be written"):
                made.add(block)
        for block in (0, 2):
            made.add(block)
            with pytest.raises(UsageError, match=f"block {block} cannot be written"):
                made.add(block)
    assert not list(tmp_path.glob(".shoal-*"))


def test_the_predictor_is_the_next_router_seen_from_here(converted, tiny):
    model = converted(tiny / "qwen2_moe")
    names = model.architecture.EXPERTS
    found = records.predictor(model.weights, model.card, names)
    assert found.shape == (1, 8, 64)  # blocks 0 and 2
    read = model.source.read
    before, after = (read(f"model.layers.{block}.post_attention_layernorm.weight") for block in (0, 2))
    stream = np.random.default_rng(0).standard_normal(64).astype("f4")  # normed, as if the block between added nothing
    logits = read("model.layers.2.mlp.gate.weight") @ (stream * after)
    np.testing.assert_allclose(found[0] @ (stream * before), logits, rtol=1e-3, atol=1e-4)


def test_a_channel_that_a_norm_removes_predicts_nothing(converted, tiny):
    model = converted(tiny / "qwen3_moe")
    original = model.source.read

    def read(name, *rows):
        found = original(name, *rows)
        if name == "model.layers.0.post_attention_layernorm.weight":
            found[[3, 5]] = 0, 1e-6
        return found

    model.source.read = read
    found = records.predictor(model.weights, model.card, model.architecture.EXPERTS)
    assert not found[0][:, [3, 5]].any() and np.isfinite(found).all() and found[1].all()


def test_an_early_router_needs_no_predictor(converted, tiny):
    model = converted(tiny / "smallthinker")
    assert records.predictor(model.weights, model.card, model.architecture.EXPERTS) is None


def test_sections_of_a_bundle(tiny, tmp_path):
    recipe = dataclasses.replace(NAMED["int8"], experts=Format(4), low=Format(2), calibration=Calibration(tokens=512))
    report = convert(tiny / "shoal_moe", tmp_path / "a.shoal", recipe)
    assert report.parity["top1_agreement"] > 0.9 and report.parity["first_divergent_block"] is None
    with Bundle.open(tmp_path / "a.shoal") as bundle:
        index = Index.from_json(bundle.bytes(bundle.section("experts", "index")))
        assert (index.blocks, index.experts) == ((0, 1, 2), 6)
        for at, (precision, bits) in enumerate(zip(index.precisions, (4, 2), strict=True)):
            section = bundle.section("experts", precision.section)
            data = bytes(bundle.bytes(section))
            assert precision.gate_up.bits == precision.down.bits == bits
            assert section.offset % 4096 == 0 and len(data) == precision.record * 18 and section.required == (at == 0)
            records_of = [data[start:stop] for start, stop in pairwise(range(0, len(data) + 1, precision.record))]
            assert tuple(map(zlib.crc32, records_of)) == index.checksums[at]
        assert bundle.section("experts", "predictor").length == 2 * 6 * 64 * 4
    again = convert(tiny / "shoal_moe", tmp_path / "b.shoal", recipe)
    assert (tmp_path / "a.shoal").read_bytes() == (tmp_path / "b.shoal").read_bytes()
    assert again.bits_per_weight == report.bits_per_weight


@pytest.mark.parametrize("recipe", ["int8", "int4", "int4-gptq", "fp32"])
@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe", "olmoe", "mixtral", "smallthinker", "shoal_moe"])
def test_named_recipes_convert_every_family(tiny, tmp_path, family, recipe):
    chosen = dataclasses.replace(NAMED[recipe], calibration=Calibration(tokens=512))
    report = convert(tiny / family, tmp_path / "a.shoal", chosen)
    found = report.parity
    # Random routers stand on the edge: a few tokens of a rounded model go elsewhere
    assert max(found["block_errors"]) < {"fp32": 1e-5, "int8": 0.12}.get(recipe, 0.4)
    assert found["kl"] < {"fp32": 1e-6, "int8": 0.02}.get(recipe, 0.15)
    with Bundle.open(tmp_path / "a.shoal") as bundle:
        assert (bundle.find("experts", "records") is None) == (recipe == "fp32")


def stores(converted, tiny, recipe: Recipe, **changes) -> bool:
    model = converted(tiny / "qwen3_moe")
    return records.stored(recipe, dataclasses.replace(model.card, **changes), model.architecture) is not None


def test_auto_knows_what_a_mixture_needs_before_it_is_made(tiny, tmp_path):
    """To the byte: slots for a token's experts beside what every token reads."""
    convert(tiny / "qwen3_moe", tmp_path / "m.shoal", "int8", check_parity=False)
    with pytest.raises(BudgetError) as refused:
        shoal.load(tmp_path / "m.shoal", memory=1 << 20, context=256)
    needed = refused.value.plan.total
    assert "int8" in auto._fitting(tiny / "qwen3_moe", needed)
    assert "int8" not in auto._fitting(tiny / "qwen3_moe", needed - 1)


def test_what_cannot_be_stored_is_refused(converted, tiny):
    four = Recipe("t", experts=Format(4))
    assert stores(converted, tiny, four) and not stores(converted, tiny, Recipe())
    assert not stores(converted, tiny, four, experts=0)
    with pytest.raises(ConvertError, match="Experts of 40 channels"):
        stores(converted, tiny, four, expert_ffn=40)
    with pytest.raises(ConvertError, match="3072 experts cannot stay in fp32"):
        stores(converted, tiny, Recipe(), experts=1024)
    for pattern in ("*.experts.3.gate_proj.weight", "*.1.*up_proj.weight", "*.2.*down_proj.weight"):
        with pytest.raises(UsageError, match="rules cannot be followed"):
            stores(converted, tiny, dataclasses.replace(four, rules=((pattern, Format(8)),)))
    with pytest.raises(UsageError, match="rules cannot be followed"):
        stores(converted, tiny, dataclasses.replace(four, rules=(("*.down_proj.weight", Format()),)))
    assert stores(converted, tiny, dataclasses.replace(four, rules=(("*.down_proj.weight", Format(8)),)))


def test_stacks_and_parts_of_a_mixture_are_refused(tiny, tmp_path):
    with pytest.raises(UsageError, match="experts are read whole"):
        convert(tiny / "qwen3_moe", tmp_path / "a.shoal", "bitstack")
    with pytest.raises(UsageError, match="A mixture of experts has no parts"):
        convert(tiny / "qwen3_moe", tmp_path / "a.shoal", "int8", blocks="0:2")
    assert not list(tmp_path.iterdir())


def test_a_router_is_never_rounded(tiny):
    with open_source(tiny / "qwen3_moe") as source:
        weights = Weights(source, Recipe("t", linear=Format(4), rules=(("*", Format(8)),)), io.BytesIO())
        assert weights.matrix(("model.layers.0.mlp.gate.weight",), "router").format.bits == 32


@pytest.mark.parametrize("low", [Format(4), Format(8), Format()])
def test_low_is_lower(low):
    with pytest.raises(UsageError, match="low is"):
        Recipe("t", experts=Format(4), low=low)
    with pytest.raises(UsageError, match="low is"):
        Recipe("t", low=Format(2))  # beside experts in fp32
