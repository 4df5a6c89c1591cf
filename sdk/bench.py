"""Speed and memory, measured so that two engines can be compared: every repetition runs each arm once, in turn.

The tests are llama-bench's: `pp` takes a prompt of n tokens, `tg` generates n tokens, both at a depth of d tokens that
are already in the cache. A decode speed is shown beside a stream read of the same bytes in the same run, which is what
the memory allows. It knows nothing about the command line; results are values.
"""

import csv
import dataclasses
import io
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from .runtime import measure
from .runtime.events import Event, Progress, silent

_TOKENS = np.random.default_rng(7)


@dataclass(frozen=True)
class Test:
    """`kind` pp or tg; `tokens` of prompt or of answer; `depth` tokens before them."""

    kind: str
    tokens: int
    depth: int = 0

    def __str__(self) -> str:
        return f"{self.kind}{self.tokens}" + (f" @ d{self.depth}" if self.depth else "")


@dataclass
class Result:
    """Tokens a second of one test on one arm, one entry a repetition."""

    arm: str
    test: Test
    speeds: list[float] = field(default_factory=list)

    @property
    def mean(self) -> float:
        return statistics.fmean(self.speeds)

    @property
    def deviation(self) -> float:
        return statistics.stdev(self.speeds) if len(self.speeds) > 1 else 0.0


class Arm(Protocol):
    """An engine with a model loaded."""

    name: str

    def run(self, test: Test) -> float:
        """Tokens a second of one run."""

    def close(self) -> None: ...


class ShoalArm:
    """A loaded shoal model through its public API."""

    def __init__(self, model, name: str = "shoal"):
        self.model, self.name = model, name

    def run(self, test: Test) -> float:
        # Fresh ids each time, so that no prompt is found in the cache but the depth that was just put there
        ids = _TOKENS.integers(0, self.model.card.vocab, test.depth + test.tokens + 1).tolist()
        options = {"ignore_end": True, "temperature": 0.0}
        if test.kind == "pp":
            if test.depth:
                self.model.generate(ids[: test.depth], max_tokens=1, **options).finish()
            done = self.model.generate(ids[: test.depth + test.tokens], max_tokens=1, **options)
            done.finish()
            return done.stats.prefill_tokens_per_s
        done = self.model.generate(ids[: max(1, test.depth)], max_tokens=test.tokens + 1, **options)
        done.finish()
        return done.stats.decode_tokens_per_s

    def close(self) -> None:
        self.model.close()


class LlamaCppArm:
    """llama.cpp through the xllamacpp package, in a process of its own that sleeps while others run."""

    def __init__(self, gguf: str, threads: int, context: int, python: str = sys.executable, options: str = ""):
        self.name = f"llama.cpp{' ' + options if options else ''} {Path(gguf).name}"
        worker = Path(__file__).with_name("bench_llama_cpp.py")
        self.process = subprocess.Popen(
            [python, str(worker), gguf, str(threads), str(context), options],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self.vocab = self._read()["vocab"]

    def run(self, test: Test) -> float:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(dataclasses.asdict(test)) + "\n")
        self.process.stdin.flush()
        return self._read()["tokens_per_s"]

    def _read(self) -> dict:
        from .runtime.errors import BackendError

        assert self.process.stdout
        line = self.process.stdout.readline()
        answer = json.loads(line) if line.startswith("{") else {"error": "it ended without an answer"}
        if "error" in answer:
            raise BackendError(
                "llama.cpp cannot be measured.",
                answer["error"],
                "Install xllamacpp, or give --against-python its Python.",
            )
        return answer

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def run(arms: Sequence[Arm], tests: Sequence[Test], repetitions: int = 5, progress: Progress = silent) -> list[Result]:
    """Runs every test `repetitions` times on every arm, arms in turn, after one run that is not counted."""
    results = []
    total = len(arms) * len(tests) * (repetitions + 1)
    done = 0
    for test in tests:
        rows = [Result(arm.name, test) for arm in arms]
        for repetition in range(repetitions + 1):
            for arm, row in zip(arms, rows, strict=True):
                speed = arm.run(test)
                if repetition:
                    row.speeds.append(speed)
                done += 1
                progress(Event("bench", done, total, f"{arm.name} {test}"))
        results += rows
    return results


def stream_read(paths: Sequence[tuple[str, int, int]], threads: int) -> float:
    """Bytes a second at which `threads` threads read ranges (path, offset, bytes) of mapped files: the best of five."""
    from concurrent.futures import ThreadPoolExecutor

    parts = []
    for path, offset, length in paths:
        data = np.memmap(path, np.uint8, "r", offset, (length // 8 * 8,)).view(np.uint64)
        parts += np.array_split(data, max(1, threads * 4))
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(6):  # the first brings the pages in
            started = time.perf_counter()
            list(pool.map(np.bitwise_or.reduce, [part for part in parts if len(part)]))
            best = max(best, sum(part.nbytes for part in parts) / (time.perf_counter() - started))
    return best


def load_times(command: Callable[[], list[str]], files: Sequence[str]) -> dict[str, float]:
    """Seconds that `load` takes in a fresh process: cold (the files dropped from the page cache) and warm."""
    import os

    found = {}
    for kind in ("cold", "warm"):
        if kind == "cold":
            for path in files:
                fd = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(fd)
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                finally:
                    os.close(fd)
        output = subprocess.run(command(), capture_output=True, text=True, timeout=600, check=True).stdout
        found[kind] = float(output.strip().splitlines()[-1])
    return found


def sustained(arm: Arm, seconds: float, window: int = 32) -> Iterator[dict]:
    """Decodes windows of tokens for `seconds`; yields each window's time, speed, temperature and energy so far.

    Temperature (degrees) and energy (joules) are None where the machine has no sensor that can be read.
    """
    started, energy = time.perf_counter(), joules()
    while (elapsed := time.perf_counter() - started) < seconds:
        speed = arm.run(Test("tg", window))
        now = joules()
        yield {
            "at_s": round(elapsed, 2), "decode_tokens_per_s": speed, "celsius": celsius(),
            "joules": None if now is None or energy is None else now - energy,
        }  # fmt: skip


def celsius(root: str = "/sys/class/thermal") -> float | None:
    """The hottest zone's temperature."""
    found = [_number(path) for path in Path(root).glob("thermal_zone*/temp")]
    return max((value / 1000 for value in found if value is not None), default=None)


def joules(root: str = "/sys/class/powercap") -> float | None:
    """Energy counters of all packages (RAPL), summed."""
    found = [_number(path) for path in Path(root).glob("*-rapl:?/energy_uj")]
    counted = [value / 1e6 for value in found if value is not None]
    return sum(counted) if counted else None


def _number(path: Path) -> float | None:
    try:
        return float(path.read_text())
    except (OSError, ValueError):
        return None


def render(report: dict, form: str) -> str:
    """The report as md, csv or json."""
    if form == "json":
        return json.dumps(report, indent=1)
    header = ["arm", "test", "tokens/s", "deviation", "ratio"]
    rows = [
        [
            r["arm"],
            r["test"],
            f"{r['mean']:.1f}",
            f"{r['deviation']:.1f}",
            "" if r["ratio"] is None else f"{r['ratio']:.2f}",
        ]
        for r in report["results"]
    ]
    if form == "csv":
        text = io.StringIO()
        csv.writer(text).writerows([header, *rows])
        return text.getvalue()
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    facts = [
        f"- {key}: {value:.4g}" if isinstance(value, float) else f"- {key}: {value}"
        for key, value in report.items()
        if key != "results"
    ]
    return "\n".join([*lines, "", *facts]) + "\n"


def ratios(results: Sequence[Result]) -> list[dict]:
    """Rows as dicts; `ratio` is the first arm's mean over this arm's, in the same run."""
    first = {str(result.test): result for result in results if result.arm == results[0].arm}
    return [
        {
            "arm": result.arm, "test": str(result.test), "mean": result.mean, "deviation": result.deviation,
            "speeds": result.speeds,
            "ratio": None if result.arm == results[0].arm else first[str(result.test)].mean / result.mean,
        }
        for result in results
    ]  # fmt: skip


def measure_model(
    bundle: str, tests: Sequence[Test], arms: list[Arm], *, context: int, threads: int, repetitions: int = 5,
    against: Sequence[Callable[[], Arm]] = (), sustained_s: float | None = None, progress: Progress = silent, **options,
) -> dict:  # fmt: skip
    """The whole report of `shoal bench`. Arms are appended to `arms`, so that the caller closes them whatever happens."""
    from .runtime.bundle import Bundle
    from .runtime.model import load

    with Bundle.open(bundle) as opened:
        weights = opened.section("weights", "weights")
    loads = load_times(
        lambda: [
            sys.executable,
            "-c",
            _LOAD,
            str(bundle),
            json.dumps({**options, "context": context, "threads": threads}),
        ],
        [str(bundle)],
    )
    with measure.PeakAnonymous() as peak:
        before = measure.anonymous_bytes() or 0
        model = load(bundle, context=context, threads=threads, progress=progress, **options)
        arms.append(ShoalArm(model))
        results = run(arms, tests, repetitions, progress)  # alone first: the peak is ours
        growth = None if peak.bytes is None else peak.bytes - before
    if against:
        arms.extend(make() for make in against)
        results = run(arms, tests, repetitions, progress)
    own = [result for result in results if result.arm == arms[0].name]
    first = model.generate(_TOKENS.integers(0, model.card.vocab, 64).tolist(), max_tokens=1, ignore_end=True)
    first.finish()
    touched = sum(row.bytes for row in model.plan.rows if row.where == "mapped")
    stream = stream_read([(str(bundle), weights.offset, weights.length)], threads)
    decode = next((result.mean for result in own if result.test.kind == "tg"), None)
    report = {
        "results": ratios(results),
        "prefill_tokens_per_s": next((result.mean for result in own if result.test.kind == "pp"), None),
        "decode_tokens_per_s": decode,
        "time_to_first_token_s": first.stats.time_to_first_token_s,
        "load_s": loads,
        "peak_anonymous_bytes": growth,
        "mapped_bytes": touched,
        "decode_gb_per_s": decode and decode * touched / 1e9,
        "stream_read_gb_per_s": stream / 1e9,
        "backend_nodes": model.backend_nodes,
        "threads": threads,
        "plan": model.plan.to_dict(),
    }
    if sustained_s:
        report["sustained"] = [window for window in sustained(arms[0], sustained_s)]
    return report


_LOAD = """
import json, sys, time
from shoal.runtime.model import load
started = time.perf_counter()
load(sys.argv[1], **json.loads(sys.argv[2])).close()
print(time.perf_counter() - started)
"""
