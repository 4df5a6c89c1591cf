"""A walk of budgets: what the kernel counts stays within 3 % of each, and the answers are those of fresh loads of the
same sizes. In a process of its own, since memory that another test left in the heap would hide there."""

import json
import subprocess
import sys

import pytest

from shoal.runtime import kernels

pytestmark = [
    pytest.mark.skipif(not kernels.available(), reason="needs the kernels"),
    pytest.mark.skipif(sys.platform != "linux", reason="needs /proc"),
]

WALK = """
import json, random, sys, threading
import numpy, onnxruntime, shoal
from shoal.runtime import measure, model as loading

path, steps, checked = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
draw, start, over = random.Random(7), measure.resident_bytes(), threading.Event()
before = measure.anonymous_bytes()
found, sizes, stage, peaks = [], {}, [None], {}

def sample():
    while not over.wait(0.002):
        now, held = stage[0], measure.resident_bytes() - start
        if now == stage[0]:
            peaks[now] = max(peaks.get(now, 0), held)

def answer(model, seed, length, count=6):
    draw = random.Random(seed)
    prompt = [draw.randrange(3, model.card.vocab) for _ in range(length)]
    return [(t.id, t.logprob) for t in model.generate(prompt, max_tokens=count, ignore_end=True)]

with shoal.load(path, context=1024) as model:
    stack, whole = model.stack, model.plan.total
    least = whole - stack.sizes[-1] + stack.sizes[stack.index.floor]
    answer(model, 0, 700)  # chunks of every length have been
    threading.Thread(target=sample, daemon=True).start()
    memory = whole
    for step in range(steps):
        memory = min(max(memory + draw.gauss(0, (whole - least) / 4), least * 0.98), whole * 1.02)
        memory = int(max(memory, least))
        stage[0] = ("move", step)
        plan = model.set_memory(memory)
        stage[0] = ("run", step)
        length = draw.choice((20, 40, 300))
        sizes[plan.entries] = (step, length, answer(model, step, length))
        rows = model.measure()
        held = measure.anonymous_bytes() - before + sum(
            rows[row.name] for row in plan.rows if row.where == "mapped" and rows[row.name] is not None)
        more = stack.sizes[min(plan.entries + 1, len(stack.sizes) - 1)] - stack.sizes[plan.entries]
        found.append({"memory": memory, "held": held, "rows": sum(filter(None, rows.values())),
                      "peak": peaks.get(stage[0], 0), "moving": peaks.get(("move", step), 0),
                      "entries": plan.entries, "more": more,
                      "free": stack.index.floor < plan.entries < len(stack.index.order)})
    over.set()
for entries, (seed, length, expected) in draw.sample(sorted(sizes.items()), min(checked, len(sizes))):
    with shoal.load(path, context=1024) as model:
        model.set_entries(entries)
        assert answer(model, seed, length) == expected, entries
print(json.dumps(found))
"""


def walk(bundle, steps: int, checked: int) -> None:
    command = [sys.executable, "-c", WALK, str(bundle), str(steps), str(checked)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == steps and sum(one["free"] for one in found) > steps // 2
    for last, one in zip([found[0], *found], found, strict=False):
        assert one["moving"] <= 1.03 * max(last["memory"], one["memory"]), (last, one)
        assert max(one["held"], one["rows"]) <= 1.03 * one["memory"], one
        assert one["peak"] <= 1.03 * one["memory"], one
        # The next entry would not have fitted
        assert not one["free"] or one["held"] >= 0.97 * one["memory"] - one["more"], one


def test_a_short_walk(smollm2_stack):
    walk(smollm2_stack, 20, 2)


@pytest.mark.deep
def test_a_long_walk(smollm2_stack):
    walk(smollm2_stack, 200, 20)
