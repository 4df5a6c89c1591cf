"""Who signs: keys, releases, rotation, and the command line from the first key to a device that goes back."""

import json
import stat
import time
from pathlib import Path

import pytest
from paired import small_network

from shoal.cli import main
from shoal.device_agents import manifest
from shoal.device_agents.vendor import Vendor
from shoal.runtime.bundle import Bundle
from shoal.runtime.errors import LinkError, TrustError, UsageError


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    return small_network(tmp_path_factory.mktemp("network"))


def test_a_signer_from_the_first_key_to_the_third_release(network, tmp_path):
    _, device, head, *_ = network
    now = time.time()
    vendor = Vendor.create(tmp_path / "vendor", now)
    with pytest.raises(UsageError):
        Vendor.create(tmp_path / "vendor", now)
    trusted = manifest.Trusted.pin((tmp_path / "vendor/root.json").read_bytes())
    vendor.sign({"cats": device, "head": head}, now=now)
    vendor = Vendor(tmp_path / "vendor")
    vendor.sign({}, ["head"], now=now)
    for role in manifest.ROLES:
        vendor.rotate(role, now)
    vendor = Vendor(tmp_path / "vendor")
    vendor.sign({}, now=now)
    offered = manifest.Manifest.decode(vendor.encoded())
    trusted = trusted.follow(offered).accept(offered, now)
    assert set(trusted.models) == {"cats"} and trusted.root.content.version == 4
    assert {path.name for path in (tmp_path / "vendor/models").iterdir()} == {f"{_digest(device)}.shoal"}
    for path in (tmp_path / "vendor/keys").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    (tmp_path / "vendor/keys/targets.key").unlink()
    with pytest.raises(TrustError, match="targets"):
        Vendor(tmp_path / "vendor").sign({}, now=now)


def _digest(path: Path) -> str:
    with Bundle.open(path) as bundle:
        return bundle.digest


def test_a_release_by_hand_from_the_keys_to_going_back(network, tmp_path, monkeypatch, capsys):
    _, device, head, *_ = network
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)

    def shoal(*words: str):
        status = main(["update", *words, "--json"])
        said = capsys.readouterr()
        assert status == 0, said.err
        return json.loads(said.out)

    made = shoal("keygen", "signer")
    assert shoal("sign", "signer", f"cats={device}")["release"] == 1
    shoal("publish", "signer", "--to", "stick")
    assert shoal("trust", "stick/root.json")["fingerprint"] == made["fingerprint"]
    assert "kept" in shoal("apply", "stick", "--now")["result"]
    assert "nothing" in shoal("apply", "stick")["result"]
    shoal("sign", "signer", f"cats={head}")
    shoal("rotate", "signer", "root")
    shoal("publish", "signer", "--to", "stick")
    assert "trial" in shoal("apply", "stick")["result"]
    assert shoal("status")["trial"]["models"] == {"cats": _digest(head)}
    shoal("back")
    status = shoal("status")
    assert shoal("trust", "stick/root.json")["fingerprint"] == status["signer"] == made["fingerprint"]
    assert status["trial"] is None and status["active"] == {"cats": _digest(device)} and status["release"] == 3
    shoal("publish", "signer")
    assert (tmp_path / "home/edge/manifest.json").read_bytes() == (tmp_path / "stick/manifest.json").read_bytes()

    assert main(["update", "sign", "signer", "cats"]) == UsageError.code
    assert main(["agent", "status"]) == LinkError.code
    assert main(["agent", "status", "much"]) == UsageError.code
    assert main(["agent", "unit", "no:address:at:all"]) == UsageError.code
    capsys.readouterr()
    assert main(["agent", "unit", "10.0.0.2", "--model", "a=my bundle.shoal", "--threads", "2"]) == 0
    assert f'"a={tmp_path}/my bundle.shoal" --threads 2' in capsys.readouterr().out
