"""How the library is made where the compiler is old, broken or absent."""

import shutil

import pytest

from shoal.runtime.kernels import build

SOURCES = {path.stem: path for path in build.SOURCES}


@pytest.fixture
def old(tmp_path):
    """A compiler that knows neither matrix units nor much of anything else."""
    real = shutil.which("c++") or shutil.which("g++") or pytest.skip("there is no compiler")
    path = tmp_path / "c++"
    path.write_text(
        "#!/bin/sh\n"
        'for flag; do case $flag in -mamx*|*+i8mm|-Wno-*) echo "unrecognized $flag" >&2; exit 1;; esac; done\n'
        f'exec {real} "$@"\n'
    )
    path.chmod(0o755)
    return build.Compiler([str(path)])


def test_a_file_whose_flags_are_unknown_has_nothing_in_it(old, tmp_path):
    assert old.flags(SOURCES["linear_scalar"]) == []
    newest, plain = ("amx", "avx2") if old.machine == "x86_64" else ("i8mm", "neon")
    if old.machine in ("x86_64", "aarch64"):
        assert old.flags(SOURCES[f"linear_{plain}"]) and not old.flags(SOURCES[f"linear_{newest}"])
    made = old.compile([SOURCES[f"linear_{newest}"]], tmp_path)
    assert made[0].stat().st_size < 5000


def test_a_compiler_that_fails_leaves_what_is_there(tmp_path, monkeypatch):
    out = tmp_path / "lib.so"
    out.write_bytes(b"old")
    for command in ("/nonexistent", "false"):
        monkeypatch.setenv("CXX", command)
        with pytest.raises(build.BuildError, match=command):
            build.build(out)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.BuildError, match=r"install g\+\+ or clang"):
        build.build(out)
    assert out.read_bytes() == b"old" and [*tmp_path.iterdir()] == [out]
