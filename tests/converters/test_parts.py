"""A part of a model: what is in it, bit for bit as in the whole, how near its source, and what is refused."""

import json

import numpy as np
import pytest

import shoal
from shoal import cli
from shoal.converters.recipe import Calibration, Format, Recipe
from shoal.runtime import session
from shoal.runtime.bundle import Bundle
from shoal.runtime.card import Card
from shoal.runtime.errors import UsageError
from shoal.runtime.language.part import load_part
from shoal.runtime.model import _places

GPTQ = Recipe("gptq", linear=Format(4), embedding=Format(8), head=Format(8), method="gptq", smooth=True,
              calibration=Calibration(tokens=256, length=64))  # fmt: skip


def weights(path) -> dict[str, bytes]:
    """The bytes of every weight that the graphs of a bundle name."""
    with Bundle.open(path) as bundle:
        places, found = _places(bundle), {}
        data = path.read_bytes()
        for graph in bundle.graphs:
            model = session.read(bundle.bytes(bundle.section("graph", graph.section)), places)
            for tensor in model.tensors:
                if tensor.external:
                    start = places["weights"].offset + tensor.external.offset
                    found[tensor.name] = data[start : start + tensor.external.length]
        return found


@pytest.mark.parametrize("recipe", ["fp32", "int4", GPTQ], ids=["fp32", "int4", "gptq"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])  # the second is tied
def test_parts_are_the_whole_bit_for_bit(tiny, tmp_path, family, recipe):
    def convert(name, **options):
        shoal.convert(tiny / family, tmp_path / name, recipe, check_parity=False, **options)
        return weights(tmp_path / name)

    whole = convert("whole")
    parts = [convert(f"{first}", blocks=f"{first}:{first + 1}") for first in range(3)]
    tied = family == "gemma3"
    ends = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} & whole.keys()
    for index, part in enumerate(parts):
        for name, data in part.items():
            assert whole[name] == data, (index, name)
        inner = {name for name in whole if f"layers.{index}." in name}
        own = {"model.embed_tokens.weight"} if index == 0 else set()
        own |= ends - (set() if tied else {"model.embed_tokens.weight"}) if index == 2 else set()
        assert part.keys() == inner | own
    with Bundle.open(tmp_path / "0") as front, Bundle.open(tmp_path / "2") as rest:
        cards = [Card.from_json(bundle.bytes(bundle.section("card"))) for bundle in (front, rest)]
        assert cards[0].whole == cards[1].whole and [card.span for card in cards] == [range(1), range(2, 3)]
        assert front.find("tokenizer") and not rest.find("tokenizer")
        assert {(g.name, g.role, g.first_block, g.last_block) for g in rest.graphs} == {
            (name, "part", 2, 3) for name in ("part", "part.fp16", "part.int8")
        }


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_logits_of_both_parts_are_the_source_s(tiny, tmp_path, family):
    """Against logits of transformers, cut after one block and before the last."""
    reference = np.load(tiny / family / "reference.npz")
    for cut in (1, 2):
        for name, blocks in (("front", f"0:{cut}"), ("rest", f"{cut}:3")):
            report = shoal.convert(tiny / family, tmp_path / name, "fp32", blocks=blocks, overwrite=True)
            assert len(report.parity["block_errors"]) == (cut if name == "front" else 3 - cut)
            assert report.parity["max_abs_difference"] < 1e-4
            assert (report.parity["top1_agreement"] is None) == (name == "front")
        ids = reference["tokens"]
        with load_part(tmp_path / "front") as front, load_part(tmp_path / "rest") as rest:
            found = rest.forward(0, front.forward(0, ids, 0), 0, rows=len(ids))
        np.testing.assert_allclose(found, reference["logits"], atol=1e-5, rtol=1e-5)


def test_the_mark_tells_checkpoints_and_recipes_apart(tiny, tmp_path):
    marks = set()
    for family, recipe in (("llama", "fp32"), ("llama", "int8"), ("llama3", "fp32")):
        shoal.convert(tiny / family, tmp_path / "part", recipe, blocks=range(1), check_parity=False, overwrite=True)
        with Bundle.open(tmp_path / "part") as bundle:
            marks.add(Card.from_json(bundle.bytes(bundle.section("card"))).whole)
    assert len(marks) == 3


def test_a_rounded_part_is_compared_with_its_baseline(tiny, tmp_path):
    report = shoal.convert(tiny / "llama", tmp_path / "rest", GPTQ, blocks="1:3")
    assert 0 < sum(report.parity["block_errors"]) and len(report.baseline["block_errors"]) == 2
    report = shoal.convert(tiny / "llama", tmp_path / "front", "int4", blocks="0:2")
    assert "relative error" in dict(report.rows)["parity"]


def test_on_the_command_line(tiny_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["convert", str(tiny_folder), "--recipe", "fp32", "--blocks", "1:3", "--no-parity"]) == 0
    assert (tmp_path / "llama.fp32.1-3.shoal").exists()
    assert cli.main(["inspect", "llama.fp32.1-3.shoal"]) == 0
    assert "1 to 2" in capsys.readouterr().out
    assert cli.main(["plan", "llama.fp32.1-3.shoal", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["total"] > 0
    assert cli.main(["run", "llama.fp32.1-3.shoal", "Hello"]) == UsageError.code
    assert "a part of a model and cannot run alone" in capsys.readouterr().err


@pytest.mark.parametrize("blocks", ["3:4", "2:2", "2:1", "1", "-1:2", "0:99999999", range(2, 2), ""])
def test_what_is_no_part_is_refused(tiny_folder, tmp_path, blocks):
    with pytest.raises(UsageError):
        shoal.convert(tiny_folder, tmp_path / "part", "fp32", blocks=blocks)
    assert not (tmp_path / "part").exists()


def test_all_blocks_are_the_whole_and_an_encoder_has_no_parts(tiny, tiny_folder, tmp_path):
    shoal.convert(tiny_folder, tmp_path / "whole", "fp32", blocks="0:3", check_parity=False)
    with shoal.load(tmp_path / "whole", context=32) as model:
        assert not model.card.is_part
    with pytest.raises(UsageError, match="no parts"):
        shoal.convert(tiny / "bert-mean", tmp_path / "part", "fp32", blocks="0:1")
