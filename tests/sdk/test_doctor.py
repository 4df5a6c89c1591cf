"""The doctor's findings on machines that are not this one."""

import pytest

from shoal.commands import doctor
from shoal.runtime import kernels


def test_arm_and_x86_features_are_read(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\n")
    found = doctor.processor(str(cpuinfo))
    assert found.state == "ok" and "NEON dotprod i8mm" in found.detail
    cpuinfo.write_text("model name\t: Some Xeon\nflags\t\t: sse2 avx2 avx512f avx512_vnni amx_int8\n")
    assert "Some Xeon" in doctor.processor(str(cpuinfo)).detail
    assert "AVX2 AVX512 AVX512-VNNI AMX-int8" in doctor.processor(str(cpuinfo)).detail
    cpuinfo.write_text("model name\t: old\nflags\t\t: sse2\n")
    assert doctor.processor(str(cpuinfo)).state == "warn"


def test_a_package_that_dies_hangs_or_fails_is_told_apart():
    assert doctor.try_python("print('fine')") == ("fine", "")
    assert doctor.try_python("import os, signal; os.kill(os.getpid(), signal.SIGILL)")[1] == "dies of SIGILL"
    assert "within" in doctor.try_python("import time; time.sleep(60)", deadline=0.5)[1]
    assert "ZeroDivisionError" in doctor.try_python("1 / 0")[1]


@pytest.mark.parametrize(("said", "state"), [("avx512", "ok"), ("scalar", "warn"), ("missing: no compiler", "warn")])
def test_the_kernels_say_what_they_use_or_why_they_are_missing(monkeypatch, said, state):
    monkeypatch.setattr(doctor, "try_python", lambda code: (said, ""))
    found = doctor.kernels()
    assert found.state == state and found.detail.startswith(said.removeprefix("missing: "))
    assert ("compiler" in found.fix) == ("missing" in said)


def test_the_kernels_of_this_machine_are_asked(monkeypatch):
    found = doctor.kernels()
    assert (found.state, found.detail) == ("ok", kernels.isa()) if kernels.available() else found.state == "warn"
    hide = "import shoal.runtime.kernels as k, pathlib; k.LIBRARY = pathlib.Path('absent'); "
    real = doctor.try_python
    monkeypatch.setattr(doctor, "try_python", lambda code: real(hide + code))
    assert doctor.kernels().state == "warn" and "it was not built" in doctor.kernels().detail


def test_an_absent_option_is_absent_and_an_absent_base_is_bad():
    assert doctor.imported("no_such", "shoal-no-such", "convert").state == "absent"
    assert doctor.imported("no_such", "shoal-no-such", "").state == "bad"


def test_two_engines_in_one_folder_are_found(tmp_path, monkeypatch):
    for name in ("onnxruntime", "onnxruntime_gpu"):
        folder = tmp_path / f"{name}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.0\n")
        (folder / "RECORD").write_text("onnxruntime/__init__.py,,\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = doctor.duplicates()
    assert found.state == "bad" and "onnxruntime-gpu 1.0" in found.detail
