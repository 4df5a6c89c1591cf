"""The checkout's own Python: `.venv` with this checkout installed, made once, quick afterwards.

Standard library only, so it runs before anything is installed; any Python from 3.11 and any pip from 23. Knows nothing
about models.
"""

from __future__ import annotations  # so that a Python that is too old gets as far as being told

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
_STAMP = VENV / "shoal-installed.json"
_TOLD_BY_PIP = ("Collecting ", "Downloading ", "Obtaining ", "Building ", "Preparing ", "Installing ", "Using cached ")


class SetupError(Exception):
    """Why there is no environment and what to do, as sentences for a person."""


def enter(*extras: str) -> None:
    """Goes on in `.venv` with `extras` installed: returns where this Python is that one, else starts the program again.

    Ends the program with a sentence on stderr where it cannot be made.
    """
    try:
        prepare(*extras)
    except SetupError as error:
        sys.exit(str(error))
    if Path(sys.prefix) != VENV:
        command = [str(PYTHON), *sys.argv]
        if os.name == "nt":  # there, exec would hand the terminal back to the shell
            sys.exit(subprocess.call(command))
        sys.stdout.flush()
        os.execv(command[0], command)


def prepare(*extras: str) -> None:
    """Makes `.venv` and installs the checkout in it, editable, with `extras`; does nothing where that was done before
    and what an install reads is as it was. Raises SetupError."""
    if sys.version_info < (3, 11):  # noqa: UP036  the sentence for whoever has an older one
        raise SetupError(
            f"shoal needs Python 3.11 or later, and this is {sys.version.split()[0]}.\n"
            "Run this with a newer one, such as python3.11."
        )
    wanted = {"project": _digest(), "extras": sorted(extras)}
    found = _read_stamp()
    found_extras = found.get("extras", [])
    if PYTHON.exists() and found.get("project") == wanted["project"] and set(extras) <= set(found_extras):
        return
    wanted["extras"] = sorted({*extras, *found_extras})
    if not _has_pip():  # never made, or stopped half way
        _make()
    _install(wanted["extras"])
    _STAMP.write_text(json.dumps(wanted))


def _digest() -> str:
    """Of what an install reads: the project's description, the kernels it compiles, and whether it can."""
    kernels = ROOT / "runtime" / "kernels"
    sources = [path for kind in ("build.py", "*.cpp", "*.h", "*.inl") for path in sorted(kernels.glob(kind))]
    digest = hashlib.sha256(repr([os.environ.get("CXX"), *map(shutil.which, ("c++", "g++", "clang++"))]).encode())
    for path in (ROOT / "pyproject.toml", ROOT / "setup.py", *sources):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def _read_stamp() -> dict:
    try:
        return json.loads(_STAMP.read_text())
    except (OSError, ValueError):
        return {}


def _has_pip() -> bool:
    command = [str(PYTHON), "-m", "pip", "--version"]
    return PYTHON.exists() and subprocess.run(command, capture_output=True).returncode == 0


def _make() -> None:
    with Line("making .venv") as line:
        code, output = run([sys.executable, "-m", "venv", "--clear", str(VENV)], line)
        if code:
            fix = "Install Python's venv module (on Debian: apt install python3-venv) and run this again."
            if "ensurepip" not in output and "No module named venv" not in output:
                fix = f"Python said:\n{_last(output)}"
            raise SetupError(f"The environment {VENV} could not be made.\n{fix}")


def _install(extras: list[str]) -> None:
    command = [str(PYTHON), "-m", "pip", "install", "--editable", f"{ROOT}[{','.join(extras)}]",
               "--disable-pip-version-check", "--no-input", "--progress-bar", "off"]  # fmt: skip
    with Line("installing packages in .venv (once)") as line:
        code, output = run(command, line)
        if code:
            raise SetupError(
                "The packages that shoal needs could not be installed.\n"
                f"pip said:\n{_last(output)}\n"
                "If the network was down, run this again: it goes on where it stopped. To start over, delete .venv."
            )


def run(command: list[str], line: Line, **options) -> tuple[int, str]:
    """Runs `command` and shows on `line` what it is doing. Returns its exit status and all it printed."""
    printed = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                          **options) as process:  # fmt: skip
        assert process.stdout is not None
        for text in process.stdout:
            printed.append(text)
            if text.lstrip().startswith(_TOLD_BY_PIP):
                line.tell(text.strip())
    return process.returncode, "".join(printed)


def _last(output: str, lines: int = 8) -> str:
    """The lines of pip's output that matter: its errors, or else the end."""
    found = [text for text in output.splitlines() if text.strip()]
    errors = [text for text in found if text.lstrip().startswith("ERROR:")]
    return "\n".join(f"  {text.strip()}" for text in (errors or found)[-lines:])


class Line:
    """One stage of work: a line that changes on a terminal, a line at its start and end elsewhere."""

    def __init__(self, stage: str):
        self._stage, self._began = stage, time.monotonic()
        self._terminal = sys.stderr.isatty()

    def __enter__(self) -> Line:
        self._write(f"{self._stage} …", end="")
        return self

    def tell(self, detail: str) -> None:
        """What it is doing now."""
        if self._terminal:
            self._write(f"{self._stage} … {detail}", end="")

    def bar(self, done: int, total: int) -> None:
        """`done` of `total` bytes."""
        part = min(done / total, 1.0)
        self.tell(f"{'#' * round(20 * part):20} {part:4.0%} of {total / 2**20:.0f} MiB")

    def __exit__(self, kind, *_) -> None:
        end = "stopped" if kind else f"{time.monotonic() - self._began:.0f} s"
        self._write(f"{self._stage} … {end}", end="\n")

    def _write(self, text: str, end: str) -> None:
        if self._terminal:
            width = (os.get_terminal_size(sys.stderr.fileno()).columns or 80) - 1  # 0 where nobody has said
            text = f"\r{text[:width]:{width}}"
        elif not end:
            end = "\n"
        sys.stderr.write(text + end)
        sys.stderr.flush()
