"""`shoal devices` and `shoal run --require`, as a person types them; no plugin is needed."""

import json

import pytest

from shoal import cli


@pytest.fixture(autouse=True)
def no_plugins(monkeypatch):
    monkeypatch.setenv("SHOAL_PLUGINS", "none")


def shoal(capsys, *arguments, code=0):
    status = cli.main([str(word) for word in arguments])
    said = capsys.readouterr()
    assert status == code, said.err
    return said.out, said.err


def test_devices_are_listed_with_what_is_missing_and_why(capsys):
    shown, _ = shoal(capsys, "devices")
    assert "cpu:onnxruntime" not in shown and "cpu through onnxruntime" in shown
    assert "npu:qnn: $SHOAL_PLUGINS is none." in shown and "fix: Unset it. It needs a Qualcomm processor" in shown
    found = json.loads(shoal(capsys, "devices", "cpu", "npu", "--json")[0])
    assert [one["backend"] for one in found] == ["cpu", "npu"]
    (device,) = found[0]["devices"]
    assert device["name"] == "cpu:onnxruntime" and device["simulated"] is None and device["version"]
    assert {gap["provider"] for gap in found[1]["absent"]} == {"qnn", "openvino", "coreml"}


@pytest.mark.parametrize("words", [("tpu",), ("--seconds", "0"), ("--seconds", "nan")])
def test_what_devices_does_not_understand_is_refused(capsys, words):
    shoal(capsys, "devices", *words, code=2)


def test_an_npu_that_is_required_and_not_there_is_refused(capsys, tiny_bundle):
    for words in (("--require", "npu=0.9"), ("--backend", "npu"), ("--backend", "npu:qnn", "--require", "npu=0.5")):
        out, said = shoal(capsys, "run", tiny_bundle, "hello", *words, code=7)
        assert not out and "There is no npu" in said and "qnn: $SHOAL_PLUGINS is none" in said


@pytest.mark.parametrize(
    "words",
    [
        ("--require", "npu"),
        ("--require", "npu=2"),
        ("--require", "cpu=1"),
        ("--require", "npu=0.5", "--require", "gpu=0.5"),
        ("--backend", "cpu", "--require", "npu=0.5"),
        ("--backend", "gpu", "--require", "npu=0.5"),
        ("--backend", "tpu"),
    ],
)
def test_what_cannot_be_required_is_refused_before_anything_is_loaded(capsys, words):
    shoal(capsys, "run", "absent.shoal", "hello", *words, code=2)


def test_where_the_nodes_ran_is_told(capsys, tiny_bundle):
    out, said = shoal(capsys, "run", tiny_bundle, "hello", "--max-tokens", 2, "--backend", "cpu", "--context", 64)
    assert out and "nodes on CPUExecutionProvider" in said


def test_chat_takes_a_backend_too(capsys, static_bundle, monkeypatch):
    lines = iter(["hello there, how are you?", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines))
    words = ("--prefill", "static", "--backend", "cpu", "--max-tokens", 4, "--context", 64)
    answer, said = shoal(capsys, "chat", static_bundle, *words)
    assert answer.strip() and "nodes on CPUExecutionProvider" in said
    for verb in ("chat", "serve"):
        out, said = shoal(capsys, verb, static_bundle, "--backend", "npu", code=7)
        assert not out and "There is no npu" in said
        shoal(capsys, verb, "absent.shoal", "--require", "npu=2", code=2)
