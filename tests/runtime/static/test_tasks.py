"""What waits for what, on steps like a decoder's."""

import itertools

import numpy as np
import pytest

from shoal.runtime.schedule import simulate
from shoal.runtime.static.layout import Attend, Call, Shadow, Static, gives, takes
from shoal.runtime.static.tasks import build, needed

BLOCKS = 3


def static(blocks=BLOCKS) -> Static:
    """Embedding; qkv beside its shadow, attention, the rest of the block with a shadow of its own."""
    steps: list = [Call("embed", 0, ("tokens",), ("stream",), device=False)]
    for block in range(blocks):
        steps += [
            Call(f"{block}.norm", block, ("stream",), ("x",)),
            Call(f"{block}.qkv", block, ("x",), ("qkv",)),
            Shadow(block, "x", "s", 1.0, 4, 6, 0, 0, (), 1.0),
            Attend("attend", block, ("qkv", "s"), "y"),
            Call(f"{block}.mlp", block, ("stream", "y"), ("stream",)),
        ]
    return Static("npu", (8,), {"stream": 4, "x": 4, "qkv": 6, "s": 6, "y": 4}, tuple(steps), "stream", "head")


def seconds(length: int, step: int) -> float:
    return 1.0


@pytest.mark.parametrize("lanes", [1, 2, 4])
def test_any_order_that_keeps_the_needs_computes_the_same(lanes):
    """Each step writes a word of what it read; whatever order the needs allow, the words are those of plain order."""
    found = static()
    tasks, places = build(found, [8] * 4, [False, False, False, True], lanes, "npu", seconds)

    def run(order) -> dict:
        values, cache, words = [{} for _ in range(lanes)], {}, {}
        for index in order:
            place = places[index]
            step, lane = found.steps[place.step], values[place.chunk % lanes]
            read = tuple(lane.get(name, place.chunk) for name in takes(step))
            if isinstance(step, Attend):
                read += tuple(cache.get((one, step.block)) for one in range(place.chunk))
                cache[place.chunk, step.block] = hash(read)
            for name in gives(step):
                lane[name] = hash((place.step, read))
            words[index] = hash(read)
        return words

    plain = run(range(len(tasks)))
    assert run([run_.task for run_ in simulate(tasks).runs]) == plain
    draw = np.random.default_rng(0)
    for _ in range(30):
        done: set = set()
        order = []
        while len(order) < len(tasks):
            ready = [i for i, task in enumerate(tasks) if i not in done and done.issuperset(task.needs)]
            order.append(int(draw.choice(ready)))
            done.add(order[-1])
        assert run(order) == plain


def test_only_attention_waits_for_other_chunks():
    found = static()
    tasks, places = build(found, [8] * 3, [False] * 3, 3, "npu", seconds)
    for task, place in zip(tasks, places, strict=True):
        across = {places[need].chunk for need in task.needs} - {place.chunk}
        attends = isinstance(found.steps[place.step], Attend)
        assert across == ({place.chunk - 1} if attends and place.chunk else set())
    assert {task.best for task in tasks} == {"npu", "cpu"}


def test_what_nobody_needs_is_left_out():
    found = static()
    assert needed(found, True) == list(range(len(found.steps)))
    assert needed(found, False) == list(range(len(found.steps) - 1))  # without the last block's feed-forward
    tasks, places = build(found, [8, 8], [False, True], 2, "npu", seconds)
    per = [len(list(group)) for _, group in itertools.groupby(places, lambda place: place.chunk)]
    assert per == [len(found.steps) - 1, len(found.steps)] and len(tasks) == sum(per)
