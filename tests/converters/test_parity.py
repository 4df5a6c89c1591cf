"""Parity: an exact bundle is found exact, a damaged block is named, and figures survive a file that lies."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.converters import parity
from shoal.converters.recipe import Format, Recipe
from shoal.converters.report import Parity, parity_from_json, parity_to_json
from shoal.converters.text import HELDOUT
from shoal.runtime.errors import BundleError, ConvertError, ShoalError
from shoal.runtime.language.tokens import Tokenizer

TOKENS = 96


def compare(model, graph, folder, **options) -> Parity:
    tokenizer = Tokenizer.from_json(model.source.tokenizer())
    return parity.compare(
        model.source, model.architecture, model.card, model.weights, graph, model.places, tokenizer, HELDOUT, folder,
        **({"tokens": TOKENS} | options),
    )  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen2-yarn", "bert-mean", "bert-cls"])
def test_an_exact_bundle_is_exact(converted, tiny, tmp_path, family):
    model = converted(tiny / family, "fp32")
    events, folder = [], tmp_path / "scratch"
    folder.mkdir()
    found = compare(model, model.graph(), folder, progress=events.append)
    assert found.first_divergent_block is None and len(found.block_errors) == model.card.blocks
    assert max(found.block_errors) < 1e-5 and found.max_abs_difference < 1e-3
    if model.card.task == "embed":
        assert found.cosine == pytest.approx(1, abs=1e-6) and found.kl is None
    else:
        assert found.kl < 1e-7 and found.top1_agreement == 1.0
        assert found.perplexity == pytest.approx(found.source_perplexity, rel=1e-5)
    assert not list(folder.iterdir()), "nothing is left of the scratch files"
    assert [event.done for event in events] == sorted(event.done for event in events)
    assert events[-1].done == events[-1].total


def test_fewer_bits_are_further_away(converted, tiny, tmp_path):
    found = []
    for recipe in ("fp32", "int8", "int4"):
        model = converted(tiny / "llama", recipe)
        found.append(compare(model, model.graph(), tmp_path))
        assert found[-1].first_divergent_block is None
    for measure in ("kl", "mean_abs_difference", "max_abs_difference"):
        assert [getattr(each, measure) for each in found] == sorted(getattr(each, measure) for each in found)
    assert found[0].top1_agreement > found[1].top1_agreement > found[2].top1_agreement > 0.5


@pytest.mark.parametrize("recipe", ["fp32", "int4"])
@pytest.mark.parametrize("family", ["llama", "bert-mean"])
@pytest.mark.parametrize("block", [0, 1, 2])
def test_a_damaged_block_is_named(converted, tiny, tmp_path, family, block, recipe):
    model = converted(tiny / family, recipe)
    graph = model.graph()
    part = {"llama": "model.layers.{}.", "bert-mean": "encoder.layer.{}."}[family].format(block)
    rng = np.random.default_rng(block)
    damaged = 0
    with open(model.path, "r+b") as file:
        for names, matrix in model.weights.matrices.items():
            if names[0].startswith(part):
                values, layout = matrix.values, matrix.layout
                file.seek(values.offset)
                if layout is None:
                    data = rng.standard_normal(values.length // 4, np.float32)
                else:  # codes alone: most bytes are a scale that is no number
                    data = np.frombuffer(file.read(values.length), np.uint8).reshape(layout.panels, -1).copy()
                    data[:, layout.codes_at :] = rng.integers(0, 256, data[:, layout.codes_at :].shape, np.uint8)
                    file.seek(values.offset)
                file.write(data.tobytes())
                damaged += 1
    assert damaged >= 3
    found = compare(model, graph, tmp_path)
    assert found.first_divergent_block == block
    assert all(error < parity.DIVERGED for error in found.block_errors[:block])
    assert found.kl is None or found.kl > 0.05


def test_a_model_that_gives_no_numbers_is_named(converted, tiny, tmp_path):
    model = converted(tiny / "llama", "fp32")
    graph = model.graph()
    norm = model.weights.plain("model.layers.1.input_layernorm.weight")
    with open(model.path, "r+b") as file:
        file.seek(norm.offset)
        file.write(np.full(48, np.nan, np.float32).tobytes())
    with pytest.raises(ConvertError) as caught:
        compare(model, graph, tmp_path)
    assert "converted model" in caught.value.what and "block 1" in caught.value.why


@pytest.mark.parametrize("kernels", ["ours", "missing"])
def test_a_large_graph_is_mapped_as_on_a_device(converted, tiny, tmp_path, monkeypatch, request, kernels):
    if kernels == "missing":
        request.getfixturevalue("without_kernels")
    # Of our own kernels' weights nothing is repacked
    model = converted(tiny / "llama", Recipe("mixed", embedding=Format(8)) if kernels == "ours" else "int4")
    graph = model.graph()
    private = compare(model, graph, tmp_path)
    monkeypatch.setattr(parity, "PRIVATE", 0)
    folder = tmp_path / "scratch"
    folder.mkdir()
    assert compare(model, graph, folder) == private
    assert list(folder.glob("*.cache"))


FIGURES = Parity(9, 100, 0.5, 0.01, (0.1, 0.6), 1, kl=0.2, top1_agreement=0.9)


def test_figures_come_back():
    data = parity_to_json({"parity": FIGURES, "baseline": None})
    assert parity_from_json(data) == {"parity": FIGURES, "baseline": None}
    newer = json.dumps({"parity": FIGURES.to_dict() | {"new": 1}}).encode()
    assert parity_from_json(newer)["parity"] == FIGURES
    with pytest.raises(ValueError):
        parity_to_json({"parity": dataclasses.replace(FIGURES, kl=float("nan"))})


NUMBERS = [None, True, "1", "", [], {}, [None], ["1"], [True], float("nan"), float("inf"), 10**400, -(10**400)]
JUNK = [b"", b"{", b"null", b"[]", b"3", b"\xff", b"[" * 100_000, b'{"parity": 3}', b'{"parity": []}',
        b'{"parity": {}}', b"1" * 5000]  # fmt: skip


@pytest.mark.parametrize("data", JUNK, ids=lambda data: repr(data[:20]))
def test_what_is_not_figures_is_refused(data):
    with pytest.raises(BundleError):
        parity_from_json(data)


@given(st.sampled_from(sorted(FIGURES.to_dict())), st.sampled_from(NUMBERS))
def test_a_wrong_figure_is_named(name, value):
    raw = FIGURES.to_dict() | {name: value}
    default = next(field.default for field in dataclasses.fields(Parity) if field.name == name)
    if (name == "block_errors" and value == []) or (value is None and default is None):
        assert parity_from_json(json.dumps({"parity": raw}).encode())["parity"]
        return
    with pytest.raises(BundleError) as caught:
        parity_from_json(json.dumps({"parity": raw}).encode())
    assert name in caught.value.why


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
                    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from([*FIGURES.to_dict(), "x"]), inner),
                    max_leaves=20))  # fmt: skip
def test_no_json_breaks_it(value):
    try:
        parity_from_json(json.dumps({"parity": value}).encode())
    except ShoalError as error:
        assert isinstance(error, BundleError)
