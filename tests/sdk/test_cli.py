"""The command line's promises: three lines for an error, an exit status for each family, JSON alone on stdout."""

import json
import signal
import subprocess
import sys

import pytest

from shoal import cli
from shoal.commands import inspect
from shoal.runtime import errors


def shoal(*arguments, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "shoal", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def test_help_names_every_verb():
    listed = shoal("--help")
    assert listed.returncode == 0
    assert all(f"\n    {verb} " in listed.stdout for verb in cli.verbs())


@pytest.mark.parametrize("verb", cli.verbs())
def test_every_verb_has_help_and_debug(verb):
    helped = shoal(verb, "--help")
    assert helped.returncode == 0
    assert "--debug" in helped.stdout


def test_an_error_is_three_lines_and_its_own_status(tmp_path):
    failed = shoal("inspect", tmp_path / "absent.shoal")
    assert failed.returncode == errors.BundleError.code
    assert failed.stdout == ""
    what, why, fix = failed.stderr.splitlines()
    assert why.startswith("  why: ") and fix.startswith("  fix: ")
    assert "Traceback" in shoal("inspect", tmp_path / "absent.shoal", "--debug").stderr


@pytest.mark.parametrize(
    ("raised", "status"),
    [
        (errors.BudgetError("It does not fit.", "It is too large.", "Ask for less."), 6),
        (KeyboardInterrupt(), 130),
        (ZeroDivisionError("a bug"), 1),
    ],
)
def test_what_a_verb_raises_becomes_a_status(monkeypatch, capsys, raised, status):
    def run(arguments, show):
        raise raised

    monkeypatch.setattr(inspect, "run", run)
    assert cli.main(["inspect", "x"]) == status
    said = capsys.readouterr()
    assert said.out == "" and "Traceback" not in said.err
    assert len(said.err.splitlines()) == (0 if status == 130 else 3)


def test_statuses_of_families_are_distinct():
    families = errors.ShoalError.__subclasses__()
    assert len({family.code for family in families} | {1}) == len(families) + 1


@pytest.mark.parametrize(
    "line",
    [
        (), ("inspect",), ("no-such-verb",), ("plan", "x", "--slots", "many"), ("run", "x", "hi", "--max-tokens", "0"),
        ("run", "x", "hi", "--temp", "1"), ("chat", "x", "--top-p", "nan"),
        ("run", "x", "hi", "--raw", "--system", "y"),
    ],
)  # fmt: skip
def test_a_wrong_command_line_is_three_lines_and_status_2(capsys, line):
    """And is found before anything is loaded: there is no bundle x."""
    assert cli.main(line) == errors.UsageError.code
    said = capsys.readouterr()
    _, why, fix = said.err.splitlines()
    assert said.out == "" and why.startswith("  why: ") and fix.startswith("  fix: ")


def test_a_reader_that_leaves_is_no_error():
    code = "import sys; from shoal.cli import main; sys.exit(main(['doctor']))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        said = process.stderr.read().decode()
    assert process.returncode == cli.BROKEN_PIPE
    assert "Traceback" not in said and "BrokenPipe" not in said


WAITS = """
import sys, time
from shoal import cli
from shoal.commands import inspect
inspect.run = lambda arguments, show: (print("ready", flush=True), time.sleep(60))
sys.exit(cli.main(["inspect", "x.shoal"]))
"""


def test_ctrl_c_is_status_130_without_a_traceback():
    with subprocess.Popen([sys.executable, "-c", WAITS], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
    assert process.returncode == cli.INTERRUPTED
    assert said == b""


def test_doctor_reports_json():
    found = shoal("doctor", "--json")
    checks = {check["name"]: check for check in json.loads(found.stdout)}
    assert checks["python"]["state"] == "ok"
    assert checks["onnxruntime"]["state"] == "ok"
    assert checks["backend cpu"]["state"] == "ok"
    assert all(check["fix"] for check in checks.values() if check["state"] in ("warn", "bad"))
