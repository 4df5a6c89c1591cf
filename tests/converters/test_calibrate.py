"""Calibration on whole models: what moments are of, that rounding with them pays, and texts that cannot be used."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from shoal.converters import architectures
from shoal.converters.calibrate import moments
from shoal.converters.convert import convert
from shoal.converters.recipe import NAMED, Calibration, Format, Recipe
from shoal.converters.sources import open_source
from shoal.converters.text import HELDOUT
from shoal.converters.walk import Scratch, Walk
from shoal.runtime.bundle import Bundle
from shoal.runtime.errors import SourceError

RECIPE = dataclasses.replace(NAMED["int4-gptq"], head=Format(8), calibration=Calibration(tokens=2048, length=64))


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma3", "bert-mean"])
def test_rounding_with_moments_is_nearer_to_the_source(tiny, tmp_path, name):
    report = convert(tiny / name, tmp_path / "out.shoal", RECIPE)
    assert sum(report.parity["block_errors"]) < sum(report.baseline["block_errors"])
    convert(tiny / name, tmp_path / "again.shoal", RECIPE)
    assert (tmp_path / "again.shoal").read_bytes() == (tmp_path / "out.shoal").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.shoal", "out.shoal"]


@pytest.mark.parametrize("name", ["llama", "llama3", "qwen2"])
def test_a_head_is_rounded_with_the_moments_of_its_own_inputs(tiny, tmp_path, name):
    """In four bits; that of llama3 and qwen2 is the embedding too, which then errs more, and the logits less."""
    report = convert(tiny / name, tmp_path / "out.shoal", dataclasses.replace(RECIPE, head=Format(4)))
    assert report.parity["kl"] < 0.9 * report.baseline["kl"]


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma3", "bert-mean"])
def test_smoothing_changes_nothing_but_the_rounding(tiny, tmp_path, name):
    """Channels made very unequal, as large models have them: exact in fp32, nearer in eight bits."""
    folder = shutil.copytree(tiny / name, tmp_path / name)
    tensors, random = load_file(folder / "model.safetensors"), np.random.default_rng(7)
    for key, value in tensors.items():
        if key.endswith("layernorm.weight"):
            tensors[key] = (value + 1) * random.lognormal(0, 1.5, value.shape).astype(np.float32) - 1
    save_file(tensors, folder / "model.safetensors")
    exact = convert(folder, tmp_path / "exact.shoal", Recipe("exact", smooth=True, calibration=RECIPE.calibration))
    assert max(exact.parity["block_errors"]) < 1e-5
    report = convert(
        folder, tmp_path / "int8.shoal", dataclasses.replace(NAMED["int8"], calibration=RECIPE.calibration)
    )
    found, nearest = (sum(parity["block_errors"]) for parity in (report.parity, report.baseline))
    assert found == nearest if name.startswith("bert") else found < 0.85 * nearest


def test_moments_are_of_the_inputs_of_every_product(tiny, tmp_path):
    """Over all texts, whatever their lengths: the first block's, against the embedding and the norm by hand."""
    with open_source(tiny / "llama") as source, Scratch(source, tmp_path) as scratch:
        architecture, card = architectures.find(source)
        random = np.random.default_rng(0)
        walk = Walk(architecture, card, [random.integers(0, card.vocab, length) for length in (1, 40, 64) * 30])
        found = moments(walk, range(0, 1), scratch)
        prefix = "model.layers.0."
        assert set(found) == {
            tuple(f"{prefix}self_attn.{part}_proj.weight" for part in "qkv"), (f"{prefix}self_attn.o_proj.weight",),
            (f"{prefix}mlp.gate_proj.weight", f"{prefix}mlp.up_proj.weight"), (f"{prefix}mlp.down_proj.weight",),
        }  # fmt: skip
        x = source.read("model.embed_tokens.weight")[np.concatenate(walk.hidden, 1)[0]]
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + card.norm_eps)
        x *= source.read(f"{prefix}input_layernorm.weight")
        np.testing.assert_allclose(next(iter(found.values())), x.T @ x, rtol=1e-4, atol=1e-3)
        assert all((np.diag(values) >= 0).all() for values in found.values())


def test_where_a_text_lay_is_not_in_the_bundle(tiny, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text.txt").write_text(HELDOUT)
        text = tmp_path / name / "text.txt"
        convert(tiny / "llama", tmp_path / f"{name}.shoal", RECIPE, calibration_text=text, check_parity=False)
    assert (tmp_path / "one.shoal").read_bytes() == (tmp_path / "two.shoal").read_bytes()
    with Bundle.open(tmp_path / "one.shoal") as bundle:
        assert json.loads(bundle.bytes(bundle.section("recipe")))["calibration"]["text"] == "text.txt"


@pytest.mark.parametrize("text", ["too short", None, b"\xff\xfe not utf-8"])
def test_a_text_that_cannot_be_used(tiny, tmp_path, text):
    path = tmp_path / "text.txt"
    if text is not None:
        path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(SourceError):
        convert(tiny / "llama", tmp_path / "out.shoal", RECIPE, calibration_text=path)
    assert not (tmp_path / "out.shoal").exists()
