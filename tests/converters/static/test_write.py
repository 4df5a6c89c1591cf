"""Prefill in fixed chunks, as a bundle has it: the steps give what the decode graph gives, for any length."""

import dataclasses
import json
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from shoal import cli
from shoal.converters.convert import convert
from shoal.converters.recipe import NAMED, Static, load
from shoal.converters.static.runner import Runner
from shoal.runtime import session
from shoal.runtime.bundle import Bundle
from shoal.runtime.errors import ConvertError, UsageError
from shoal.runtime.language.cache import Cache
from shoal.runtime.language.decoder import Decoder
from shoal.runtime.static import layout

CHUNK, WHOLE = 8, 64
LENGTHS = (1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 1, 3 * CHUNK)
TOKENS = np.random.default_rng(0).integers(3, 250, max(LENGTHS))
FAMILIES = ("llama", "qwen2", "gemma3")


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """made(family, recipe, **static) -> the path of a bundle, converted once."""
    folder, found = tmp_path_factory.mktemp("static"), {}

    def make(family="llama", recipe="fp32", **static) -> Path:
        key = (family, recipe, *sorted(static.items()))
        if key not in found:
            chosen = dataclasses.replace(NAMED[recipe], static=Static(**{"chunks": (CHUNK, WHOLE), **static}))
            found[key] = folder / f"{len(found)}.shoal"
            convert(tiny / family, found[key], chosen, check_parity=False)
        return found[key]

    return make


@contextmanager
def runner(path, chunk=CHUNK, cache="fp32"):
    with Bundle.open(path) as bundle:
        opened = Runner(bundle, chunk, WHOLE, cache)
        yield opened
        opened.close()


def decoded(path, tokens=TOKENS, cache="fp32") -> np.ndarray:
    """The decode graph's logits."""
    with Bundle.open(path) as bundle, runner(path) as static:
        section = bundle.section("weights", "weights")
        places = {"weights": session.Place(str(path), section.offset, section.length)}
        graph = bundle.bytes(bundle.section("graph", "decode" if cache == "fp32" else f"decode.{cache}"))
        decoder = Decoder(
            session.open_graph(graph, places), static.card, Cache(static.card, WHOLE, 1, cache), len(tokens)
        )
        found = decoder.forward(0, tokens[None], [0], list(range(len(tokens)))).copy()
        decoder.close()
        return found


@pytest.mark.parametrize("family", [*FAMILIES, "qwen3"])
@pytest.mark.parametrize(("cache", "tolerance"), [("fp32", 1e-5), ("fp16", 1e-3), ("int8", 2e-2)])
def test_in_float_every_length_gives_what_the_decode_graph_gives(made, family, cache, tolerance):
    """A rounded cache turns a last bit's difference into a step of its own."""
    path = made(family, bits=32)
    expected = decoded(path, cache=cache)
    with runner(path, cache=cache) as static:
        assert len(static.index.names) == static.card.blocks + 1, "what lies between two attentions is one graph"
        for length in LENGTHS:
            found = static.run(TOKENS[:length])
            assert np.abs(found - expected[:length]).max() <= tolerance * np.abs(expected).max()


class RowByRow(Runner):
    """Attention of one row at a time: how many there are changes the last bits of its sums in float."""

    def _attend(self, step, values, start, real):
        parts = [
            super(RowByRow, self)._attend(
                step, {name: value[at : at + 1] for name, value in values.items()}, start + at, 1
            )
            for at in range(real)
        ]
        return np.concatenate(parts)


@pytest.mark.parametrize("backend", ["npu", "cpu"])
@pytest.mark.parametrize("family", FAMILIES)
def test_in_8_bits_chunks_of_every_length_give_bit_for_bit_what_one_chunk_gives(made, family, backend):
    """Up to the head, which is the decode graph's in float."""
    path = made(family, backend=backend)
    with Bundle.open(path) as bundle:
        whole, static = RowByRow(bundle, WHOLE, WHOLE), RowByRow(bundle, CHUNK, WHOLE)
        expected = whole.stream(TOKENS, 0)
        for length in LENGTHS:
            starts = range(0, length, CHUNK)
            found = np.concatenate([static.stream(TOKENS[:length][at : at + CHUNK], at) for at in starts])
            np.testing.assert_array_equal(found, expected[:length])
        whole.close()
        static.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_in_8_bits_logits_are_near_those_of_float_and_of_other_chunks(made, family):
    path = made(family)
    reference = decoded(path)
    with runner(path, WHOLE) as whole, runner(path) as static:
        for found, expected in ((whole.run(TOKENS), reference), (static.run(TOKENS), reference)):
            assert np.linalg.norm(found - expected) < 0.1 * np.linalg.norm(expected)


def test_the_device_multiplies_whole_numbers_and_the_shadow_the_rest_of_them(made):
    """For every product with a shadow: what the graph gives, in steps of input and weight, are numpy's sums."""
    looked = []
    with runner(made(backend="cpu")) as static:
        shadows = {(step.block, step.takes): step for step in static.index.steps if isinstance(step, layout.Shadow)}

        def watch(step, values):
            if not isinstance(step, layout.Call) or not step.device or (step.block, step.takes[0]) not in shadows:
                return
            shadow = shadows[step.block, step.takes[0]]
            matrix, scales = weights(static, shadow)
            x = values[shadow.takes] * 5  # beyond the clip
            q = np.rint(x / np.float32(shadow.scale))
            unit = np.float32(shadow.scale) * scales
            main = static.open(layout.graph_name(step.name, CHUNK)).run({step.takes[0]: x})[step.gives[0]]
            beside = static.shadow(shadow, x)
            sums = np.rint(main / unit).astype(np.int64), np.rint(beside / unit).astype(np.int64)
            np.testing.assert_array_equal(sums[0], np.clip(q, -128, 127).astype(np.int64) @ matrix)
            np.testing.assert_array_equal(sums[0] + sums[1], q.astype(np.int64) @ matrix)
            assert sums[1].any()
            looked.append(step.name)

        static.run(TOKENS[:CHUNK], watch=watch)
    assert len(looked) == len(shadows) == 4 * 3


def test_behind_a_gate_rows_are_even_when_they_are_rounded(made):
    seen = []
    with runner(made()) as static:
        assert [width for width in static.index.widths.values()].count(1) == 1, "their sizes, for who takes the product"

        def watch(step, values):
            if isinstance(step, layout.Shadow) and step.inputs == 72:
                seen.append(np.square(values[step.takes]).mean(1))

        static.run(TOKENS[:CHUNK], watch=watch)
    np.testing.assert_allclose(seen, np.ones((3, CHUNK)), rtol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_rotated_products_give_what_they_give_without(wide, tiny, tmp_path, family):
    """Inputs of whole blocks of 64 are; of 48 and 72, as most in tests/data/tiny, they stay as they are."""
    chosen = dataclasses.replace(NAMED["fp32"], static=Static(chunks=(CHUNK,), shadow=0, rotate=True))
    for folder, least in ((wide(family), 4), (tiny / family, 0)):
        path = tmp_path / f"{least}.shoal"
        convert(folder, path, chosen, check_parity=False)
        with Bundle.open(path) as bundle:
            graphs = [bundle.bytes(bundle.section("graph", graph.section)) for graph in bundle.graphs if graph.chunk]
            assert sum(b"rotation" in graph for graph in graphs) >= least
        expected = decoded(path)
        with runner(path) as static:
            assert np.linalg.norm(static.run(TOKENS) - expected) < 0.1 * np.linalg.norm(expected)


def weights(static: Runner, shadow: layout.Shadow) -> tuple[np.ndarray, np.ndarray]:
    data = static._weights
    matrix = data[shadow.weights :][: shadow.inputs * shadow.outputs].view(np.int8)
    scales = data[shadow.scales :][: 4 * shadow.outputs].view(np.float32)
    return matrix.reshape(shadow.inputs, shadow.outputs).astype(np.int64), scales


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_as_many_products_keep_a_shadow_as_the_recipe_says_the_most_important_first(made, share):
    with runner(made("gemma3", shadow=share)) as static, runner(made("gemma3")) as whole:
        steps = {kind: [step for step in whole.index.steps if isinstance(step, kind)] for kind in (layout.Shadow,)}
        ranked = sorted(steps[layout.Shadow], key=lambda step: -step.importance)
        kept = {(s.block, s.importance) for s in static.index.steps if isinstance(s, layout.Shadow)}
        assert kept == {(s.block, s.importance) for s in ranked[: round(share * 12)]}
        assert all(len(s.hot) <= max(1, s.inputs / 100) for s in ranked)
        expected, found = whole.run(TOKENS), static.run(TOKENS)
        assert np.linalg.norm(found - expected) < 0.1 * np.linalg.norm(expected)


def test_no_value_is_written_while_an_older_one_of_its_name_is_still_read(made):
    """Steps run in any order that keeps each name's readers and writers in order; a call's own are apart."""
    for family in FAMILIES:
        for share in (0.0, 0.5, 1.0):
            with runner(made(family, shadow=share)) as static:
                for step in static.index.steps:
                    assert not set(layout.takes(step)) & set(layout.gives(step)), step


def test_the_bundle_says_what_is_in_it_and_equal_attentions_are_one_section(made):
    with Bundle.open(made("llama", "int8")) as bundle:
        bundle.verify()
        index = layout.Static.from_json(bundle.bytes(bundle.section("static", "index")))
        assert not bundle.section("static", "index").required
        static = [graph for graph in bundle.graphs if graph.role == layout.STATIC]
        assert {graph.name for graph in static} == {
            layout.graph_name(name, chunk) for name in index.names for chunk in index.chunks
        }
        assert {(graph.backend, graph.chunk) for graph in static} == {("npu", CHUNK), ("npu", WHOLE)}
        prefill = {graph.name: graph for graph in bundle.graphs if graph.role == layout.PREFILL}
        assert {"embed", "head"} < prefill.keys() and len(prefill) == 2 + 3 * 3
        attends = [graph.section for name, graph in prefill.items() if name.startswith("attend")]
        assert sorted(set(attends)) == ["attend.0", "attend.0.fp16", "attend.0.int8", "attend.1.int8", "attend.2.int8"]
        rows = sum(section.length for section in bundle.sections if section.kind == "weights")
        alone = bundle.section("weights", layout.SECTION).length
        assert alone < 0.6 * rows, "one copy for all chunks, and nothing of embedding and head"


def test_inspect_shows_it_in_a_few_lines(made, capsys):
    assert cli.main(["inspect", str(made("llama", "int8"))]) == 0
    said = capsys.readouterr().out
    assert "npu, 8 bits, 100% of shadows" in said and "npu, chunks of 8, 64 tokens" in said
    assert "12, " in said.partition("shadows ")[2] and "static.8." not in said and "attend.0.int8" in said


def test_in_float_the_decode_graphs_matrices_serve_both(made):
    with Bundle.open(made(bits=32)) as shared, Bundle.open(made(recipe="int8", bits=32)) as apart:
        assert shared.section("weights", "static").length == 0
        assert apart.section("weights", "static").length > 60_000
    expected = decoded(made(bits=32))
    with runner(made(recipe="int8", bits=32)) as static:
        assert np.linalg.norm(static.run(TOKENS) - expected) < 0.05 * np.linalg.norm(expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_smoothing_by_peaks_changes_nothing_in_float_biases_and_shared_heads_included(made, tiny, tmp_path, family):
    chosen = dataclasses.replace(NAMED["fp32"], smooth=True, static=Static(chunks=(CHUNK,)))
    convert(tiny / family, tmp_path / "a.shoal", chosen, check_parity=False)
    expected = decoded(made(family, bits=32))
    assert np.abs(decoded(tmp_path / "a.shoal") - expected).max() <= 1e-5 * np.abs(expected).max()
    with runner(tmp_path / "a.shoal") as smooth, runner(made(family)) as plain:
        errors = [
            np.mean([one.scale for one in static.index.steps if isinstance(one, layout.Shadow)])
            for static in (smooth, plain)
        ]
        assert errors[0] < errors[1]


def test_two_conversions_give_the_same_bytes(made, tiny, tmp_path):
    chosen = dataclasses.replace(NAMED["npu"], static=Static(chunks=(CHUNK, WHOLE)))
    convert(tiny / "llama", tmp_path / "again.shoal", chosen, check_parity=False)
    convert(tiny / "llama", tmp_path / "first.shoal", chosen, check_parity=False)
    assert (tmp_path / "again.shoal").read_bytes() == (tmp_path / "first.shoal").read_bytes()


def test_mixtures_and_encoders_and_parts_are_refused_before_anything_is_written(tiny, tmp_path):
    for family, blocks in (("olmoe", None), ("bert-mean", None), ("llama", "0:2")):
        with pytest.raises(ConvertError, match="static graphs"):
            convert(tiny / family, tmp_path / "a.shoal", "npu", blocks=blocks)
    assert not list(tmp_path.iterdir())


def test_a_recipes_table_is_read_and_what_is_wrong_is_named(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('linear = { bits = 8 }\nstatic = { backend = "gpu", bits = 32, chunks = [16, 64] }')
    found = load(file)
    assert found.static == Static("gpu", 32, (16, 64)) and json.loads(found.to_json())["static"]["chunks"] == [16, 64]
    assert not found.reads_text and NAMED["npu"].reads_text
    file.write_text("static = { shadow = 0, rotate = true }")
    assert load(file).static == Static(shadow=0, rotate=True)
    for wrong in ('backend = "tpu"', "bits = 4", "chunks = []", "chunks = [64, 32]", "chunks = [0]", "shadow = 2.0",
                  'chunks = "32"', "other = 1", "rotate = 1", "rotate = true",
                  "rotate = true, shadow = 0, bits = 32"):  # fmt: skip
        file.write_text(f"static = {{ {wrong} }}")
        with pytest.raises(UsageError, match=wrong.split()[0]):
            load(file)
