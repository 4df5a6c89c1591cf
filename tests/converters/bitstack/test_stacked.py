"""Checkpoints as stacks: every size is a model, the same bytes every time, and a conversion that was killed goes on."""

import signal
import subprocess
import sys

import numpy as np
import pytest

import shoal
from shoal.converters import architectures, parity
from shoal.converters.convert import convert
from shoal.converters.quality import perplexity
from shoal.converters.recipe import Calibration, Format, Ladder, Recipe, load
from shoal.converters.sources import open_source
from shoal.converters.text import HELDOUT
from shoal.converters.walk import Scratch, Walk
from shoal.runtime import kernels
from shoal.runtime.bitstack.layout import HEADER, Index, StackFormat, reconstruct
from shoal.runtime.bitstack.stack import read_index
from shoal.runtime.bundle import Bundle
from shoal.runtime.errors import BackendError, BudgetError, BundleError, UsageError
from shoal.runtime.kernels.layout import LinearFormat, dequantize, unpack

pytestmark = pytest.mark.skipif(not kernels.available(), reason=f"no kernels: {kernels.missing()}")
FEW = Calibration(tokens=512, length=128)
PLAIN = dict(linear=Format(4), embedding=Format(8), head=Format(8), method="bitstack", calibration=FEW)
BLOCKS = Recipe("blocks", ladder=Ladder(blocks=2), **PLAIN)
RUNGS = Recipe("rungs", ladder=Ladder(first=0, rungs=(Format(2), Format(4)), blocks=2), **PLAIN)
FINE = Recipe("fine", ladder=Ladder(rungs=(Format(2, 64), Format(2), Format(3), Format(4)), blocks=1), **PLAIN)
BOTH = Recipe("both", ladder=Ladder(rungs=(Format(3), Format(4)), blocks=1), **PLAIN)


def weights_of(bundle: Bundle, index: Index, counts: list[int]) -> list[np.ndarray]:
    """Each matrix as its first steps say it, in numpy from the bundle's bytes."""
    data, places, found = bundle.bytes(bundle.section("stack", "blocks")), {}, []
    for entry in index.entries():
        places[entry.matrix, entry.step] = bytes(data[entry.offset + 64 : entry.offset + entry.length])
    for matrix, (one, count) in enumerate(zip(index.matrices, counts, strict=True)):
        base, payloads = None, []
        for step in one.live(count):
            format = one.steps[step]
            if isinstance(format, LinearFormat):
                flat = LinearFormat(format.inputs, format.outputs, format.bits, format.group, format.span)
                base = dequantize(flat, unpack(format, places[matrix, step]))
            else:
                payloads.append(places[matrix, step])
        rank = next(step.rank for step in one.steps if isinstance(step, StackFormat))
        found.append(reconstruct(StackFormat(one.inputs, one.outputs, rank, one.rotated), payloads, base))
    return found


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen2"])
@pytest.mark.parametrize("recipe", [BLOCKS, RUNGS, BOTH, FINE], ids=lambda recipe: recipe.name)
def test_a_stack_at_any_size_is_the_model_of_its_weights(tiny, tmp_path, family, recipe):
    """Logits of the floor, of a mixed size and of all are those of the source's graph over the weights that the entries
    say, but for how activations are rounded."""
    convert(tiny / family, tmp_path / "m.shoal", recipe, check_parity=False)
    tokens = np.arange(3, 40, dtype=np.int64)
    with Bundle.open(tmp_path / "m.shoal") as bundle, shoal.load(tmp_path / "m.shoal") as model:
        index = read_index(bundle)
        assert index.sort == "proxy" and set(index.orders) == {"random"} and index.counts(index.floor)[0] > 0
        errors = []
        for entries in (index.floor, (index.floor + len(index.order)) // 2, len(index.order)):
            model.set_entries(entries)
            model.scheduler.cache.held[0].clear()
            found = model.scheduler.decoder.forward(0, tokens[None], [0], list(range(len(tokens)))).copy()
            with open_source(tiny / family) as source:
                expected = logits_of(source, weights_of(bundle, index, index.counts(entries)), recipe, tokens, tmp_path)
                exact = logits_of(source, None, recipe, tokens, tmp_path)
            spread = expected.std()
            assert np.abs(found - expected).mean() < 0.05 * spread
            errors.append(np.square(expected - exact).mean())
        assert errors[2] < errors[1] < errors[0]


def logits_of(source, weights, recipe: Recipe, tokens: np.ndarray, folder) -> np.ndarray:
    """The source's logits, with `weights` in place of what the recipe stacks."""
    architecture, card = architectures.find(source)
    exact = Recipe(linear=Format(), embedding=recipe.embedding, head=recipe.head)
    with Scratch(source, folder, exact) as scratch:
        if weights is not None:
            scratch.weights.read = replaced(scratch.weights, weights)
        walk = Walk(architecture, card, [tokens])
        walk.advance(range(card.blocks), scratch)
        with walk.end(scratch) as head:
            return head.run(walk.feeds(walk.hidden[0], range(0)) | {"rows": np.arange(len(tokens))})["logits"]


def replaced(store, weights):
    """A reader of tensors for which a stack's matrices, in the order in which graphs ask for them, are their own."""
    read, left, rows = store.read, list(weights), {}

    def instead(name, start=0, stop=None):
        if name not in rows:
            names = group_of(name)
            if names is None:
                return read(name, start, stop)
            if names[0] == name:
                whole = left.pop(0)
                counts = [store.shapes[one][0] for one in names]
                if names[0].endswith("gate_proj.weight") and counts[0] % 16 == 0:
                    whole = whole.reshape(-1, 2, 16, whole.shape[1]).swapaxes(0, 1).reshape(whole.shape)
                for one, part in zip(names, np.split(whole, np.cumsum(counts)[:-1]), strict=True):
                    rows[one] = part
        return rows[name][start:stop]

    return instead


def group_of(name: str) -> list[str] | None:
    for group in (("q", "k", "v"), ("o",), ("gate", "up"), ("down",)):
        for part in group:
            if name.endswith(f".{part}_proj.weight"):
                return [name.replace(f".{part}_proj", f".{one}_proj") for one in group]
    return None


def test_the_same_source_gives_the_same_bytes_and_a_curve(tiny, tmp_path):
    for name in ("a", "b"):
        convert(tiny / "llama", tmp_path / name, RUNGS)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"], "nothing else is left"
    with Bundle.open(tmp_path / "a") as bundle:
        index = read_index(bundle)
    assert len(index.curve) == 9 and index.curve[-1][0] == len(index.order)
    with shoal.load(tmp_path / "a") as model:
        rows = parity.stretches(model.tokenizer, model.card, HELDOUT, 1024)
        assert perplexity(model, rows) == pytest.approx(index.curve[-1][1], rel=1e-2), "as a device finds it"


@pytest.mark.parametrize("sort", ["average", "greedy"])
def test_measured_orders_are_stored_with_the_others(tiny, tmp_path, sort):
    ladder = Ladder(blocks=2, sort=sort)
    convert(tiny / "llama", tmp_path / "m", Recipe("measured", ladder=ladder, **PLAIN), check_parity=False)
    with Bundle.open(tmp_path / "m") as bundle:
        index = read_index(bundle)
    assert index.sort == sort and set(index.orders) == {"proxy", "random", "average", "greedy"} - {sort}


# Killed at the third matrix
CHILD = """
import os, signal, sys
from shoal.converters.bitstack import work
from shoal.converters.convert import convert
save = work.Work.save
def counted(self, matrix, payloads, kept):
    save(self, matrix, payloads, kept)
    if matrix == 2:
        os.kill(os.getpid(), getattr(signal, sys.argv[3]))
work.Work.save = counted
convert(sys.argv[1], sys.argv[2], "bitstack", check_parity=False)
"""


@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT"])
def test_a_conversion_that_was_killed_goes_on(tiny, tmp_path, monkeypatch, name):
    out = tmp_path / "m.shoal"
    done = subprocess.run([sys.executable, "-c", CHILD, str(tiny / "llama"), str(out), name], timeout=120,
                          capture_output=True)  # fmt: skip
    assert done.returncode == -getattr(signal, name) and not out.exists()
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / ".m.shoal.stack").glob("*.matrix")}
    assert set(kept) == {"0.matrix", "1.matrix", "2.matrix"}
    made = []
    from shoal.converters.bitstack import work

    save = work.Work.save
    monkeypatch.setattr(work.Work, "save", lambda self, at, *rest: (made.append(at), save(self, at, *rest)))
    convert(tiny / "llama", out, "bitstack", check_parity=False)
    assert made == list(range(3, 12)), "what was done is not done again"
    convert(tiny / "llama", tmp_path / "whole.shoal", "bitstack", check_parity=False)
    assert out.read_bytes() == (tmp_path / "whole.shoal").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.shoal", "whole.shoal"]


def test_what_cannot_be_stacked_is_refused(tiny, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="does not generate"):
        convert(tiny / "bert-mean", tmp_path / "m", "bitstack")
    with pytest.raises(UsageError, match="a part"):
        convert(tiny / "llama", tmp_path / "m", "bitstack", blocks="0:1")
    monkeypatch.setattr(kernels, "available", lambda: False)
    with pytest.raises(BackendError, match="cannot be made here"):
        convert(tiny / "llama", tmp_path / "m", "bitstack")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("text, names", [
    ("method = 'bitstack'", "ladder"), ("[ladder]\nblocks = 2", "ladder"),
    ("method = 'bitstack'\n[ladder]\nblocks = 99", "blocks"), ("method = 'bitstack'\n[ladder]\nfirst = 5", "first"),
    ("method = 'bitstack'\n[ladder]\nrungs = [{bits = 4}, {bits = 2}]", "rise"),
    ("method = 'bitstack'\n[ladder]\nsort = 'best'", "sort"), ("method = 'bitstack'\n[ladder]\nrungs = 3", "rungs"),
    ("method = 'bitstack'\n[ladder]\nrank = 17", "rank"), ("method = 'bitstack'\nladder = 1", "ladder"),
    ("method = 'bitstack'\n[ladder]\nfirst = 0", "first"),
    ("method = 'bitstack'\nsmooth = true\n[ladder]\nblocks = 4", "smooth"),
])  # fmt: skip
def test_a_recipe_that_makes_no_sense_is_refused(tmp_path, text, names):
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(UsageError, match=names):
        load(tmp_path / "r.toml")


def test_a_recipe_in_toml(tmp_path):
    (tmp_path / "r.toml").write_text(
        "method = 'bitstack'\n[ladder]\nfirst = 0\nblocks = 3\nrungs = [{bits = 3, group = 64}]\n"
    )
    recipe = load(tmp_path / "r.toml")
    assert recipe.ladder == Ladder(first=0, rungs=(Format(3, 64),), blocks=3)
    assert recipe.stacks("model.layers.0.mlp.down_proj.weight", "linear")
    assert not recipe.stacks("lm_head.weight", "head")


def test_auto_takes_what_is_best_at_a_size(tiny, tmp_path):
    report = convert(tiny / "llama", tmp_path / "m.shoal", "auto", memory=28 << 20, check_parity=False)
    assert report.tried is not None and min(report.tried, key=report.tried.get) == report.recipe
    assert {"hybrid", "bitstack"} <= set(report.tried) and len(report.tried) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["m.shoal"]
    with shoal.load(tmp_path / "m.shoal", memory=28 << 20) as model:
        assert model.plan.total <= 28 << 20
    with pytest.raises(UsageError, match="exists"):
        convert(tiny / "llama", tmp_path / "m.shoal", "auto", memory=24 << 20)
    with pytest.raises(BudgetError):
        convert(tiny / "llama", tmp_path / "n.shoal", "auto", memory=1 << 20)
    with pytest.raises(UsageError, match="no memory"):
        convert(tiny / "llama", tmp_path / "n.shoal", "auto")
    with pytest.raises(UsageError, match="generates no text"):
        convert(tiny / "bert-mean", tmp_path / "n.shoal", "auto", memory=24 << 20)
    with pytest.raises(UsageError, match="auto"):
        convert(tiny / "llama", tmp_path / "n.shoal", "int4", memory=24 << 20)


def test_a_bundle_whose_entries_were_exchanged_is_refused(tiny, tmp_path):
    """Two blocks of one matrix have the same size: only their headers tell them apart."""
    convert(tiny / "llama", tmp_path / "m.shoal", BLOCKS, check_parity=False)
    with Bundle.open(tmp_path / "m.shoal") as bundle:
        index, at = read_index(bundle), bundle.section("stack", "blocks").offset
    first, second = (next(e for e in index.entries() if (e.matrix, e.step) == (0, step)) for step in (0, 1))
    data = bytearray((tmp_path / "m.shoal").read_bytes())
    a, b = (slice(at + e.offset, at + e.offset + e.length) for e in (first, second))
    data[a], data[b] = data[b], data[a]
    (tmp_path / "m.shoal").write_bytes(data)
    with pytest.raises(BundleError, match="another one"):
        shoal.load(tmp_path / "m.shoal")


def test_a_rung_is_what_the_recipe_of_its_bits_makes(tiny_folder, tmp_path):
    """Bit for bit: at a level where every matrix is a rung a hybrid is that recipe's model."""
    weights = {}
    for bits in (3, 4):
        convert(tiny_folder, tmp_path / "whole.shoal", f"int{bits}-gptq", check_parity=False, overwrite=True)
        weights[bits] = (tmp_path / "whole.shoal").read_bytes()
    convert(tiny_folder, tmp_path / "hybrid.shoal", "hybrid", check_parity=False)
    with Bundle.open(tmp_path / "hybrid.shoal") as bundle:
        index, start = read_index(bundle), bundle.section("stack", "blocks").offset
    blocks = (tmp_path / "hybrid.shoal").read_bytes()[start:]
    rungs = 0
    for entry in index.entries():
        step = index.matrices[entry.matrix].steps[entry.step]
        if isinstance(step, LinearFormat) and step.bits in weights:
            payload = blocks[entry.offset + HEADER.size : entry.offset + entry.length].rstrip(b"\0")
            assert payload in weights[step.bits]
            rungs += 1
    assert rungs == 2 * len(index.matrices)
