"""Who ran what when while a prompt went through static graphs: a Chrome trace, and how long each processor waited.

The prompt is taken once without being counted, and then under the clock. Beside what was measured stands what the same
subgraphs, each with the time that it took, would have taken chunk after chunk in strict order, and the least that any
order could. It knows nothing about the command line.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from shoal.runtime.errors import BackendError, StorageError, UsageError
from shoal.runtime.events import Progress, silent
from shoal.runtime.schedule import Run, Schedule, Task, chrome_trace, lower_bound, simulate

SEED = 7


def trace(
    bundle: str | Path, path: str | Path, *, prompt: int = 512, backend: str = "auto", threads: int = 0,
    kv: str = "fp32", memory: int | str | None = None, kernels: str = "auto", progress: Progress = silent,
) -> dict[str, Any]:  # fmt: skip
    """Takes a prompt of `prompt` random tokens through the bundle's static graphs on `backend` and writes the trace to
    `path`; of what runs in several parts, one after another, each begins where the one before ended.

    Returns seconds, pieces, and for each processor busy seconds and bubbles, a value of JSON's types. Raises
    BackendError where the bundle has no static graphs for the backend, StorageError where the file cannot be written,
    and what loading raises.
    """
    from shoal.runtime.model import load
    from shoal.runtime.static import profile

    with load(
        bundle, memory, backend, prefill="static", context=None if memory else max(prompt + 1, 64), threads=threads,
        kv=kv, kernels=kernels, progress=progress,
    ) as model:  # fmt: skip
        prefill, decoder = model.prefill, model.scheduler.decoder
        if prefill is None:
            raise BackendError("Nothing can be traced.", "No prompt goes through static graphs.", "Convert with some.")
        if prompt > decoder.cache.context:
            why = f"There is a context of {decoder.cache.context}."
            raise UsageError(f"A prompt of {prompt} tokens does not fit.", why, "Take a shorter one (-p).")
        if prefill.times is None:  # what a task is expected to take decides who goes first
            prefill.times = profile.measure(prefill, decoder, progress)
        ids = np.random.default_rng(SEED).integers(0, model.card.vocab, prompt).tolist()
        for counted in (False, True):
            prefill.recordings = [] if counted else None
            for start in range(0, prompt, decoder.most(alone=True)):
                part = ids[start : start + decoder.most(alone=True)]
                decoder.take(0, part, start, start + len(part) == prompt)
        made, title = prefill.recordings or [], model.placement
        whole = joined([one.schedule for one in made if one.schedule])
        found = {
            "model": model.card.name, "prompt_tokens": prompt, "backend": prefill.device,
            "provider": title.provider if title else "",
            "chunks": [piece.length for one in made for piece in one.pieces],
            "graphs": len(prefill.graphs.calls), **figures(whole, [one.schedule for one in made if one.schedule]),
        }  # fmt: skip
    try:
        Path(path).write_text(json.dumps(chrome_trace(whole) | {"shoal": found}))
    except OSError as error:
        raise StorageError(f"{path} cannot be written.", f"{error.strerror}.", "Name another file.") from None
    return found | {"trace": str(path)}


def joined(schedules: list[Schedule]) -> Schedule:
    """One after another."""
    tasks: list[Task] = []
    runs: list[Run] = []
    for schedule in schedules:
        at, count = max((run.end for run in runs), default=0.0), len(tasks)
        tasks += [
            Task(t.name, t.chunk, t.layer, t.part, t.seconds, tuple(count + need for need in t.needs))
            for t in schedule.tasks
        ]
        runs += [Run(count + r.task, r.processor, at + r.start, at + r.end) for r in schedule.runs]
    return Schedule(tuple(tasks), tuple(runs))


def figures(whole: Schedule, parts: list[Schedule]) -> dict[str, Any]:
    """Of what was measured; and, part by part, of the same subgraphs with their measured seconds in strict order, in
    the rule's, and the lower bound."""
    strict = ours = bound = 0.0
    for part in parts:
        took = {run.task: {run.processor: run.end - run.start} for run in part.runs}
        tasks = [Task(t.name, t.chunk, t.layer, t.part, took[at], t.needs) for at, t in enumerate(part.tasks)]
        strict += simulate(tasks, strict=True).makespan
        ours += simulate(tasks).makespan
        bound += lower_bound(tasks)
    return {
        "seconds": whole.makespan, "busy_s": whole.busy(), "bubbles": whole.bubbles(), "strict_s": strict,
        "rule_s": ours, "bound_s": bound,
    }  # fmt: skip


def render(found: dict[str, Any]) -> str:
    """The figures as text."""
    lengths = found["chunks"]
    chunks = ", ".join(f"{lengths.count(one)} x {one}" for one in dict.fromkeys(lengths))
    speed = found["prompt_tokens"] / found["seconds"] if found["seconds"] else 0.0
    lines = [
        f"{found['model']}: {found['prompt_tokens']} tokens in chunks of {chunks}, {found['graphs']} graphs on the "
        f"{found['backend']} ({found['provider']})",
        f"{found['seconds']:.3f} s, {speed:.1f} tokens/s; the same in strict order {found['strict_s']:.3f} s, "
        f"by the rule without threads {found['rule_s']:.3f} s, in no order less than {found['bound_s']:.3f} s",
        "",
        f"{'processor':12}{'busy s':>9}{'bubbles':>9}",
    ]
    for name, busy in found["busy_s"].items():
        lines.append(f"{name:12}{busy:9.3f}{found['bubbles'][name]:9.1%}")
    lines += ["", f"{found['trace']}: open it with ui.perfetto.dev or chrome://tracing", ""]
    return "\n".join(lines)
