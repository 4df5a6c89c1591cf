"""What a person sees, by stream: the answer on stdout, everything else on stderr."""

import io
import json

import pytest

from shoal.runtime.events import Event
from shoal.show import Show, align, describe, size


class Terminal(io.StringIO):
    def isatty(self):
        return True


def made(as_json=False, stderr=None):
    out, err = io.StringIO(), stderr or io.StringIO()
    return Show(as_json=as_json, stdout=out, stderr=err), out, err


def test_json_keeps_stdout_for_one_value():
    show, out, err = made(as_json=True)
    show.line("for a person")
    show.table([("a", 1)])
    show.progress(Event("convert", 1, 2))
    show.note("beside")
    show.json({"answer": 42})
    assert json.loads(out.getvalue()) == {"answer": 42}
    assert "convert" in err.getvalue() and "beside" in err.getvalue()


def test_without_json_only_the_text_is_printed():
    show, out, _ = made()
    show.text("Hel")
    show.text("lo")
    show.line()
    show.json({"answer": 42})
    assert out.getvalue() == "Hello\n"


def test_lines_begin_and_end_a_stage_and_leave_out_what_is_between():
    show, _, err = made()
    for done in range(1001):
        show.progress(Event("weights", done, 1000))
    show.progress(Event("parity", 0, 10))
    assert err.getvalue().splitlines() == ["weights 0 of 1,000", "weights 1,000 of 1,000", "parity 0 of 10"]


def test_bars_on_a_terminal_are_closed_before_text():
    pytest.importorskip("tqdm")
    show, out, err = made(stderr=Terminal())
    with show:
        show.progress(Event("fetch", 5 << 20, 10 << 20, unit="bytes"))
        show.progress(Event("fetch", 10 << 20, 10 << 20, unit="bytes"))
        show.text("an answer")
        show.progress(Event("again"))
    assert "fetch: 100%" in err.getvalue() and "again" in err.getvalue()
    assert "steps/s" not in err.getvalue(), "what has no end has no speed"
    assert out.getvalue() == "an answer"


def test_describe():
    assert describe(Event("fetch", 1 << 20, 4 << 20, "part 1", "bytes")) == "fetch 1.00 MiB of 4.00 MiB: part 1"
    assert describe(Event("convert", 3, 30, unit="tensors")) == "convert 3 of 30 tensors"
    assert describe(Event("load", detail="x.shoal")) == "load: x.shoal"


def test_sizes_have_three_figures():
    assert [size(n) for n in (0, 999, 1000, 4096, 123 << 20, 15 << 30, 3 << 50)] == [
        "0 B", "999 B", "0.98 KiB", "4.00 KiB", "123 MiB", "15.0 GiB", "3072 TiB",
    ]  # fmt: skip


def test_numbers_are_set_right_and_words_left():
    assert align([("weights", 1234567), ("kv", 5)], ("row", "bytes")) == [
        "row          bytes",
        "weights  1,234,567",
        "kv               5",
    ]
    assert align([("a", ""), ("b", "2")], ("", "n")) == ["   n", "a", "b  2"]  # a gap among numbers
    assert align([]) == []
