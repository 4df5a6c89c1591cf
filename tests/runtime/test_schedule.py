"""The scheduler: the published toy, the optimum of small cases by brute force, the lower bound."""

import json
import math
import random

import pytest

from shoal.runtime.errors import UsageError
from shoal.runtime.schedule import (
    Part,
    State,
    Task,
    chrome_trace,
    chunk_first,
    layer_first,
    lower_bound,
    prefill,
    processors,
    simulate,
)


def toy(chunks, layers=12):
    """llm.npu's layer: attention on the cpu, which grows with the chunk, between two subgraphs of the npu."""
    parts = [
        Part("qkv", lambda chunk: {"npu": 5}),
        Part("attention", lambda chunk: {"cpu": 2 + chunk}, across=True),
        Part("ffn", lambda chunk: {"npu": 9}),
        Part("norm", lambda chunk: {"cpu": 3}),
    ]
    return prefill(parts, layers, chunks)


def check(schedule):
    """Everything ran once, after what it needs, and no processor did two things at once."""
    tasks = schedule.tasks
    runs = {run.task: run for run in schedule.runs}
    assert sorted(runs) == list(range(len(tasks))) and len(schedule.runs) == len(tasks)
    for index, run in runs.items():
        assert run.processor in tasks[index].seconds
        assert all(runs[need].end <= run.start for need in tasks[index].needs)
    for name in processors(tasks):
        mine = sorted((run.start, run.end) for run in schedule.runs if run.processor == name)
        assert all(before[1] <= after[0] for before, after in zip(mine, mine[1:], strict=False))


@pytest.mark.parametrize(
    ("chunks", "strict", "chunks_first", "ours", "bound"), [(4, 975, 675, 675, 672), (8, 2139, 1437, 1347, 1344)]
)
def test_the_published_toy(chunks, strict, chunks_first, ours, bound):
    tasks = toy(chunks)
    found = [simulate(tasks, strict=True), simulate(tasks, chunk_first), simulate(tasks)]
    for schedule in found:
        check(schedule)
    assert [schedule.makespan for schedule in found] == [strict, chunks_first, ours]
    assert lower_bound(tasks) == bound
    if chunks == 8:
        assert found[0].bubbles()["npu"] == pytest.approx(0.37, abs=0.01) and found[2].bubbles()["npu"] < 0.05


def test_attention_waits_for_all_chunks_before_it_and_nothing_else_does():
    tasks = toy(3, layers=2)
    by_name = {task.name: task for task in tasks}
    needs = {name: [tasks[need].name for need in task.needs] for name, task in by_name.items()}
    assert needs["1/attention of chunk 2"] == [f"1/qkv of chunk {chunk}" for chunk in range(3)]
    assert needs["1/qkv of chunk 2"] == ["0/norm of chunk 2"] and needs["0/qkv of chunk 2"] == []


def optimum(tasks):
    """The shortest makespan of all schedules, by trying every order and every processor."""
    names = processors(tasks)
    best = [math.inf]
    ends: dict[int, float] = {}

    def extend(free, makespan):
        if len(ends) == len(tasks):
            best[0] = min(best[0], makespan)
            return
        left = dict.fromkeys(names, 0.0)
        for index, task in enumerate(tasks):
            if index not in ends and len(task.seconds) == 1:
                left[task.best] += task.seconds[task.best]
        if max(free[name] + left[name] for name in names) >= best[0]:
            return
        for index, task in enumerate(tasks):
            if index in ends or any(need not in ends for need in task.needs):
                continue
            for name, seconds in task.seconds.items():
                start = max([free[name], *(ends[need] for need in task.needs)])
                if start + seconds < best[0]:
                    ends[index] = start + seconds
                    extend({**free, name: start + seconds}, max(makespan, start + seconds))
                    del ends[index]

    extend(dict.fromkeys(names, 0.0), 0.0)
    return best[0]


def small(seed, alternatives=False):
    """3 chunks of a layer of 4 parts with random times (2 chunks, some parts on either processor)."""
    rng = random.Random(seed)
    times = [[rng.randint(1, 9) for _ in range(3)] for _ in range(4)]
    slow = [rng.randint(1, 3) for _ in range(4)]

    def part(at):
        home, other = ("npu", "cpu")[at % 2], ("cpu", "npu")[at % 2]
        return lambda chunk: (
            {home: times[at][chunk]} | ({other: slow[at] * times[at][chunk]} if alternatives and at != 1 else {})
        )

    return prefill([Part(str(at), part(at), across=at == 1) for at in range(4)], 1, 2 if alternatives else 3)


def test_small_cases_against_brute_force():
    ratios = {"ours": [], "strict": [], "chunks first": [], "random": []}
    for seed in range(30):
        tasks, rng = small(seed), random.Random(seed)
        best = optimum(tasks)
        assert best >= lower_bound(tasks)
        keys = {index: rng.random() for index in range(len(tasks))}
        for name, schedule in {
            "ours": simulate(tasks), "strict": simulate(tasks, strict=True),
            "chunks first": simulate(tasks, chunk_first),
            "random": simulate(tasks, lambda state, index, keys=keys: (keys[index],)),
        }.items():  # fmt: skip
            check(schedule)
            assert schedule.makespan >= best
            ratios[name].append(schedule.makespan / best)
    mean = {name: sum(found) / len(found) for name, found in ratios.items()}
    assert mean["ours"] < 1.06 and mean["ours"] <= min(mean.values()) and mean["strict"] > 1.15, mean


def test_tasks_that_two_processors_can_run_against_brute_force():
    ratios = []
    for seed in range(12):
        tasks = small(seed, alternatives=True)
        schedule, best = simulate(tasks), optimum(tasks)
        check(schedule)
        assert lower_bound(tasks) <= best <= schedule.makespan
        ratios.append(schedule.makespan / best)
    assert sum(ratios) / len(ratios) < 1.15 and min(ratios) == 1, ratios


@pytest.mark.parametrize("rule", [layer_first, chunk_first])
def test_no_processor_is_idle_while_it_has_work(rule):
    """From when a task is ready until it starts its processor works."""
    tasks = toy(5, layers=4)
    schedule = simulate(tasks, rule)
    ends = {run.task: run.end for run in schedule.runs}
    for run in schedule.runs:
        ready = max((ends[need] for need in tasks[run.task].needs), default=0.0)
        assert _busy(schedule, run.processor, ready, run.start)


def _busy(schedule, processor, since, until):
    worked = sum(
        max(0.0, min(run.end, until) - max(run.start, since)) for run in schedule.runs if run.processor == processor
    )
    return worked == pytest.approx(max(0.0, until - since))


def test_a_third_processor_helps_and_a_slow_one_does_no_harm():
    def shared(gpu):
        parts = [
            Part("linear", lambda chunk: {"npu": 10} | ({"gpu": gpu} if gpu else {})),
            Part("attention", lambda chunk: {"cpu": 1}, across=True),
        ]
        return simulate(prefill(parts, 4, 6))

    alone, quick, slow = shared(0), shared(12), shared(1000)
    for schedule in (alone, quick, slow):
        check(schedule)
    assert quick.makespan < 0.7 * alone.makespan and slow.makespan == alone.makespan
    assert slow.busy()["gpu"] == 0 and slow.bubbles()["gpu"] == 1


def test_nothing_to_do_takes_no_time():
    assert simulate([]).makespan == 0 and simulate([]).bubbles() == {} and lower_bound([]) == 0
    idle = simulate([Task("a", 0, 0, 0, {"cpu": 0.0}), Task("b", 0, 0, 1, {"cpu": 0.0}, (0,))])
    assert idle.makespan == 0 and len(idle.runs) == 2


@pytest.mark.parametrize(
    "task",
    [
        Task("itself", 0, 0, 0, {"cpu": 1}, (1,)),
        Task("later", 0, 0, 0, {"cpu": 1}, (2,)),
        Task("before all", 0, 0, 0, {"cpu": 1}, (-1,)),
        Task("nowhere", 0, 0, 0, {}),
        Task("backwards", 0, 0, 0, {"cpu": -1.0}),
        Task("never", 0, 0, 0, {"cpu": math.inf}),
        Task("nobody knows", 0, 0, 0, {"cpu": math.nan}),
    ],
)
def test_tasks_that_could_not_end_are_refused(task):
    with pytest.raises(UsageError, match=task.name):
        State([Task("first", 0, 0, 0, {"cpu": 1}), task], layer_first)


def test_a_trace_shows_every_task_on_its_processor_s_line():
    schedule = simulate(toy(2, layers=2))
    trace = json.loads(json.dumps(chrome_trace(schedule), allow_nan=False))
    lines = {event["tid"]: event["args"]["name"] for event in trace["traceEvents"] if event["ph"] == "M"}
    boxes = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert set(lines.values()) == {"npu", "cpu"} and len(boxes) == len(schedule.tasks)
    assert all(lines[box["tid"]] == box["cat"] and box["dur"] == box["args"]["expected_us"] for box in boxes)
    assert max(box["ts"] + box["dur"] for box in boxes) == schedule.makespan * 1e6
    assert trace["otherData"]["bubbles"] == schedule.bubbles()
