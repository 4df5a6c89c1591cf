"""What happens on the way into `.venv` when things are not as they should be: sentences, and nothing half done."""

import json
import os
import pty

import pytest

import environment


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout without an environment; what would be run is recorded instead."""
    for name in ("pyproject.toml", "setup.py", "runtime/kernels/build.py", "runtime/kernels/linear.cpp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("first")
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setattr(environment, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(environment, "PYTHON", tmp_path / ".venv" / "python")
    monkeypatch.setattr(environment, "_STAMP", tmp_path / ".venv" / "stamp.json")
    return tmp_path


@pytest.fixture
def commands(checkout, monkeypatch):
    ran = []

    def run(command, line, **options):
        ran.append(command)
        if "venv" in command:
            (checkout / ".venv").mkdir()
            (checkout / ".venv" / "python").touch()
        return 0, ""

    monkeypatch.setattr(environment, "run", run)
    monkeypatch.setattr(environment, "_has_pip", environment.PYTHON.exists)
    return ran


@pytest.mark.parametrize("name", ["pyproject.toml", "runtime/kernels/linear.cpp", "runtime/kernels/new.h", "compiler"])
def test_installs_once_and_again_when_the_project_or_the_kernels_change(name, checkout, commands, monkeypatch):
    environment.prepare("convert")
    environment.prepare("convert")
    assert [command[2] for command in commands] == ["venv", "pip"]
    if name == "compiler":
        monkeypatch.setenv("CXX", "another")
    else:
        (checkout / name).write_text("second")
    environment.prepare("convert")
    environment.prepare("convert")
    assert [command[2] for command in commands] == ["venv", "pip", "pip"]


def test_an_extra_is_added_to_those_that_are_there(checkout, commands):
    environment.prepare("convert")
    environment.prepare("test")
    assert commands[-1][5].endswith("[convert,test]")
    assert json.loads((checkout / ".venv" / "stamp.json").read_text())["extras"] == ["convert", "test"]
    environment.prepare("convert")
    assert len(commands) == 3


def test_a_failed_install_is_told_and_tried_again(checkout, commands, monkeypatch):
    environment.prepare("convert")
    (checkout / ".venv" / "stamp.json").unlink()
    broken = "Collecting numpy\nERROR: Could not find a version that satisfies the requirement numpy>=99\n"
    monkeypatch.setattr(environment, "run", lambda command, line: (1, broken))
    with pytest.raises(environment.SetupError, match="numpy>=99"):
        environment.prepare("convert")
    assert not (checkout / ".venv" / "stamp.json").exists()


def test_a_python_without_venv_is_told_how_to_get_it(checkout, monkeypatch):
    monkeypatch.setattr(environment, "run", lambda command, line: (1, "ensurepip is not available"))
    with pytest.raises(environment.SetupError, match="apt install python3-venv"):
        environment.prepare("convert")


def test_an_old_python_is_told_which_is_needed(checkout, commands, monkeypatch):
    monkeypatch.setattr(environment.sys, "version_info", (3, 10, 2))
    with pytest.raises(environment.SetupError, match="3.11"):
        environment.prepare("convert")
    assert commands == []


@pytest.mark.skipif(os.name != "posix", reason="pseudo-terminals are POSIX's")
def test_a_line_on_a_terminal_that_does_not_know_its_width(monkeypatch):
    person, terminal = pty.openpty()  # 0 columns, as in some containers
    with os.fdopen(terminal, "w") as stderr:
        monkeypatch.setattr(environment.sys, "stderr", stderr)
        with environment.Line("fetching") as line:
            line.bar(1, 2)
    said = b""
    while b"50% of 0 MiB" not in said:  # a read gives what one write gave; at the end it is an OSError
        said += os.read(person, 4096)
    os.close(person)
