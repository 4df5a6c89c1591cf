"""The verbs on real models, as a person types them."""

import io
import json
import os
import pty
import signal
import subprocess
import sys
import time

import pytest

from shoal import cli


def shoal(capsys, *arguments, code=0):
    """Runs a verb in this process: (stdout, stderr)."""
    status = cli.main([str(word) for word in arguments])
    said = capsys.readouterr()
    assert status == code, said.err
    return said.out, said.err


def test_convert_writes_a_bundle_once(capsys, tiny_folder, tmp_path):
    out = tmp_path / "tiny.shoal"
    report = json.loads(shoal(capsys, "convert", tiny_folder, "-o", out, "--recipe", "int8", "--json")[0])
    assert report["recipe"] == "int8" and report["bundle_bytes"] == out.stat().st_size
    assert report["parity"]
    before = out.read_bytes()
    _, said = shoal(capsys, "convert", tiny_folder, "-o", out, code=2)
    assert "overwrite" in said
    assert out.read_bytes() == before
    shown, _ = shoal(capsys, "convert", tiny_folder, "-o", out, "--overwrite", "--no-parity", "--recipe", "fp32")
    assert "32.00 bits a weight" in shown and "parity" not in shown


def test_convert_names_its_output_after_source_and_recipe(capsys, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shoal(capsys, "convert", tiny_folder, "--recipe", "int8", "--no-parity")
    assert [path.name for path in tmp_path.iterdir()] == ["llama.int8.shoal"]


def test_inspect_shows_and_verifies(capsys, tiny_bundle, tmp_path):
    found = json.loads(shoal(capsys, "inspect", tiny_bundle, "--json")[0])
    assert found["card"]["blocks"] == 3 and found["recipe"]["name"] == "fp32" and found["parity"] is None
    assert {"weights", "tokenizer", "graph", "card"} <= {section["kind"] for section in found["sections"]}
    assert "every digest is right" in shoal(capsys, "inspect", tiny_bundle, "--verify")[0]
    damaged = bytearray(tiny_bundle.read_bytes())
    weights = next(section for section in found["sections"] if section["kind"] == "weights")
    damaged[weights["offset"] + 5] ^= 1
    (tmp_path / "damaged.shoal").write_bytes(damaged)
    shoal(capsys, "inspect", tmp_path / "damaged.shoal")
    assert "weights" in shoal(capsys, "inspect", tmp_path / "damaged.shoal", "--verify", code=5)[1]


def test_plan_is_a_table_and_is_checked(capsys, tiny_bundle):
    shown, _ = shoal(capsys, "plan", tiny_bundle, "--context", 128)
    assert "weights" in shown and "1 x 128 tokens" in shown
    checked = json.loads(shoal(capsys, "plan", tiny_bundle, "--context", 128, "--check", "--json")[0])
    assert checked["measured"].keys() == {row["name"] for row in checked["rows"]}
    assert "measured" in shoal(capsys, "plan", tiny_bundle, "--context", 128, "--check")[0]


def test_plan_refuses_what_cannot_fit(capsys, tiny_bundle):
    shown, said = shoal(capsys, "plan", tiny_bundle, "--memory", "1MB", code=6)
    assert shown == "" and "fix: " in said
    assert "not a size" in shoal(capsys, "plan", tiny_bundle, "--memory", "much", code=2)[1]


def test_run_answers_on_stdout_and_tells_speeds_on_stderr(capsys, smollm2_bundle):
    answer, said = shoal(capsys, "run", smollm2_bundle, "Which city is the capital of France?", "--max-tokens", 16)
    assert "Paris" in answer
    assert "tokens/s" in said and "Paris" not in said


@pytest.mark.parametrize("kv", ["fp32", "fp16", "int8"])
def test_kernels_and_the_cache_s_format_can_be_chosen(capsys, smollm2_bundle, kv):
    for kernels in ("auto", "ort"):
        options = ("--kv", kv, "--kernels", kernels, "--context", 256)
        shown, _ = shoal(capsys, "plan", smollm2_bundle, *options)
        assert ("repacked weights" in shown) == (kernels == "ort") and f"1 x 256 tokens, {kv}" in shown
        prompt = ("Which city is the capital of France?", "--max-tokens", 12)
        answer, _ = shoal(capsys, "run", smollm2_bundle, *prompt, *options)
        assert "Paris" in answer
    assert "invalid choice" in shoal(capsys, "plan", smollm2_bundle, "--kernels", "others", code=2)[1]


def test_run_is_repeatable_with_a_seed(capsys, smollm2_bundle):
    command = ("run", smollm2_bundle, "Tell a story.", "--max-tokens", 12, "--temperature", 1, "--seed", 7, "--json")
    first, second = (json.loads(shoal(capsys, *command)[0]) for _ in range(2))
    assert first["tokens"] == second["tokens"] and first["text"]
    assert first["stats"]["generated_tokens"] == 12 and first["stats"]["finish"] == "length"


def test_run_reads_standard_input_and_stops_at_text(capsys, smollm2_bundle, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("The capital of France is"))
    out, _ = shoal(capsys, "run", smollm2_bundle, "--raw", "--max-tokens", 16, "--stop", "aris")
    assert out == " P\n"


def test_run_takes_a_pipe_as_a_shell_does_and_refuses_what_is_no_text(capsys, smollm2_bundle, monkeypatch):
    texts = []
    for given in (b"The capital of France is", b"The capital of France is\n"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given), "utf-8"))
        texts.append(shoal(capsys, "run", smollm2_bundle, "--raw", "--max-tokens", 4)[0])
    assert texts[0] == texts[1]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), "utf-8"))
    assert "not text" in shoal(capsys, "run", smollm2_bundle, code=2)[1]


def test_run_embeds_with_an_embedding_model(capsys, minilm_bundle):
    vector = json.loads(shoal(capsys, "run", minilm_bundle, "A cat.", "--json")[0])["embedding"]
    assert len(vector) == 384 and sum(value * value for value in vector) == pytest.approx(1, abs=1e-3)
    assert "cannot chat" in shoal(capsys, "chat", minilm_bundle, code=2)[1]


def test_chat_remembers_resets_and_survives_an_error(capsys, smollm2_int8_bundle, monkeypatch):
    lines = [
        "My name is Ada.",
        "What is my name?",
        "/reset",
        "What is my name?",
        "word " * 600,
        "/nonsense",
        "Hello",
        "/exit",
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    answers, said = shoal(capsys, "chat", smollm2_int8_bundle, "--context", 256, "--max-tokens", 24)
    answers = answers.splitlines()
    assert answers[1] != answers[2], "to one question: what was said before counts, until /reset"
    assert "do not fit the context" in said and "/reset forgets" in said
    assert answers[-1].strip(), "it answers after an error"


def test_ctrl_c_in_chat_stops_the_answer_and_not_the_conversation(smollm2_bundle):
    """On a real terminal: a long answer is interrupted, the next question is answered."""
    person, terminal = pty.openpty()
    command = [sys.executable, "-m", "shoal", "chat", str(smollm2_bundle), "--max-tokens", "1500", "--context", "2048"]
    process = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True)
    os.close(terminal)
    try:
        read_until(person, b"> ")
        os.write(person, b"Tell me a long story about a dragon.\n")
        read_until(person, b"dragon.\r\n", more=60)
        process.send_signal(signal.SIGINT)
        read_until(person, b"> ")
        os.write(person, b"Which city is the capital of France?\n")
        read_until(person, b"Paris")
        read_until(person, b"> ")
        os.write(person, b"/exit\n")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(person)


def read_until(terminal: int, wanted: bytes, more: int = 0, seconds: float = 120) -> bytes:
    """What the program shows up to `wanted` and `more` bytes; fails with what it showed instead."""
    import select

    shown, deadline = b"", time.monotonic() + seconds
    while wanted not in shown or len(shown.partition(wanted)[2]) < more:
        assert time.monotonic() < deadline, shown.decode(errors="replace")
        if select.select([terminal], [], [], 1)[0]:
            shown += os.read(terminal, 4096)
    return shown


def test_a_stack_is_planned_and_run_in_a_budget(capsys, stacked_bundle):
    whole = json.loads(shoal(capsys, "plan", stacked_bundle, "--context", 64, "--json")[0])
    row = next(row for row in whole["rows"] if row["name"] == "stack")
    assert row["kind"] == "elastic" and row["where"] == "mapped"
    less = whole["total"] - row["bytes"] // 2
    shown, _ = shoal(capsys, "plan", stacked_bundle, "--context", 64, "--memory", less)
    assert f" of {whole['entries']} " in shown
    words = ("One", "--raw", "--max-tokens", 4, "--context", 64, "--memory", less, "--json")
    answer = json.loads(shoal(capsys, "run", stacked_bundle, *words)[0])
    assert answer["stats"]["generated_tokens"] >= 1


def test_chat_changes_the_memory(capsys, stacked_bundle, monkeypatch):
    whole = json.loads(shoal(capsys, "plan", stacked_bundle, "--context", 64, "--json")[0])
    row = next(row for row in whole["rows"] if row["name"] == "stack")
    lines = ["Hello", "/memory", f"/memory {whole['total'] - row['bytes'] // 3}", "Hello", "/memory much", "/memory 1"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    _, said = shoal(capsys, "chat", stacked_bundle, "--context", 64, "--max-tokens", 4)
    plans = [line for line in said.splitlines() if "entries of the stack" in line]
    assert len(plans) == 2 and f"{whole['entries']} of {whole['entries']} entries" in plans[0]
    assert "without a budget" in plans[0] and f" of {whole['entries']} entries" in plans[1] and plans[0] != plans[1]
    assert "not a size" in said and "does not fit" in said


def test_following_the_memory_needs_a_size_that_changes(capsys, minilm_bundle, stacked_bundle):
    assert "one size" in shoal(capsys, "run", minilm_bundle, "One", "--follow-memory", code=2)[1]
    prompt = ("One", "--raw", "--max-tokens", 2, "--context", 64)
    assert "not a size" in shoal(capsys, "run", "--follow-memory", stacked_bundle, *prompt, code=2)[1]
    shoal(capsys, "run", stacked_bundle, *prompt, "--follow-memory")
    shoal(capsys, "run", stacked_bundle, *prompt, "--follow-memory=1MB", "--memory", "200MB")


def test_memory_is_handed_to_the_converter(capsys, tiny_folder, tmp_path, monkeypatch):
    from shoal.converters import convert
    from shoal.converters.report import Report

    given = []

    def converted(source, out, **names):
        given.append(names)
        return Report(str(out), str(source), "llama", names["recipe"], 1, 1, 1.0)

    monkeypatch.setattr(convert, "convert", converted)
    shoal(capsys, "convert", tiny_folder, "-o", tmp_path / "a", "--recipe", "auto", "--memory", "2MB")
    shoal(capsys, "convert", tiny_folder, "-o", tmp_path / "a")
    assert given[0]["recipe"] == "auto" and given[0]["memory"] == 2_000_000
    assert "memory" not in given[1]
    assert "not a size" in shoal(capsys, "convert", tiny_folder, "--recipe", "auto", "--memory", "x", code=2)[1]
