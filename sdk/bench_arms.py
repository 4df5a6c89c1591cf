"""What can be measured: shoal through its public API, and other engines, each in a process of its own.

An arm answers with the speed of one test on token ids that it is given. It knows nothing about repetitions or reports.
"""

import contextlib
import json
import math
import os
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from shoal.runtime import measure
from shoal.runtime.errors import BackendError, MissingPackageError, UsageError

_LONGEST_ANSWER = 1 << 16  # bytes of a line from an engine's process


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


class Arm(Protocol):
    """An engine with a model loaded."""

    name: str

    def run(self, test: Test, ids: list[int]) -> Run:
        """Runs once with the `test.prompt` token ids that every arm gets."""

    def memory(self) -> dict[str, int]:
        """What `memory` tells of its process."""

    def close(self) -> None: ...


class ShoalArm:
    """A loaded shoal model through its public API."""

    def __init__(self, model, name: str = "shoal"):
        self.model, self.name = model, name

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
        return memory(os.getpid())

    def close(self) -> None:
        self.model.close()


@dataclass(frozen=True)
class Engine:
    """How another engine is run: the package that its Python needs, and the file beside this one that drives it.
    `options` are what may follow the model's path: a word and the values it takes, or none."""

    driver: str
    package: str  # its import name
    install: str
    options: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


_LLAMA_CPP = {"-fa": ("on", "off", "auto"), "--no-repack": ()}
ENGINES = {
    "llama.cpp": Engine("bench_llama_cpp", "xllamacpp", "xllamacpp", _LLAMA_CPP),
    "llama-cpp-python": Engine("bench_llama_cpp_python", "llama_cpp", "llama-cpp-python", _LLAMA_CPP),
    "openvino-genai": Engine("bench_openvino", "openvino_genai", "openvino-genai"),
    "onnxruntime-genai": Engine("bench_onnxruntime_genai", "onnxruntime_genai", "onnxruntime-genai"),
}


class ProcessArm:
    """Another engine in a process of its own that sleeps while others run.

    `engine` is a name of ENGINES, `python` has its package. What the process says is not trusted: an answer is one
    bounded line of JSON within `patience` seconds. Raises MissingPackageError, UsageError, BackendError.
    """

    def __init__(
        self, engine: str, model: str, options: Mapping[str, str], *, threads: int, context: int,
        python: str = sys.executable, patience: float = 900.0,
    ):  # fmt: skip
        words = [word for pair in options.items() for word in pair if word]
        self.name = " ".join([engine, Path(model).name, *words])
        self._engine, self._patience, self._python = ENGINES[engine], patience, python
        self._said = tempfile.TemporaryFile()  # what the engine logs, for when it ends
        worker, driver = Path(__file__).with_name("bench_worker.py"), self._engine
        command = [
            python, str(worker), driver.driver, driver.package, model, str(threads), str(context), json.dumps(options),
        ]  # fmt: skip
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said)
        except OSError as error:
            self._said.close()
            fix = f"Name a Python that has {driver.package}."
            raise UsageError(f"{python} cannot be started.", str(error), fix) from None
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
                f"{self.name} needs a package that is not here.", f"{self._python}: {answer.get('error')!s:.200}",
                f"Run: pip install {self._engine.install} (or give --against-python a Python that has it).",
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
        return BackendError(f"{self.name} cannot be measured.", why, "Check the model, its options and memory.")

    def memory(self) -> dict[str, int]:
        return memory(self._process.pid)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._said):
            assert pipe
            with contextlib.suppress(OSError):  # what could not be written is lost
                pipe.close()


def rival(text: str, pythons: Mapping[str, str] | None = None) -> Callable[..., ProcessArm]:
    """What makes the arm for "ENGINE=MODEL", or "ENGINE=MODEL -fa off" with options of that engine.

    `pythons` has the Python of an engine by its name, and that of all the others by ""; else it is this one. Raises
    UsageError.
    """
    name, _, path = text.partition("=")
    if name not in ENGINES:
        raise UsageError(
            f"There is no engine {name!r:.60}.", f"They are {', '.join(ENGINES)}.", "Write llama.cpp=FILE.gguf."
        )
    words: list[str] = []
    while not os.path.exists(path) and " -" in path:
        path, _, last = path.rpartition(" -")
        words = [*f"-{last}".split(), *words]
    options = _options(name, words)
    if not os.path.exists(path):
        raise UsageError(f"There is no file {path!r}.", f"{name} needs one.", f"Write --against {name}=MODEL.")
    python = {"": sys.executable, **(pythons or {})}
    return lambda **limits: ProcessArm(name, path, options, python=python.get(name, python[""]), **limits)


def _options(engine: str, words: list[str]) -> dict[str, str]:
    found, left, known = dict[str, str](), iter(words), ENGINES[engine].options
    for word in left:
        values = known.get(word)
        if values is None:
            why = f"{word} is not one of {', '.join(known)}." if known else "It takes no options."
        elif values and (value := next(left, "")) not in values:
            why = f"{word} takes one of {', '.join(values)}."
        else:
            found[word] = value if values else ""
            continue
        raise UsageError(f"{engine} cannot be run with {' '.join(words)!r}.", why, "Correct it.")
    return found


def memory(process: int) -> dict[str, int]:
    """Bytes of a whole process, {} where the system does not tell: private ones and those of files now, and the most
    of both together that there ever was."""
    try:
        status = measure.parse_status(Path(f"/proc/{process}/status").read_text(errors="replace"))
    except OSError:
        return {}
    names = {"anonymous_bytes": "RssAnon", "mapped_bytes": "RssFile", "peak_resident_bytes": "VmHWM"}
    return {name: status.get(row, 0) for name, row in names.items()}
