"""Perplexity at a size: the figures agree with the converter's, sizes are those of the bytes, and no name or file that
is given breaks a form."""

import json
import threading
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest

from shoal import cli, report
from shoal.converters import parity
from shoal.converters.convert import convert
from shoal.converters.text import HELDOUT
from shoal.report import Curve, Order, Point
from shoal.report_forms import FORMS, facts, form_of, render, table
from shoal.runtime.bitstack.layout import Index, Stacked, StackFormat
from shoal.runtime.bundle import Bundle
from shoal.runtime.errors import BusyError, UsageError
from shoal.runtime.kernels.layout import LinearFormat
from shoal.runtime.model import load

TOKENS = 256


def shoal(capsys, *arguments, code=0):
    status = cli.main([str(word) for word in arguments])
    said = capsys.readouterr()
    assert status == code, said.err
    return said.out, said.err


@pytest.fixture(scope="module")
def compared(tiny_folder, tmp_path_factory):
    """The tiny llama in int4, with what the converter found."""
    out = tmp_path_factory.mktemp("report") / "tiny.int4.shoal"
    return out, convert(tiny_folder, out, "int4").parity


@pytest.fixture(scope="module")
def measured(compared, tiny_bundle):
    return report.measure([compared[0], tiny_bundle], tokens=TOKENS)


def index(**more) -> Index:
    """Two matrices: one of three blocks, one of a rung, another that replaces it, and a block."""
    block, small, large = StackFormat(64, 16, 1), LinearFormat(64, 16, 2, 32, 64), LinearFormat(64, 16, 4, 32, 64)
    matrices = (Stacked("a", 64, 16, 0, (block,) * 3), Stacked("b", 64, 16, 0, (small, large, block)))
    return Index(matrices, (0, 1, 0, 1, 0, 1), 2, "average", **more)


def subject(stack=None, weights=1000):
    card = SimpleNamespace(hidden=64, head_dim=16, heads=4, kv_heads=2, blocks=1, ffn=64, tied=True, vocab=100)
    return report.Subject("x.shoal", card, "bitstack", "ab" * 32, "cd" * 32, weights, stack, None)


def curve(label, *points, sort=""):
    found = [Point(None, size, 8 * size / 1000, value) for size, value in points]
    return Curve(label, "model", "x.shoal", "int4", "ab" * 32, "cd" * 32, sort, 1000, found)


def test_perplexity_is_the_converter_s(compared):
    path, figures = compared
    with load(path, context=256, chunk=32) as model:
        rows = parity.stretches(model.tokenizer, model.card, HELDOUT, parity.TOKENS)
        assert (report.ROW, report.STEP, report.TOKENS) == (parity.ROW, parity.CHUNK, parity.TOKENS)
        found = report.perplexity(model, rows)
        assert found == pytest.approx(figures["perplexity"], rel=1e-6)
        assert report.perplexity(model, rows) == found, "nothing of a run is left for the next"
        assert report.perplexity(model, rows, step=7) == pytest.approx(found, rel=1e-3), "but for rounding"
        # What was measured over is not taken for a prompt's beginning
        answer = model.generate(rows[0][:40].tolist(), max_tokens=2)
        answer.finish()
        assert answer.stats.reused_tokens == 0


def test_a_model_that_answers_is_not_measured_over(compared):
    with load(compared[0], context=128) as model:
        rows = parity.stretches(model.tokenizer, model.card, HELDOUT, 64)
        answer = model.generate("One two three", max_tokens=8, raw=True)
        next(answer)
        with pytest.raises(BusyError, match="idle"):
            report.perplexity(model, rows)
        assert answer.finish() is not None and report.perplexity(model, rows) > 1


def test_a_report_has_a_point_of_each_and_the_best_at_each_size(measured, compared, tiny_bundle):
    small, large = measured["curves"]
    assert [len(curve["points"]) for curve in (small, large)] == [1, 1]
    with Bundle.open(compared[0]) as bundle:
        assert small["points"][0]["bytes"] == bundle.section("weights", "weights").length
        assert small["digest"] == bundle.digest
    # fp32: what is no matrix (norms, padding) is little
    assert 32 <= large["points"][0]["bits"] < 33 and large["recipe"] == "fp32"
    sizes = measured["sizes"]
    assert [row["bytes"] for row in sizes] == sorted(curve["points"][0]["bytes"] for curve in (small, large))
    assert sizes[0]["perplexities"] == [small["points"][0]["perplexity"], None] and sizes[0]["best"] == 0
    assert sizes[1]["best"] == min((0, 1), key=lambda at: measured["curves"][at]["points"][0]["perplexity"])
    assert json.loads(render(measured, "json")) == measured


def test_a_stack_is_measured_at_the_sizes_of_others_and_its_own():
    stack = index()
    order, single = Order(subject(stack), "a", "average", stack.order, 2), Order(subject(weights=1700), "b")
    sizes = [1000 + held for held in stack.sizes()]
    assert order.sizes() == sizes and order.ends() == (sizes[2], sizes[-1]) and single.ends() == (1700, 1700)
    steps = report.ladder([order.ends(), single.ends()], 3)
    assert steps[0] == min(sizes[2], 1700) and steps[-1] == sizes[-1] and 1700 in steps
    assert steps == sorted(steps) and len(steps) == 4
    assert single.entries(steps) == [0]
    measured = order.entries(steps)
    assert measured[0] == 2 and measured[-1] == 6
    for size in steps:
        fitting = [count for count in range(2, 7) if sizes[count] <= size]
        assert not fitting or fitting[-1] in measured, "the most that there is room for"


def test_orders_are_the_stored_ones_and_a_drawn_one():
    other = (1, 0, 1, 1, 0, 0)
    found = report.orders(subject(index(orders={"greedy": other})), "x", ["average", "greedy", "random", "greedy"])
    assert [order.label for order in found] == ["x, average", "x, greedy", "x, random"]
    assert found[0].matrices == index().order and found[1].matrices == other
    drawn = found[2].matrices
    assert sorted(drawn) == sorted(other) and drawn[:2] == (0, 1), "the floor stays"
    assert drawn == report.orders(subject(index()), "x", ["random"])[0].matrices, "the same every time"
    assert [order.sort for order in report.orders(subject(index()), "x")] == ["average"]
    assert report.orders(subject(), "x", ["average"])[0].matrices == ()
    with pytest.raises(UsageError, match="It has average"):
        report.orders(subject(index()), "x", ["greedy"])


def test_the_largest_part_that_fits_counts():
    curves = [curve("a", (100, 50.0), (200, 20.0), (300, 10.0)), curve("b", (250, 15.0))]
    rows = report.sizes(curves, [50, 100, 250, 299, 300])
    assert [row["perplexities"] for row in rows] == [
        [None, None], [50.0, None], [20.0, 15.0], [20.0, 15.0], [10.0, 15.0]
    ]  # fmt: skip
    assert [row["best"] for row in rows] == [None, 0, 1, 1, 0]
    assert rows[1]["bits"] == 0.8


def test_forms_show_the_same_and_hold_hostile_names(measured):
    name = '"><script>alert(1)</script>|\x1b[31m\ud800' + "`*_"
    hostile = json.loads(json.dumps(measured))
    for one in hostile["curves"]:
        one["label"] = one["model"] = one["recipe"] = name
    hostile["text"]["name"] = name
    for form in FORMS:
        text = render(hostile, form)
        assert "\x1b" not in text and "<script" not in text.replace("\\<script", "") or form == "json"
        text.encode() if form != "json" else json.loads(text)
    ElementTree.fromstring(render(hostile, "svg"))
    assert all("\x1b" not in line for line in facts(hostile)) and "\x1b" not in "".join(table(hostile)[0])
    rows = [line for line in render(hostile, "md").splitlines() if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in rows}) == 1, "a name adds no column"
    figure = f"{measured['curves'][0]['points'][0]['perplexity']:.2f}"
    for form in ("md", "html", "svg"):
        assert figure in render(measured, form)
    assert f"**{figure}**" in render(measured, "md") and f"<strong>{figure}</strong>" in render(measured, "html")


def test_the_verb_writes_every_form_and_reads_its_own(capsys, compared, tiny_bundle, tmp_path):
    outs = [tmp_path / f"report.{form}" for form in FORMS]
    words = [word for out in outs for word in ("--out", out)]
    shown, _ = shoal(capsys, "report", compared[0], "--tokens", TOKENS, *words)
    assert "tiny.int4" in shown and "perplexity on about 256 tokens" in shown
    assert all(out.stat().st_size > 100 and out.stat().st_mode & 0o777 == 0o644 for out in outs)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(out.name for out in outs), "nothing beside"
    again = json.loads(shoal(capsys, "report", tiny_bundle, tmp_path / "report.json", "--tokens", TOKENS, "--json")[0])
    assert [len(row["perplexities"]) for row in again["sizes"]] == [2, 2]
    assert again["curves"][1] == json.loads((tmp_path / "report.json").read_text())["curves"][0]
    assert "another text" in shoal(capsys, "report", tmp_path / "report.json", "--tokens", 128, code=2)[1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--out", "a.png"], "ends in none of"),
        (["--tokens", "1"], "tokens is 1"),
        (["--points", "1"], "points is 1"),
        (["--step", "0"], "step is 0"),
        (["--text", "/no/such"], "cannot be read"),
        (["--tokens", "many"], "invalid int"),
    ],
)
def test_wrong_options_are_told_before_anything_is_loaded(capsys, tiny_bundle, words, said):
    assert said in shoal(capsys, "report", tiny_bundle, *words, code=2)[1]


def test_what_has_no_perplexity_is_refused(capsys, minilm_bundle, tiny_bundle, tmp_path):
    assert "embeds" in shoal(capsys, "report", minilm_bundle, code=2)[1]
    shoal(capsys, "report", tmp_path / "absent.shoal", code=5)
    (tmp_path / "short.txt").write_text("")
    assert "too short" in shoal(capsys, "report", tiny_bundle, "--text", tmp_path / "short.txt", code=2)[1]


def test_models_with_other_tokenizers_are_not_compared(capsys, tiny_bundle, measured, tmp_path):
    other = json.loads(json.dumps(measured))
    other["curves"][0]["tokenizer"] = "00" * 32
    (tmp_path / "other.json").write_text(json.dumps(other))
    said = shoal(capsys, "report", tiny_bundle, tmp_path / "other.json", "--tokens", TOKENS, code=2)[1]
    assert "different tokenizers" in said


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw["curves"][0].update(points=[]),
        lambda raw: raw["curves"][0]["points"][0].update(perplexity=-1),
        lambda raw: raw["curves"][0]["points"][0].update(perplexity=float("nan")),
        lambda raw: raw["curves"][0]["points"][0].update(bytes="9"),
        lambda raw: raw["curves"][0]["points"][0].update(bytes=1 << 80),
        lambda raw: raw["curves"][0]["points"][0].update(entries=[]),
        lambda raw: raw["curves"][0]["points"][0].pop("bits"),
        lambda raw: raw["curves"][0].update(label=["a"]),
        lambda raw: raw["curves"][0].update(parameters=0),
        lambda raw: raw.update(curves={"a": 1}),
        lambda raw: raw.update(text=None),
        lambda raw: raw.pop("curves"),
    ],
)
def test_a_wrong_report_is_refused(capsys, measured, tmp_path, change):
    raw = json.loads(json.dumps(measured))
    change(raw)
    (tmp_path / "wrong.json").write_text(json.dumps(raw))
    assert "is no report" in shoal(capsys, "report", tmp_path / "wrong.json", "--tokens", TOKENS, code=2)[1]


@pytest.mark.parametrize("data", [b"", b"[", b"3", b"[" * 100_000, b"\xff"])
def test_what_is_no_json_is_refused(capsys, tmp_path, data):
    (tmp_path / "wrong.json").write_bytes(data)
    assert "is no report" in shoal(capsys, "report", tmp_path / "wrong.json", code=2)[1]


@pytest.mark.parametrize(("name", "form"), [("a.svg", "svg"), ("A.HTML", "html"), ("x.y/b.md", "md")])
def test_a_form_is_chosen_by_the_name(name, form):
    assert form_of(name) == form


def test_measuring_waits_for_a_step(compared):
    """Another thread may ask for what runs between two steps meanwhile."""
    with load(compared[0], context=64) as model:
        rows = parity.stretches(model.tokenizer, model.card, HELDOUT, 64)
        calls = []
        threads = [
            threading.Thread(target=lambda: calls.append(model.scheduler.exclusively(lambda: 1))) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        assert report.perplexity(model, rows) > 1
        for thread in threads:
            thread.join()
        assert calls == [1] * 4


def test_a_stack_is_a_curve_and_its_orders_end_alike(stacked_bundle):
    found = report.measure([stacked_bundle], tokens=TOKENS, points=4, sorts=["proxy", "random"])
    curves = found["curves"]
    assert [curve["sort"] for curve in curves] == ["proxy", "random"]
    with load(stacked_bundle, context=256, chunk=32) as model:
        stack, rows = model.stack, parity.stretches(model.tokenizer, model.card, HELDOUT, TOKENS)
        index, base = stack.index, found["curves"][0]["points"][0]["bytes"] - stack.sizes[stack.index.floor]
        for point in curves[0]["points"]:
            assert point["bytes"] == base + index.sizes()[point["entries"]]
            model.set_entries(point["entries"])
            assert report.perplexity(model, rows) == point["perplexity"], "as an app loads it"
    for curve in curves:
        counts = [point["entries"] for point in curve["points"]]
        assert counts[0] == index.floor and counts[-1] == len(index.order) and 4 <= len(counts) <= 6
        assert curve["points"][-1] == curves[0]["points"][-1], "all of it is the same model in any order"
        assert curve["points"][0] == curves[0]["points"][0], "and so is the floor"
    assert curves[0]["points"][1:-1] != curves[1]["points"][1:-1]
    assert len(found["sizes"]) == 4 and all(row["best"] is not None for row in found["sizes"])
    for form in FORMS:
        render(found, form)
