"""Threads that follow the schedule: real sessions, real overlap, failures and hangs."""

import os
import sys
import threading

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from shoal.runtime.errors import BackendError, UsageError
from shoal.runtime.executor import execute
from shoal.runtime.schedule import Part, Task, chrome_trace, prefill, processors
from shoal.runtime.session import open_graph

WIDTH, CHUNK, LAYERS, CHUNKS = 64, 16, 3, 4


def graph(nodes, inputs, outputs, weights=()):
    def values(named):
        return [helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name, dims in named]

    tensors = [numpy_helper.from_array(array, name) for name, array in dict(weights).items()]
    made = helper.make_graph(nodes, "g", values(inputs), values(outputs), tensors)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString()


def chunked(sessions, tasks):
    """(what tasks do, their outputs) for a stack of products and causal attention over the chunks before."""
    held: dict[tuple, np.ndarray] = {}
    rng = np.random.default_rng(0)
    for chunk in range(CHUNKS):
        held[chunk, -1, 1] = rng.standard_normal((CHUNK, WIDTH)).astype(np.float32)

    def work(index, processor):
        task = tasks[index]
        if task.part == 0:
            feeds = {"x": held[task.chunk, task.layer - 1, 1]}
        else:
            past = [held[chunk, task.layer, 0] for chunk in range(task.chunk + 1)]
            feeds = {"q": past[-1], "kv": np.concatenate(past)}
        held[task.chunk, task.layer, task.part] = sessions[processor].run(feeds)["y"]

    return work, held


@pytest.fixture
def sessions():
    """`npu` and `cpu` of one thread each: a product; attention."""
    w = (np.random.default_rng(1).standard_normal((WIDTH, WIDTH)) / 8).astype(np.float32)
    wide = [CHUNK, WIDTH]
    product = graph([helper.make_node("MatMul", ["x", "w"], ["y"])], [("x", wide)], [("y", wide)], {"w": w})
    nodes = [helper.make_node("Transpose", ["kv"], ["t"]), helper.make_node("MatMul", ["q", "t"], ["s"])]
    nodes += [helper.make_node("Softmax", ["s"], ["p"]), helper.make_node("MatMul", ["p", "kv"], ["y"])]
    attention = graph(nodes, [("q", [CHUNK, WIDTH]), ("kv", ["t", WIDTH])], [("y", [CHUNK, WIDTH])])
    with open_graph(product, {}, threads=1) as npu, open_graph(attention, {}, threads=1) as cpu:
        yield {"npu": npu, "cpu": cpu}


def stack():
    parts = [Part("product", lambda chunk: {"npu": 1e-3}), Part("attention", lambda chunk: {"cpu": 1e-3}, across=True)]
    return prefill(parts, LAYERS, CHUNKS)


@pytest.mark.parametrize("strict", [False, True])
def test_sessions_on_two_threads_give_what_one_gives(sessions, strict):
    tasks = stack()
    alone, expected = chunked(sessions, tasks)
    for index in range(len(tasks)):
        alone(index, tasks[index].best)
    work, found = chunked(sessions, tasks)
    ours = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else []
    cores = {"npu": ours[:1], "cpu": ours[-1:]} if ours else None
    schedule = execute(tasks, work, strict=strict, cores=cores)
    assert found.keys() == expected.keys()
    for key, array in expected.items():
        np.testing.assert_array_equal(found[key], array, err_msg=str(key))
    ends = {run.task: run.end for run in schedule.runs}
    assert sorted(ends) == list(range(len(tasks)))
    for run in schedule.runs:
        assert all(ends[need] <= run.start for need in tasks[run.task].needs)
    for name in processors(tasks):
        mine = [(run.start, run.end) for run in schedule.runs if run.processor == name]
        assert all(before[1] <= after[0] for before, after in zip(mine, mine[1:], strict=False))
    boxes = [event for event in chrome_trace(schedule)["traceEvents"] if event["ph"] == "X"]
    assert len(boxes) == len(tasks) and all(0 <= bubble < 1 for bubble in schedule.bubbles().values())
    if ours:
        assert sorted(os.sched_getaffinity(0)) == ours


def test_processors_work_at_once():
    """Three tasks that wait for each other can only end together."""
    together = threading.Barrier(3)
    tasks = [Task(name, 0, 0, 0, {name: 1.0}) for name in ("npu", "gpu", "cpu")]
    schedule = execute(tasks, lambda index, name: together.wait(60))
    assert max(run.start for run in schedule.runs) < min(run.end for run in schedule.runs)


def test_what_a_task_raises_is_raised_and_nothing_more_begins():
    tasks, begun = stack(), []

    def work(index, name):
        begun.append(index)
        if len(begun) == 5:
            raise ZeroDivisionError("in the fifth")

    before = threading.active_count()
    with pytest.raises(ZeroDivisionError, match="in the fifth"):
        execute(tasks, work)
    assert len(begun) <= 6  # the other processor's may have begun before
    for thread in threading.enumerate():
        if thread.name.startswith("shoal-"):
            thread.join(60)
    assert threading.active_count() <= before


def test_a_processor_that_hangs_is_named_and_given_up():
    go = threading.Event()
    tasks = stack()
    with pytest.raises(BackendError, match="The npu did not finish 1/product of chunk 0 within 0.2 s"):
        execute(tasks, lambda index, name: tasks[index].name == "1/product of chunk 0" and go.wait(60), patience=0.2)
    go.set()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores cannot be chosen here")
def test_cores_that_there_are_not_are_refused():
    with pytest.raises(UsageError, match="The cpu cannot be kept there"):
        execute(stack(), lambda index, name: None, cores={"cpu": [1 << 14]})


def test_nothing_to_do_ends_at_once():
    assert execute([], lambda index, name: None).runs == ()
