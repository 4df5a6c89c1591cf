"""Every sample is run as a person runs it, on a real model."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from shoal.converters.convert import convert

ROOT = Path(__file__).resolve().parent.parent.parent
SAMPLES = ROOT / "samples"


def run(*arguments, code: int = 0) -> subprocess.CompletedProcess:
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=600)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def test_every_sample_is_here():
    tested = {"stream", "chat", "batch", "constrained", "embed", "budget", "elastic", "quickstart",
              "edge_camera", "split_reader", "split_chat", "mixture", "train_mixture", "outliers"}  # fmt: skip
    support = {"environment", "models", "reader", "wires"}
    assert {path.stem for path in SAMPLES.glob("*.py")} == tested | support


def test_stream(smollm2_bundle):
    assert "sky" in run(SAMPLES / "stream.py", smollm2_bundle).stdout


def test_chat_reuses_the_conversation(smollm2_bundle):
    lines = run(SAMPLES / "chat.py", smollm2_bundle).stdout
    reused = [int(part.rsplit("(", 1)[1]) for part in lines.split(" of ") if "(" in part]
    assert reused[0] == 0 and reused[-1] > 20


def test_batch_answers_in_order(smollm2_bundle):
    lines = run(SAMPLES / "batch.py", smollm2_bundle).stdout.splitlines()
    places = [line.rsplit(" ", 1)[1] for line in lines if line.startswith("> ")]
    assert places == ["sea.", "desert.", "forest.", "Arctic."]


def test_constrained_is_of_the_shape(smollm2_bundle):
    said = run(SAMPLES / "constrained.py", smollm2_bundle).stdout
    value = json.loads(said.replace("'", '"'))
    assert set(value) == {"city", "people"} and type(value["people"]) is int


def test_embed_finds_the_weather(minilm_bundle):
    assert "rain" in run(SAMPLES / "embed.py", minilm_bundle).stdout.splitlines()[0]


def test_budget_refuses_what_cannot_fit(smollm2_bundle):
    lines = run(SAMPLES / "budget.py", smollm2_bundle).stdout
    assert "20MB: The model does not fit" in lines
    assert "1 x 2048 tokens" in lines and "1 x 256 tokens" in lines


def test_elastic_answers_from_what_there_is(stacked_bundle):
    lines = [line.split() for line in run(SAMPLES / "elastic.py", stacked_bundle).stdout.splitlines()]
    assert len(lines) > 20 and all(line[1] == "entries" and line[3] == "MiB" for line in lines)


def test_elastic_needs_a_stack(tiny_bundle):
    assert "no stack" in run(SAMPLES / "elastic.py", tiny_bundle, code=1).stderr


def perplexity(source: Path, folder: Path) -> float:
    """Of a checkpoint in fp32."""
    return convert(source, folder / "model.shoal", "fp32", overwrite=True).parity["perplexity"]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_mixture_with_every_expert_on_is_the_dense_model(family, tiny_folder, tmp_path):
    dense = tiny_folder.parent / family
    said = run(SAMPLES / "mixture.py", dense, tmp_path / "all", "--experts", 4, "--top", 4).stdout
    assert said.count("the first third of the experts gives") == 3
    assert perplexity(tmp_path / "all", tmp_path) == pytest.approx(perplexity(dense, tmp_path), rel=1e-5)
    run(SAMPLES / "mixture.py", dense, tmp_path / "one", "--experts", 4, "--top", 1)
    assert perplexity(tmp_path / "one", tmp_path) != pytest.approx(perplexity(dense, tmp_path), rel=1e-3)


@pytest.mark.deep
def test_smollm2_as_a_mixture(smollm2_gguf, tmp_path):
    """All on, it is SmolLM2; of what its experts give the router finds more than chance does, in every block."""
    said = run(SAMPLES / "mixture.py", smollm2_gguf, tmp_path / "all", "--top", 24).stdout
    shares = [int(line.rsplit(" ", 1)[1][:-1]) for line in said.splitlines()]
    assert len(shares) == 30 and min(shares) > 36 and sum(shares) / 30 > 42
    report = convert(tmp_path / "all", tmp_path / "model.shoal", "int8")
    assert report.parity["perplexity"] == pytest.approx(report.parity["source_perplexity"], rel=0.01)


@pytest.mark.deep
def test_a_mixture_is_trained(mixture_folder, tmp_path):
    """In a few steps it is no good yet, but all that the tests' own has, in the same bytes every time."""
    pytest.importorskip("torch", reason="torch is not installed (pip install 'shoal[train]')")
    for name in ("a", "b"):
        said = run(SAMPLES / "train_mixture.py", tmp_path / name, "--steps", 3).stdout
        assert "step 3 of 3" in said and said.count("of the neurons are 0") == 4
    for path in mixture_folder.iterdir():
        made, again = ((tmp_path / name / path.name).read_bytes() for name in ("a", "b"))
        assert made == again
        if path.name in ("config.json", "tokenizer.json"):
            assert made == path.read_bytes()
    figures = json.loads((tmp_path / "a" / "figures.json").read_text())
    # Of other stretches of the same text
    assert math.log2(perplexity(tmp_path / "a", tmp_path)) == pytest.approx(figures["bits_per_byte"], abs=0.3)


in_venv = pytest.mark.skipif(
    Path(sys.prefix) != ROOT / ".venv", reason="it installs .venv: run the tests with tests/run.py"
)


@in_venv
def test_quickstart(smollm2_gguf):
    done = run(SAMPLES / "quickstart.py", "What is the capital of France?")
    assert "Paris" in done.stdout
    assert "tokens/s" in done.stdout and "measured: weights" in done.stdout
    again = run(SAMPLES / "quickstart.py")
    assert "top-1" not in again.stdout, "the second time there is nothing to convert"


@in_venv
def test_edge_camera_reads_with_and_without_a_link():
    said = run(SAMPLES / "edge_camera.py", 2).stdout
    assert "Let us first determine markers of the coins and the" in said
    for link in ("tcp", "serial"):
        lines = [line.split() for line in said.splitlines() if line.startswith(link)]
        cut, mended = (lines.index([link, "the", "link", "is", what]) for what in ("cut", "mended"))
        before, without, after = ([words[2] for words in part] for part in
                                  (lines[:cut], lines[cut + 1 : mended], lines[mended + 1 :]))  # fmt: skip
        assert "edge" in before and set(without) == {"local"} and after[-1] == "edge", said
        sent = [int(words[5].replace(",", "")) for words in lines[:cut] if words[2] == "edge"]
        assert min(sent) > 46_080, "a latent of a byte a number"


@in_venv
def test_split_reader_sends_as_well_as_the_time_allows():
    lines = [line.split() for line in run(SAMPLES / "split_reader.py").stdout.splitlines()]
    sizes = [int(words[4].replace(",", "")) for words in lines if words[0] == "mode"]
    assert len(sizes) == 3 and sizes[0] < sizes[1] < sizes[2] < 480 * 96
    first, *_, last = (words for words in lines if words[1] == "ms")
    assert first[2] == "edge" and first[4] in "123" and first[9] == "unambiguously"
    assert last[0] == "100" and len(lines) == 3 + 7


@in_venv
def test_split_chat_goes_on_after_the_edge_was_killed(smollm2_gguf):
    said = run(SAMPLES / "split_chat.py").stdout
    before, after = said.split("[the edge is killed and started again]")
    assert "The sky" in before and len(after.split()) > 20
    assert "the last block run by the edge, desk, over tcp" in after


def test_outliers_are_measured(tmp_path):
    said = run(SAMPLES / "outliers.py", ROOT / "tests" / "data" / "tiny" / "qwen2", "--tokens", 256, "--json",
               tmp_path / "figures.json").stdout  # fmt: skip
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert {"float", "int8 weights, float inputs", "shadow 100%", "shadow 0%", "no shadow, absmax"} < set(
        figures["figures"]
    )
    assert "shadow 25%" in said and 0 <= figures["beyond"] <= 0.01 and figures["figures"]["float"][1] == 1
    assert figures["figures"]["16 bits, absmax"][1] > 0.9
