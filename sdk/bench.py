"""Speed and memory, measured so that two engines can be compared: every repetition runs each arm once, in turn.

The tests are llama-bench's: `pp` takes a prompt of n tokens, `tg` generates n tokens, both at a depth of d tokens that
are already in the cache. A decode speed is shown beside a stream read of the same bytes in the same run, which is what
the memory allows. It knows nothing about the command line; results are values (bench_report.py shows them).
"""

import contextlib
import json
import math
import os
import select
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from shoal.runtime import measure
from shoal.runtime.errors import BackendError, MissingPackageError, ShoalError, UsageError
from shoal.runtime.events import Event, Progress, silent

from . import bench_machine as machine
from .bench_llama_cpp import parse

_LONGEST_ANSWER = 1 << 16  # bytes of a line from an engine's process
_WINDOW = 32  # tokens of one figure of a sustained run
_LOADS = 3  # cold and warm each, of which the median counts
_STAYED = 0.01  # the share of a file that may stay cached for a load to be called cold


@dataclass(frozen=True)
class Test:
    """`kind` pp or tg; `tokens` of prompt or of answer; `depth` tokens before them."""

    kind: str
    tokens: int
    depth: int = 0

    def __str__(self) -> str:
        return f"{self.kind}{self.tokens}" + (f" @ d{self.depth}" if self.depth else "")

    @property
    def prompt(self) -> int:
        """Tokens that are given; an answer needs one at least to begin after."""
        return self.depth + self.tokens if self.kind == "pp" else max(1, self.depth)

    @property
    def context(self) -> int:
        """Tokens that are held at the end."""
        return self.prompt + 1 + (self.tokens if self.kind == "tg" else 0)


@dataclass(frozen=True)
class Run:
    """One run of one test; `first_s` are the seconds to the first token, where the engine tells."""

    tokens_per_s: float
    first_s: float | None = None


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


class Arm(Protocol):
    """An engine with a model loaded."""

    name: str

    def run(self, test: Test, ids: list[int]) -> Run:
        """Runs once with the `test.prompt` token ids that every arm gets."""

    def memory(self) -> dict[str, int]:
        """Bytes that its process holds, where the system tells: anonymous_bytes, mapped_bytes."""

    def close(self) -> None: ...


class ShoalArm:
    """A loaded shoal model through its public API."""

    name = "shoal"

    def __init__(self, model):
        self.model = model

    def run(self, test: Test, ids: list[int]) -> Run:
        if test.kind == "pp" and test.depth:
            self._answer(ids[: test.depth], 1)
        # The first token comes with the prompt: n + 1 tokens are n steps
        stats = self._answer(ids, 1 if test.kind == "pp" else test.tokens + 1)
        speed = stats.prefill_tokens_per_s if test.kind == "pp" else stats.decode_tokens_per_s
        return Run(speed, stats.time_to_first_token_s)

    def _answer(self, ids: list[int], tokens: int):
        answer = self.model.generate(ids, max_tokens=tokens, ignore_end=True)
        answer.finish()
        return answer.stats

    def memory(self) -> dict[str, int]:
        return _memory(os.getpid())

    def close(self) -> None:
        self.model.close()


class LlamaCppArm:
    """llama.cpp through the xllamacpp package, in a process of its own that sleeps while others run.

    `options` are those of bench_llama_cpp.parse, `python` has xllamacpp. What the process says is not trusted: an
    answer is one bounded line of JSON within `patience` seconds. Raises MissingPackageError, UsageError, BackendError.
    """

    def __init__(
        self, gguf: str, options: Sequence[str], *, threads: int, context: int, python: str = sys.executable,
        patience: float = 900.0,
    ):  # fmt: skip
        self.name = " ".join(["llama.cpp", Path(gguf).name, *options])
        self._patience, self._python = patience, python
        self._said = tempfile.TemporaryFile()  # what llama.cpp logs, for when it ends
        worker = Path(__file__).with_name("bench_llama_cpp.py")
        command = [python, str(worker), gguf, str(threads), str(context), *options]
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said)
        except OSError as error:
            self._said.close()
            raise UsageError(f"{python} cannot be started.", str(error), "Name a Python that has xllamacpp.") from None
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    def run(self, test: Test, ids: list[int]) -> Run:
        assert self._process.stdin
        request = {"kind": test.kind, "tokens": test.tokens, "depth": test.depth, "ids": ids}
        watchdog = threading.Timer(self._patience, self._process.kill)  # a pipe that nobody reads is full one day
        watchdog.start()
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either, and that is told with its reason
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        watchdog.cancel()
        speed = self._read().get("tokens_per_s")
        if not isinstance(speed, int | float) or not 0 < speed < math.inf:
            raise self._failed(f"It answered with a speed of {speed!r:.40}.")
        return Run(float(speed))

    def _read(self) -> dict:
        assert self._process.stdout
        out, line, deadline = self._process.stdout.fileno(), b"", time.monotonic() + self._patience
        while b"\n" not in line:
            if not select.select([out], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise self._failed(f"It gave no answer in {self._patience:.0f} s.")
            part = os.read(out, 4096)
            line += part
            if not part:
                raise self._failed(f"It ended without an answer. {self._last_words()}".strip())
            if len(line) > _LONGEST_ANSWER:
                raise self._failed("Its answer is too long.")
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise self._failed("Its answer is not one line of JSON.")
        if answer.get("missing"):
            raise MissingPackageError(
                "llama.cpp needs a package that is not here.", f"{self._python}: {answer.get('error')!s:.200}",
                "Run: pip install xllamacpp (or give --against-python a Python that has it).",
            )  # fmt: skip
        if "error" in answer:
            raise self._failed(f"{answer['error']!s:.400} {self._last_words()}".strip())
        return answer

    def _last_words(self) -> str:
        self._said.seek(max(0, self._said.seek(0, os.SEEK_END) - 4096))
        said = [line for line in self._said.read().decode(errors="replace").splitlines() if line.strip()]
        return said[-1].strip()[:300] if said else ""

    def _failed(self, why: str) -> BackendError:
        why = "".join(character for character in why if character.isprintable())
        return BackendError(f"{self.name} cannot be measured.", why, "Check the GGUF file, its options and memory.")

    def memory(self) -> dict[str, int]:
        return _memory(self._process.pid)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._said):
            assert pipe
            with contextlib.suppress(OSError):  # what could not be written is lost
                pipe.close()


def llama_cpp(text: str, python: str = sys.executable) -> Callable[..., LlamaCppArm]:
    """What makes the arm for "FILE.gguf", or "FILE.gguf -fa off" with options of llama.cpp. Raises UsageError."""
    path, options = text, list[str]()
    while not os.path.isfile(path) and " -" in path:
        path, _, rest = path.rpartition(" -")
        options = [*f"-{rest}".split(), *options]
    try:
        parse(options)
    except ValueError as error:
        raise UsageError(f"llama.cpp cannot be run with {' '.join(options)!r}.", f"{error}.", "Correct it.") from None
    if not os.path.isfile(path):
        raise UsageError(f"There is no file {path!r}.", "llama.cpp needs one.", "Write --against llama.cpp=FILE.gguf.")
    return lambda **limits: LlamaCppArm(path, options, python=python, **limits)


def run(
    arms: Sequence[Arm], tests: Sequence[Test], repetitions: int = 5, *, vocab: int,
    stream: machine.Stream | None = None, progress: Progress = silent, stage: str = "bench",
) -> tuple[list[Result], list[float]]:  # fmt: skip
    """Runs every test `repetitions` times on every arm, arms in turn, all with the same random tokens below `vocab`.

    Returns the results and the bytes a second that `stream` read after each repetition of a tg test.
    """
    draw = np.random.default_rng(7)
    results, speeds, done = list[Result](), list[float](), 0
    for test in tests:
        rows = [Result(arm.name, test) for arm in arms]
        for _ in range(repetitions):
            ids = draw.integers(0, vocab, test.prompt).tolist()  # new ones: nothing of them is in a cache
            for arm, row in zip(arms, rows, strict=True):
                row.runs.append(arm.run(test, ids))
                done += 1
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
    from shoal.runtime.model import load, plan

    if not tests or repetitions < 1 or (sustained_s is not None and not 0 < sustained_s < math.inf):
        raise UsageError("Nothing would be measured.", "No test, repetition or second is left.", "Ask for some.")
    bundle, threads = str(bundle), threads or machine.threads()
    card, recipe = _describe(bundle)
    needed = max(test.context for test in tests)
    if needed > card.max_context:
        why = f"The tests need {needed} tokens, the model was trained for {card.max_context}."
        raise UsageError("The tests do not fit the model's context.", why, "Ask for shorter lengths or depths.")
    context = min(max(needed, 256), card.max_context)
    loading = {**loading, "context": context}
    plan(bundle, **loading)  # what cannot fit is refused before anything is started
    loading["threads"] = threads
    with contextlib.ExitStack() as stack:
        # They are started first: a missing package is told now, not after minutes
        others = [stack.enter_context(contextlib.closing(make(threads=threads, context=context))) for make in against]
        load_s, note = load_times(bundle, loading, progress)
        before = measure.anonymous_bytes()
        # Sampling costs a little, so it goes around runs that are not counted
        with measure.PeakAnonymous() as loading_peak:
            model = load(bundle, progress=progress, **loading)
            ours = stack.enter_context(contextlib.closing(ShoalArm(model)))
        with measure.PeakAnonymous() as running_peak:
            run([ours, *others], tests, 1, vocab=card.vocab, progress=progress, stage="warm up")
        memory = {arm.name: arm.memory() for arm in (ours, *others)}
        peaks = {
            stage: None if peak.bytes is None or before is None else peak.bytes - before
            for stage, peak in (("loading", loading_peak), ("running", running_peak))
        }
        stream = stack.enter_context(contextlib.closing(machine.Stream(_step_ranges(model), threads)))
        results, streamed = run([ours, *others], tests, repetitions, vocab=card.vocab, stream=stream, progress=progress)
        own = [result for result in results if result.arm == ours.name]
        decode = next((result for result in own if result.test.kind == "tg"), None)
        prefill = next((result for result in own if result.test.kind == "pp"), None)
        firsts = [run.first_s for run in (prefill or own[0]).runs if run.first_s is not None]
        report = {
            "model": card.name, "recipe": recipe, "bundle": Path(bundle).name, "digest": model.bundle.digest,
            **_versions(), "processor": machine.processor(), "threads": threads, "repetitions": repetitions,
            "results": rows(results, stream.bytes, statistics.fmean(streamed) if streamed else None),
            "prefill_tokens_per_s": prefill and prefill.mean, "decode_tokens_per_s": decode and decode.mean,
            "time_to_first_token_s": statistics.fmean(firsts), "load_s": load_s, "load_note": note,
            "peak_anonymous_bytes": max((held for held in peaks.values() if held is not None), default=None),
            "peak_anonymous_of": peaks,
            "planned_anonymous_bytes": model.plan.anonymous, "step_bytes": stream.bytes,
            "decode_gb_per_s": decode and decode.mean * stream.bytes / 1e9,
            "stream_read_gb_per_s": statistics.fmean(streamed) / 1e9 if streamed else None,
            "backend_nodes": model.backend_nodes, "memory": memory,
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


def _describe(bundle: str):
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


def _step_ranges(model) -> list[tuple[str, int, int]]:
    """Where the weights lie that a decode step reads: what was prepared, else the bundle's own."""
    if (prepared := model.parts.prepared) and prepared.repacked:
        return [(str(prepared.path), 0, min(prepared.repacked, os.path.getsize(prepared.path)))]
    weights = model.bundle.section("weights", "weights")
    return [(str(model.bundle.path), weights.offset, weights.length)]


def _memory(process: int) -> dict[str, int]:
    try:
        status = measure.parse_status(Path(f"/proc/{process}/status").read_text(errors="replace"))
    except OSError:
        return {}
    return {"anonymous_bytes": status.get("RssAnon", 0), "mapped_bytes": status.get("RssFile", 0)}


def _versions() -> dict[str, str]:
    from shoal.runtime.session import versions

    from . import __version__

    return {"shoal": __version__, "onnxruntime": versions()["onnxruntime"]}
