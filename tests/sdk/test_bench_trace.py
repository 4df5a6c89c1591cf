"""`shoal bench --trace`: a file that trace viewers read, figures that fit it, and what is refused."""

import json

import pytest

from shoal import bench_trace, cli
from shoal.runtime.schedule import Run, Schedule, Task


def test_a_prompt_is_traced_step_by_step(capsys, static_bundle, tmp_path):
    out = tmp_path / "trace.json"
    assert cli.main(["bench", str(static_bundle), "--trace", str(out), "-p", "45", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    trace = json.loads(out.read_text())
    assert set(found["chunks"]) <= {4, 8} and sum(found["chunks"]) >= 45  # by which is faster here
    assert found["graphs"] == 30 and found["trace"] == str(out)
    boxes = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    # An embedding, and 3 blocks of 5 graphs and attention; where no logits are wanted, not what follows the last one
    whole = 1 + 6 * 3
    assert len(boxes) == (len(found["chunks"]) - 1) * (whole - 3) + whole
    assert sum(box["dur"] for box in boxes) / 1e6 == pytest.approx(found["busy_s"]["cpu"])
    assert found["bound_s"] == pytest.approx(found["busy_s"]["cpu"]) and found["seconds"] >= found["bound_s"]
    assert found["bubbles"]["cpu"] == pytest.approx(1 - found["busy_s"]["cpu"] / found["seconds"])


def test_figures_compare_the_order_that_was_with_others():
    """Two chunks of npu 2, cpu 2; as measured they overlapped, in strict order of chunks they do as well but later."""
    names = ["npu", "cpu", "npu", "cpu"]
    needs = [(), (0,), (1,), (2,)]
    tasks = [
        Task(f"{at % 4} of {at // 4}", at // 4, 0, at % 4, {names[at % 4]: 9.0},
             tuple(at // 4 * 4 + need for need in needs[at % 4]))
        for at in range(8)
    ]  # fmt: skip
    # npu: 0a 0b 1a 1b, cpu behind it
    order = [(0, 0), (4, 2), (1, 2), (5, 4), (2, 4), (6, 6), (3, 6), (7, 8)]
    runs = [Run(at, names[at % 4], float(start), start + 2.0) for at, start in order]
    part = Schedule(tuple(tasks), tuple(runs))
    found = bench_trace.figures(part, [part])
    assert (found["seconds"], found["rule_s"], found["bound_s"]) == (10.0, 10.0, 8.0)
    assert found["strict_s"] == 14.0  # the npu waits for 0b before it begins with the second chunk
    assert found["bubbles"] == {"npu": pytest.approx(0.2), "cpu": pytest.approx(0.2)}
    twice = bench_trace.joined([part, part])
    assert twice.makespan == 20.0 and twice.tasks[9].needs == (8,)
    assert bench_trace.figures(twice, [part, part])["strict_s"] == 28.0


def test_without_static_graphs_nothing_is_traced(capsys, tiny_bundle, tmp_path):
    out = tmp_path / "trace.json"
    assert cli.main(["bench", str(tiny_bundle), "--trace", str(out)]) == 7
    assert "It has no static graphs." in capsys.readouterr().err and not out.exists()


def test_a_prompt_beyond_the_context_is_refused(capsys, static_bundle, tmp_path):
    assert cli.main(["bench", str(static_bundle), "--trace", str(tmp_path / "t"), "-p", "3000"]) == 2
    assert "trained for" in capsys.readouterr().err
