"""`shoal bench --sizes`: a stacked bundle at several sizes, alone and beside another."""

import json

import pytest

from shoal import bench, bench_stack, cli
from shoal.runtime.errors import UsageError
from shoal.runtime.model import load


@pytest.fixture(scope="module")
def found(stacked_bundle, tiny_bundle):
    tests = [bench.Test("pp", 8), bench.Test("tg", 4)]
    return bench_stack.measure(str(stacked_bundle), tests, sizes=3, beside=str(tiny_bundle), repetitions=2, threads=1)


def test_every_size_has_every_test(found, stacked_bundle):
    with load(stacked_bundle) as model:
        index = model.stack.index
    counts = sorted({row["entries"] for row in found["rows"]})
    assert counts[0] == index.floor and counts[-1] == len(index.order) == found["entries"] and len(counts) == 3
    assert [row["test"] for row in found["rows"]] == ["pp8", "tg4"] * 3
    sizes = index.sizes()
    assert all(row["stack_bytes"] == sizes[row["entries"]] and row["mean"] > 0 for row in found["rows"])


def test_a_step_reads_what_counts_of_the_stack(found):
    for row in found["rows"]:
        if row["test"] == "tg4":
            # Between entries that count there may be gaps, which a stream read does not leave out
            assert row["step_bytes"] >= row["stack_bytes"]
            assert row["gb_per_s"] == pytest.approx(row["mean"] * row["step_bytes"] / 1e9)
            assert row["times"] > 0 and row["of_stream_read"] > 0
        else:
            assert "step_bytes" not in row


def test_it_is_a_table(found):
    lines = bench_stack.render(found).splitlines()
    assert len(lines) == 2 + 6 + 2 and len({line.count("|") for line in lines[:8]}) == 1
    assert "tiny" in lines[0] and "1 threads" in lines[-1]
    alone = bench_stack.render(found | {"beside": None})
    assert "over" not in alone.splitlines()[0]


def test_sizes_are_even_by_bytes():
    assert bench_stack.spread([0, 10, 20, 30, 40, 50], 1, 5, 3) == [1, 3, 5]
    assert bench_stack.spread([0, 10, 11, 12, 50, 90], 1, 5, 3) == [1, 4, 5]
    assert bench_stack.spread([0, 10], 1, 1, 5) == [1]


def test_the_verb(capsys, stacked_bundle, tiny_bundle):
    words = ["bench", str(stacked_bundle), "--sizes", "2", "-p", "0", "-n", "2", "-r", "1", "-t", "1"]
    assert cli.main([*words, "--json"]) == 0
    assert [row["test"] for row in json.loads(capsys.readouterr().out)["rows"]] == ["tg2", "tg2"]
    for wrong, said in ((["--sizes", "1"], "2 to 64"), (["--beside", str(tiny_bundle)], "without --sizes")):
        assert cli.main(["bench", str(stacked_bundle), *wrong]) == 2
        assert said in capsys.readouterr().err


def test_what_has_no_stack_is_refused(tiny_bundle):
    with pytest.raises(UsageError, match="no stack"):
        bench_stack.measure(str(tiny_bundle), [bench.Test("tg", 2)], sizes=2)
