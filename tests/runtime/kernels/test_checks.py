"""The kernels' promises, held on every instruction set: the C++ checks beside this file, built with every compiler that
is there and run on this processor as it is, as a lesser one, and as others that qemu plays.

What is missing is a reason to skip; `.ci/run` installs all of it."""

import functools
import os
import secrets
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from shoal.runtime.kernels import build

HERE = Path(__file__).resolve().parent
SANITIZED = ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
BUILDS = {
    "g++": ("g++", []),
    "clang++": ("clang++", []),
    "sanitized": ("g++", SANITIZED),
    "threads": ("g++", ["-O1", "-g1", "-fsanitize=thread"]),
    "aarch64": ("aarch64-linux-gnu-g++", ["-static"]),
}
FLAGS = {"avx2": "avx2", "avx512": "avx512_vnni", "amx": "avx512_vnni"}  # a path's, as Linux names it


class Run(NamedTuple):
    build: str
    machine: str  # the command that plays another processor; empty: this one
    isa: str  # the best that is allowed (SHOAL_ISA); empty: all
    paths: str  # that must be found
    part: float = 1  # of the rounds: less where only that path is new, or slow

    def __str__(self) -> str:
        return "-".join((self.build, *self.machine.split()[2:], *self.isa.split()))


RUNS = [
    Run("sanitized", "", "amx", "scalar avx2 avx512 amx"),
    Run("g++", "", "amx", "scalar avx2 avx512 amx"),
    Run("clang++", "", "amx", "scalar avx2 avx512 amx"),
    Run("g++", "", "avx512", "scalar avx2 avx512", 0.2),
    Run("g++", "", "avx2", "scalar avx2", 0.2),
    Run("g++", "", "scalar", "scalar", 0.2),
    Run("g++", "qemu-x86_64 -cpu Haswell", "", "scalar avx2", 0.1),
    Run("g++", "qemu-x86_64 -cpu Nehalem", "", "scalar", 0.1),
    Run("aarch64", "qemu-aarch64 -cpu max", "", "scalar neon i8mm", 0.3),
    Run("aarch64", "qemu-aarch64 -cpu cortex-a76", "", "scalar neon", 0.1),
    Run("aarch64", "qemu-aarch64 -cpu cortex-a53", "", "scalar", 0.1),
    pytest.param(Run("threads", "", "amx", "scalar avx2 avx512 amx", 0.1), marks=pytest.mark.deep),
]
ROUNDS = {
    "check_linear": 100,
    "check_stack": 60,
    "check_attention": 100,
    "check_amx": 40,
    "check_crc32": 50,
    "check_rans": 50,
}  # of which a deep run has forty times as many


def tool(name: str) -> str:
    return shutil.which(name) or pytest.skip(f"{name} is not installed")


def cpu_flags() -> set[str]:
    try:
        return set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return set()


def make(name: str, folder: Path) -> Path:
    """The checks in `folder`. On x86-64 they bring an AMX of their own."""
    command, extra = BUILDS[name]
    compiler = build.Compiler([command], ["-Werror", *extra])
    x86 = compiler.machine == "x86_64"
    checks = [
        "check_linear",
        "check_stack",
        "check_attention",
        "check_crc32",
        "check_rans",
        *(["check_amx"] if x86 else []),
    ]
    sources = [*build.SOURCES, *([HERE / "amx_emulator.cpp"] if x86 else [])]
    objects = compiler.compile([*sources, *(HERE / f"{check}.cpp" for check in checks)], folder)
    for check, one in zip(checks, objects[len(sources) :], strict=True):
        compiler.link([one, *objects[: len(sources)]], folder / check)
    return folder


@pytest.fixture(scope="session")
def programs(tmp_path_factory):
    """The folder of the checks that a build makes; made, or found impossible, once."""

    @functools.cache
    def made(name: str) -> Path | build.BuildError:
        try:
            return make(name, tmp_path_factory.mktemp("checks"))
        except build.BuildError as error:
            return error

    def programs(name: str) -> Path:
        tool(BUILDS[name][0])
        found = made(name)
        assert isinstance(found, Path), str(found)
        return found

    return programs


@pytest.fixture
def said(programs, request):
    """What a check prints when it runs, or the test fails with it."""
    deep = request.config.getoption("--deep")

    def run(check: str, run: Run) -> str:
        missing = {FLAGS[path] for path in run.paths.split() if path in FLAGS} - cpu_flags()
        if missing and not run.machine:
            pytest.skip(f"this processor has no {' '.join(missing)}")
        machine = [tool(run.machine.split()[0]), *run.machine.split()[1:]] if run.machine else []
        rounds = round(ROUNDS[check] * run.part * (40 if deep else 1))
        seed = secrets.randbits(31) if deep else 1
        command = [*machine, str(programs(run.build) / check), str(seed), str(rounds)]
        done = subprocess.run(command, env={**os.environ, "SHOAL_ISA": run.isa}, capture_output=True, text=True)
        print(done.stdout)
        assert done.returncode == 0, f"{' '.join(command)}: exit status {done.returncode}\n{done.stderr}"
        return done.stdout

    return run


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_linear_has_the_bits_of_the_scalar_path(said, run):
    assert f"paths: {run.paths}; the fastest: {run.paths.split()[-1]}\n" in said("check_linear", run)


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_a_stack_has_the_bits_of_the_scalar_path(said, run):
    assert f"paths: {run.paths}; the fastest: {run.paths.split()[-1]}\n" in said("check_stack", run)


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_attention_is_a_softmax_over_what_is_stored(said, run):
    vectors = [path for path in run.paths.split() if path not in ("amx", "i8mm")]  # which attention has no use for
    assert f"paths: {' '.join(vectors)}; the fastest: {vectors[-1]}\n" in said("check_attention", run)


@pytest.mark.parametrize("run", RUNS[:3], ids=str)
def test_amx_among_other_users_of_the_tiles(said, run):
    assert "all as it should be" in said("check_amx", run)


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_checksums_are_zlibs(said, run):
    assert "all as it should be" in said("check_crc32", run)


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_rans_takes_no_bytes_that_it_would_not_make(said, run):
    assert "all as it should be" in said("check_rans", run)
