"""Speed and memory, measured so that two engines can be compared: every repetition runs each arm once, in turn.

The tests are llama-bench's: `pp` takes a prompt of n tokens, `tg` generates n tokens, both at a depth of d tokens that
are already in the cache. A decode speed is shown beside a stream read of the same bytes in the same run, which is what
the memory allows. It knows nothing about the command line; results are values (bench_report.py shows them).
"""

import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from shoal.runtime import measure
from shoal.runtime.errors import BackendError, ShoalError, UsageError
from shoal.runtime.events import Event, Progress, silent

from . import bench_machine as machine
from .bench_arms import Arm, Run, ShoalArm, Test, rival

__all__ = ["Run", "Test", "load_times", "measure_model", "rival", "run", "sustained"]
_REST = 0.1  # seconds between two arms: threads that spin in the hope of more work have given up by then
_WINDOW = 32  # tokens of one figure of a sustained run
_LOADS = 3  # cold and warm each, of which the median counts
_STAYED = 0.01  # the share of a file that may stay cached for a load to be called cold


@dataclass
class Result:
    """One test on one arm, one run a repetition."""

    arm: str
    test: Test
    runs: list[Run] = field(default_factory=list)

    @property
    def mean(self) -> float:
        return statistics.fmean(run.tokens_per_s for run in self.runs)

    @property
    def deviation(self) -> float:
        return statistics.stdev(run.tokens_per_s for run in self.runs) if len(self.runs) > 1 else 0.0


def run(
    arms: Sequence[Arm], tests: Sequence[Test], repetitions: int = 5, *, vocab: int,
    stream: machine.Stream | None = None, progress: Progress = silent, stage: str = "bench", seed: int = 7,
) -> tuple[list[Result], list[float]]:  # fmt: skip
    """Runs every test `repetitions` times on every arm, arms in turn, all with the same random tokens below `vocab`.

    Returns the results and the bytes a second that `stream` read after each repetition of a tg test.
    """
    draw = np.random.default_rng(seed)
    results, speeds, done = list[Result](), list[float](), 0
    for test in tests:
        rows = [Result(arm.name, test) for arm in arms]
        for _ in range(repetitions):
            ids = draw.integers(0, vocab, test.prompt).tolist()  # new ones: nothing of them is in a cache
            for arm, row in zip(arms, rows, strict=True):
                row.runs.append(arm.run(test, ids))
                done += 1
                if len(arms) > 1:
                    time.sleep(_REST)
                progress(Event(stage, done, len(arms) * len(tests) * repetitions, f"{arm.name} {test}", "runs"))
            if stream and test.kind == "tg":
                speeds.append(stream.run())
        results += rows
    return results, speeds


def sustained(arm: Arm, seconds: float, vocab: int, window: int = _WINDOW) -> Iterator[dict]:
    """Decodes `window` tokens again and again for `seconds`; yields each window's time, speed, temperature and the
    energy used so far, "unavailable" where there is no sensor that can be read."""
    started, energy, test = time.perf_counter(), machine.Energy(), Test("tg", window)
    ids = [int(np.random.default_rng(7).integers(0, vocab))]
    while (elapsed := time.perf_counter() - started) < seconds:
        speed = arm.run(test, ids).tokens_per_s
        heat, joules = machine.celsius(), energy.joules()
        yield {
            "at_s": round(elapsed, 2), "tokens": window, "decode_tokens_per_s": speed,
            "celsius": "unavailable" if heat is None else heat, "joules": "unavailable" if joules is None else joules,
        }  # fmt: skip


def load_times(bundle: str, loading: dict, progress: Progress = silent) -> tuple[dict[str, float | None], str]:
    """Medians of the seconds that `load` takes in a fresh process, imports not counted: {"cold", "warm"}, and why
    there is no cold one ("" where there is). Cold means that no page of the bundle and of what was prepared from it is
    cached; the kernel is asked afterwards whether that is so."""
    files = _load(bundle, loading)["files"]  # this one prepares the weights where that is still to be done
    found: dict[str, list[float]] = {"cold": [], "warm": []}
    note = ""
    for repetition in range(_LOADS):
        progress(Event("load", repetition, _LOADS, "cold and warm", "times"))
        stayed = [machine.drop_cached(path) for path in files]
        size = sum(map(os.path.getsize, files))
        if None in stayed:
            note = "this system does not let a program empty its page cache, or does not tell"
        elif (kept := sum(map(int, filter(None, stayed)))) > _STAYED * size:
            note = f"{kept / 2**20:.1f} of {size / 2**20:.1f} MiB stayed in the page cache"
        found["cold"].append(_load(bundle, loading)["seconds"])
        found["warm"].append(_load(bundle, loading)["seconds"])
    progress(Event("load", _LOADS, _LOADS, "", "times"))
    return {"cold": None if note else statistics.median(found["cold"]), "warm": statistics.median(found["warm"])}, note


_LOAD = """
import json, sys, time
from shoal.runtime.model import load
started = time.perf_counter()
with load(sys.argv[1], **json.loads(sys.argv[2])) as model:
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "files": sorted(set(model.parts.mapped.values()))}))
"""


def _load(bundle: str, loading: dict) -> dict:
    """Loads in a fresh process: seconds, and the files that were mapped."""
    command = [sys.executable, "-P", "-c", _LOAD, bundle, json.dumps(loading)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
        return json.loads(done.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        why = (done.stderr.strip().splitlines() or ["no reason"])[-1] if isinstance(error, ValueError) else str(error)
        raise BackendError("The model does not load in a fresh process.", why[:400], "Run shoal doctor.") from None


def measure_model(
    bundle: str | Path, tests: Sequence[Test], *, repetitions: int = 5, threads: int = 0,
    against: Sequence[Callable[..., Arm]] = (), sustained_s: float | None = None, progress: Progress = silent,
    **loading: Any,
) -> dict:  # fmt: skip
    """The whole report of `shoal bench`, a value of JSON's types (docs/bench.md lists its keys).

    `against` make further arms from threads= and context=; `loading` are memory, kv and chunk as `load` takes them.
    Raises UsageError, BudgetError and what loading raises.
    """
    from shoal.runtime.backends import discover
    from shoal.runtime.model import load, plan

    if not tests or repetitions < 1 or (sustained_s is not None and not 0 < sustained_s < math.inf):
        raise UsageError("Nothing would be measured.", "No test, repetition or second is left.", "Ask for some.")
    bundle, threads = str(bundle), threads or machine.threads()
    card, recipe = describe(bundle)
    needed = max(test.context for test in tests)
    if needed > card.max_context:
        why = f"The tests need {needed} tokens, the model was trained for {card.max_context}."
        raise UsageError("The tests do not fit the model's context.", why, "Ask for shorter lengths or depths.")
    context = min(max(needed, 256), card.max_context)
    loading = {**loading, "context": context}
    plan(bundle, **loading)  # what cannot fit is refused before anything is started
    devices = {device.name: device.title for found in discover() for device in found.devices}
    loading["threads"] = threads
    with contextlib.ExitStack() as stack:
        # They are started first: a missing package is told now, not after minutes
        others = [stack.enter_context(contextlib.closing(make(threads=threads, context=context))) for make in against]
        load_s, note = load_times(bundle, loading, progress)
        before = measure.anonymous_bytes()
        with contextlib.suppress(OSError):  # what this process held earlier is nothing of the model's
            Path("/proc/self/clear_refs").write_text("5")
        # Sampling costs a little, so it goes around runs that are not counted
        with measure.PeakAnonymous() as loading_peak:
            model = load(bundle, progress=progress, **loading)
            ours = stack.enter_context(contextlib.closing(ShoalArm(model)))
        with measure.PeakAnonymous() as running_peak:
            # Another seed: an engine that keeps prompts would know the first ones
            run([ours, *others], tests, 1, vocab=card.vocab, progress=progress, stage="warm up", seed=8)
        memory = {arm.name: arm.memory() for arm in (ours, *others)}
        peaks = {
            stage: None if peak.bytes is None or before is None else peak.bytes - before
            for stage, peak in (("loading", loading_peak), ("running", running_peak))
        }
        stream = stack.enter_context(contextlib.closing(machine.Stream(step_ranges(model), threads)))
        load_beside = machine.Others()
        results, streamed = run([ours, *others], tests, repetitions, vocab=card.vocab, stream=stream, progress=progress)
        beside = load_beside.cores()
        own = [result for result in results if result.arm == ours.name]
        decode = next((result for result in own if result.test.kind == "tg"), None)
        prefill = next((result for result in own if result.test.kind == "pp"), None)
        firsts = [run.first_s for run in (prefill or own[0]).runs if run.first_s is not None]
        report = {
            "model": card.name, "recipe": recipe, "bundle": Path(bundle).name, "digest": model.bundle.digest,
            **_versions(), "processor": machine.processor(), "threads": threads, "repetitions": repetitions,
            "cores_of_others": beside,
            "results": rows(results, stream.bytes, statistics.fmean(streamed) if streamed else None),
            "prefill_tokens_per_s": prefill and prefill.mean, "decode_tokens_per_s": decode and decode.mean,
            "time_to_first_token_s": statistics.fmean(firsts), "load_s": load_s, "load_note": note,
            "peak_anonymous_bytes": max((held for held in peaks.values() if held is not None), default=None),
            "peak_anonymous_of": peaks,
            "planned_anonymous_bytes": model.plan.anonymous, "step_bytes": stream.bytes,
            "decode_gb_per_s": decode and decode.mean * stream.bytes / 1e9,
            "stream_read_gb_per_s": statistics.fmean(streamed) / 1e9 if streamed else None,
            "backend_nodes": model.backend_nodes, "devices": devices, "memory": memory,
            "plan": model.plan.to_dict(),
        }  # fmt: skip
        if sustained_s:
            report["sustained"] = windows = []
            for window in sustained(ours, sustained_s, card.vocab, min(_WINDOW, context - 2)):
                windows.append(window)
                progress(Event("sustained", int(window["at_s"]), int(sustained_s), unit="s"))
        return report


def rows(results: Sequence[Result], step_bytes: int, streamed: float | None) -> list[dict]:
    """The results as values. `ratio` is the first arm's mean over this arm's; GB/s and their share of the stream read
    are of the first arm's tg tests, whose steps read `step_bytes` of weights."""
    first = {result.test: result for result in reversed(results) if result.arm == results[0].arm}
    found = []
    for result in results:
        mine = result is first[result.test]
        rate = result.mean * step_bytes if mine and result.test.kind == "tg" else None
        found.append({
            "arm": result.arm, "test": str(result.test), "kind": result.test.kind, "tokens": result.test.tokens,
            "depth": result.test.depth, "mean": result.mean, "deviation": result.deviation,
            "speeds": [run.tokens_per_s for run in result.runs],
            "ratio": None if mine else first[result.test].mean / result.mean,
            "gb_per_s": rate and rate / 1e9, "of_stream_read": rate and streamed and rate / streamed,
        })  # fmt: skip
    return found


def describe(bundle: str):
    """The card and the recipe's name. Raises UsageError for what does not generate."""
    from shoal.runtime.bundle import Bundle
    from shoal.runtime.card import Card

    with Bundle.open(bundle) as opened:
        card = Card.from_json(opened.bytes(opened.section("card")))
        try:
            name = json.loads(opened.bytes(opened.section("recipe")))["name"]
        except (ShoalError, ValueError, LookupError, TypeError):  # it is for people only
            name = "unknown recipe"
    if card.task != "generate":
        raise UsageError(
            f"{card.name} cannot be measured.", "It embeds texts; bench generates.", "Name another bundle."
        )
    return card, name


def step_ranges(model) -> list[tuple[str, int, int]]:
    """Where the weights lie that a decode step reads whole, (path, offset, bytes): what was prepared, and of the bundle
    the products', what counts of the stack, and of a mixture as many experts as a token uses, whoever they are."""
    found = []
    if (prepared := model.parts.prepared) and prepared.repacked:
        found.append((str(prepared.path), 0, min(prepared.repacked, os.path.getsize(prepared.path))))
    if stack := model.stack:
        path, start = str(model.bundle.path), model.bundle.section("stack", "blocks").offset
        live = [
            one.live(count) for one, count in zip(stack.index.matrices, stack.index.counts(stack.entries), strict=True)
        ]
        entries = (entry for entry in stack.index.entries() if entry.step in live[entry.matrix])
        found += [(path, start + entry.offset, entry.length) for entry in entries]
    if model.experts:
        index, path = model.experts.index, str(model.bundle.path)
        record, start = index.precisions[0], model.bundle.section("experts", "records").offset
        used = (
            (layer, expert) for layer in range(index.layers) for expert in range(min(model.card.top_k, index.experts))
        )
        found += [(path, start + index.offset(0, *one), record.down_at + record.down.bytes) for one in used]
    return found + [(place.path, offset, length) for place, offset, length in model.parts.products]


def _versions() -> dict[str, str]:
    from shoal.runtime.session import versions

    from . import __version__

    return {"shoal": __version__, "onnxruntime": versions()["onnxruntime"]}
