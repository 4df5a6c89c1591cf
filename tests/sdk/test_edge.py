"""`shoal edge` as a person types it: the daemon in a process of its own, and its owner's verbs beside it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.request

import pytest

from shoal import cli
from shoal.runtime.bundle import Graph, create


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def shoal(capsys, home):
    def run(*words, code=0):
        status = cli.main([str(word) for word in words])
        said = capsys.readouterr()
        assert status == code, said.err
        return said.out, said.err

    return run


@pytest.fixture
def daemon(home):
    """Starts `shoal edge` with options; the process and its first lines."""
    started = []

    def start(*options):
        command = [sys.executable, "-m", "shoal", "edge", "--listen", "127.0.0.1:0", "--no-discovery", *options]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        lines = []
        while not lines or not lines[-1].startswith("listens"):
            lines.append(process.stdout.readline())
            assert lines[-1], "it did not start"
        return process, lines

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def bundle(path):
    with create(path) as writer:
        writer.add("graph", "tail", b"")
        writer.graph(Graph("tail", "tail", "cpu", 0, 0, 0, "tail"))
        writer.commit()
    return path


def test_a_device_pairs_with_the_daemon_and_is_shown(shoal, daemon, home, tmp_path):
    process, lines = daemon("--web", "127.0.0.1:0", "--name", "attic")
    url = lines[0].split()[2]
    assert urllib.request.urlopen(f"{url}health", timeout=10).status == 200
    added = json.loads(shoal("edge", "add", bundle(tmp_path / "a.shoal"), "--name", "cats", "--json")[0])
    assert added[0]["name"] == "cats" and added[0]["role"] == "tail"
    command = [sys.executable, "-m", "shoal", "edge", "pair", "--seconds", "60"]
    owner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        said = []
        while not said or not said[-1].startswith("type it"):
            said.append(owner.stdout.readline())
            assert said[-1]
        assert any("█" in line for line in said)
        words = said[-1].split()[4:]  # ADDRESS CODE
        assert "attic" in shoal("pair", *words)[0]
        assert owner.wait(20) == 0
        assert "paired with" in owner.stdout.read()
    finally:
        owner.kill()
        owner.wait()
        owner.stdout.close()
    seen = json.loads(shoal("edge", "status", "--json")[0])
    assert seen["name"] == "attic" and [model["name"] for model in seen["models"]] == ["cats"]
    assert len(seen["devices"]) == 1 and not seen["devices"][0]["link"]
    assert "not connected" in shoal("edge", "status")[0]
    token = shoal("edge", "token")[0].strip()
    request = urllib.request.Request(f"{url}metrics", headers={"Authorization": f"Bearer {token}"})
    assert b"shoal" in urllib.request.urlopen(request, timeout=10).read()
    assert "Another one runs" in shoal("edge", "--listen", "127.0.0.1:0", code=2)[1]
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert "does not run" in shoal("edge", "status", code=12)[1]
    assert "does not run" in shoal("edge", "pair", code=12)[1]


def test_a_window_that_nobody_used_ends_with_a_reason(shoal, daemon):
    daemon()
    said, error = shoal("edge", "pair", "--seconds", "1", "--no-qr", code=13)
    assert "█" not in said and "code" in said and "The time is over" in error


@pytest.mark.parametrize(
    "words",
    [
        ("--listen", "nowhere at all"), ("--max-batch", "0"), ("--drain", "-1"), ("--memory", "lots"),
        ("--server", "cats"), ("--web", "0.0.0.0:4780", "--web-certificate", "x.pem"), ("--web", "127.0.0.1:70000"),
        ("--listen", "127.0.0.1:0", "--web", "127.0.0.1:0", "--web-key", "x.pem"),
    ],
)  # fmt: skip
def test_options_that_cannot_be_are_refused(shoal, words):
    listen = () if "--listen" in words else ("--listen", "127.0.0.1:0")
    shoal("edge", "run", "--no-discovery", *listen, *words, code=2)


@pytest.mark.parametrize("options", [(), ("--system",)])
def test_the_unit_is_one_that_systemd_takes(shoal, home, tmp_path, options):
    said, _ = shoal("edge", "unit", *options, "--listen", "serial:/dev/ttyUSB0?baud=921600", "--name", 'the "big" 5%')
    assert f"Environment=SHOAL_HOME={home}" in said and "Type=notify" in said
    line = next(line for line in said.splitlines() if line.startswith("ExecStart="))
    assert line.endswith('edge run --listen serial:/dev/ttyUSB0?baud=921600 --name "the \\"big\\" 5%%"')
    assert ("User=" in said) == ("dialout" in said) == ("ProtectSystem" in said) == bool(options)
    if options and shutil.which("systemd-analyze"):
        unit = tmp_path / "shoal-edge.service"
        unit.write_text(said)
        checked = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True)
        assert checked.returncode == 0 and not checked.stderr, checked.stderr


def test_it_tells_systemd_when_it_is_ready(daemon, tmp_path, monkeypatch):
    import socket

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(20)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        process, _ = daemon()
        assert manager.recv(100) == b"READY=1"
        process.send_signal(signal.SIGINT)
        assert manager.recv(100) == b"STOPPING=1"
        assert process.wait(20) == 0
    assert os.path.exists(tmp_path / "home" / "edge" / "identity.key")
