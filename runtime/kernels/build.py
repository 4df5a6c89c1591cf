"""Compiles the kernels: every file with the flags of its instruction set, all into one shared library.

Standard library only, since setup.py runs it before anything is installed. `python build.py OUT` does it by hand. It
knows nothing about Python's own extension modules: the library has a C interface.
"""

import concurrent.futures
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = sorted(HERE.glob("*.cpp"))
LIBRARY = "libshoal_kernels.so"
_COMMON = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=off"]
_WARNINGS = ["-Wall", "-Wextra"]
_AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mfma", "-mf16c"]
_FLAGS = {
    "x86_64": {
        "avx2": ["-mavx2", "-mfma", "-mf16c", "-mpclmul"],
        "avx512": _AVX512,
        "amx": [*_AVX512, "-mamx-tile", "-mamx-int8"],
    },
    "aarch64": {
        "neon": ["-march=armv8.2-a+dotprod+fp16"],
        "i8mm": ["-march=armv8.6-a+dotprod+fp16+i8mm"],
    },
}
# GCC 12 takes the undefined vectors of its own AVX-512 intrinsics for mistakes of ours (its bug 105593)
_UNDEFINED = ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]
_QUIET = {"avx512": _UNDEFINED, "amx": _UNDEFINED}


class BuildError(Exception):
    """There is no compiler, or what it said."""


def compiler() -> list[str] | None:
    """The C++ compiler's command: $CXX, else the first that is found; None without one."""
    if os.environ.get("CXX"):
        return os.environ["CXX"].split()
    found = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    return [found] if found else None


class Compiler:
    """A C++ compiler's `command` and what it is told beside the kernels' own flags. What it says is a BuildError."""

    def __init__(self, command: Sequence[str] | None = None, extra: Sequence[str] = ()):
        self._command, self._extra = list(command or compiler() or ()), list(extra)
        if not self._command:
            raise BuildError("There is no C++ compiler: install g++ or clang, or set CXX.")
        machine = _run([*self._command, "-dumpmachine"]).partition("-")[0]
        self.machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)  # that it makes code for

    def flags(self, source: Path) -> list[str]:
        """What `source` is compiled with: its name ends in its instruction set. A compiler that is too old for that
        gets none of its flags, and the file then has nothing in it."""
        name = source.stem.rpartition("_")[2]
        wanted = (_FLAGS.get(self.machine, {}).get(name, []), _QUIET.get(name, []))
        return [flag for flags in wanted if _knows(tuple(self._command), tuple(flags)) for flag in flags]

    def compile(self, sources: Iterable[Path], folder: Path) -> list[Path]:
        """The object of each source, in `folder`."""

        def compile(source: Path) -> Path:
            target = folder / f"{source.stem}.o"
            flags = [*_COMMON, *_WARNINGS, *self.flags(source), *self._extra, f"-I{HERE}"]
            _run([*self._command, *flags, "-c", str(source), "-o", str(target)])
            return target

        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(compile, sources))

    def link(self, objects: Iterable[Path], out: Path, *, shared: bool = False) -> Path:
        """A program, or else a shared library."""
        kind = ["-shared"] if shared else []
        _run([*self._command, *self._extra, *kind, *map(str, objects), "-o", str(out), "-lpthread"])
        return out


def build(out: Path) -> Path:
    """Compiles the kernels into `out`, whole or not at all. Raises BuildError."""
    with tempfile.TemporaryDirectory() as folder:
        chosen = Compiler()
        made = chosen.link(chosen.compile(SOURCES, Path(folder)), Path(folder, out.name), shared=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        fresh = out.with_name(f".{out.name}.{os.getpid()}")  # a library in use is replaced, never written over
        shutil.copyfile(made, fresh)
        fresh.chmod(0o755)
        os.replace(fresh, out)
    return out


@functools.cache
def _knows(command: tuple[str, ...], flags: tuple[str, ...]) -> bool:
    try:
        _run([*command, *flags, "-Werror", "-fsyntax-only", "-x", "c++", os.devnull])
    except BuildError:
        return False
    return True


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=600)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} could not be run: {error}") from None
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    build(Path(sys.argv[1] if len(sys.argv) > 1 else HERE / LIBRARY))
