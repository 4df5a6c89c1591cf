"""The Python of README.md and of docs' python.md, bitstack.md, experts.md and split.md is run as it stands: blocks in
their order, on real models, beside an agent that has no edge."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "data"))
from make_split import split  # noqa: E402

from shoal.converters.convert import convert  # noqa: E402


@pytest.fixture
def agent(smollm2_bundle, tmp_path_factory, monkeypatch):
    """A device's agent that runs by itself: a model that writes and one of tensors."""
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "device_agents"))
    from paired import small_network

    folder = tmp_path_factory.mktemp("agent")
    monkeypatch.setenv("SHOAL_HOME", str(folder / "home"))
    _, camera, *_ = small_network(folder)
    words = ["--model", f"chat={smollm2_bundle}", "--model", f"camera={camera}", "--memory", "200MB"]
    command = [sys.executable, "-m", "shoal", "agent", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as daemon:
        assert daemon.stdout is not None and any("ready for apps" in line for line in daemon.stdout)
        yield
        daemon.terminate()


@pytest.fixture
def run_page(agent, smollm2_bundle, minilm_bundle, stacked_bundle, tiny_folder, tmp_path, monkeypatch, capsys):
    """Runs a page's blocks in an empty folder; returns what they print."""

    def run(page: str) -> str:
        monkeypatch.chdir(tmp_path)
        shutil.copytree(tiny_folder, "checkpoint")
        Path("head.onnx").write_bytes(split().head)
        Path("tail.onnx").write_bytes(split().tail)
        text = (ROOT / page).read_text()
        names: dict = {"__name__": page}
        for match in re.finditer(r"^```python\n(.*?)^```$", text, re.M | re.S):
            block = match[1].replace('"model.gguf", "smollm2.shoal"', '"checkpoint", "model.shoal"')
            for name, path in (("smollm2.shoal", smollm2_bundle), ("minilm.shoal", minilm_bundle),
                               ("model.bitstack.shoal", stacked_bundle)):  # fmt: skip
                block = block.replace(f'"{name}"', repr(str(path)))
            line = text[: match.start(1)].count("\n")
            exec(compile("\n" * line + block, page, "exec"), names)  # an error names the page's line
        return capsys.readouterr().out

    return run


def test_the_python_page_runs(run_page):
    said = run_page("docs/python.md")
    assert re.search(r" [1-9][0-9]+ of [0-9]+ prompt tokens reused", said)
    assert "cancelled 10" in said and "weather {'city'" in said
    assert "do not fit the context" in said
    assert re.search(r"^local [0-9.e-]+ \(1, 10\) ", said, re.M) and "local length" in said
    assert Path("mixed.shoal").exists() and Path("cats.device.shoal").exists()


def test_the_readme_runs(run_page):
    said = run_page("README.md")
    assert re.search("(Yes|No) [0-9.]+ [0-9.]+$", said, re.M) and re.search("^[0-9]+ of [0-9]+ entries$", said, re.M)
    assert said.endswith("\n[local]\n")
    assert Path("model.shoal").exists()


def test_the_page_on_stacks_runs(run_page):
    said = run_page("docs/bitstack.md")
    assert re.search("^[0-9]+ of [0-9]+ entries, [0-9]+ bytes$", said, re.M) and "elastic" in said


def test_the_page_on_experts_runs(run_page, tmp_path):
    convert(ROOT / "tests" / "data" / "tiny" / "olmoe", tmp_path / "model.shoal", "int8", check_parity=False)
    said = run_page("docs/experts.md")
    assert "Counters(hits=" in said and Path("model.trace").exists()


def test_the_page_on_latents_runs(run_page):
    page = run_page("docs/split.md")
    said = re.search("^([0-9]+) of ([0-9]+) bytes, off by at most ([0-9.]+)$", page, re.M)
    assert said and int(said[1]) < int(said[2]) / 8 and float(said[3]) < 0.5
    assert re.search(r"^(edge 1 [0-9]+ \[[0-9]\] $|local )", page, re.M) and "'Conv:a'" in page
    assert re.search(r"^task 1 goes to edge [0-3]$", page, re.M) and Path("edges.policy").exists()


def test_the_page_on_training_a_split_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = onnx.ModelProto.FromString(split().whole)
    del model.graph.output[1:]  # the label: a network that is trained gives one thing
    Path("network.onnx").write_bytes(model.SerializeToString())
    np.savez("pictures.npz", images=np.random.default_rng(0).integers(0, 256, (60, 32, 32, 3), np.uint8))
    text = (ROOT / "docs/split-training.md").read_text()
    (block,) = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
    exec(compile(block, "docs/split-training.md", "exec"), {})
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in said] == [f"e{member}b{bits}" for member in (1, 2, 3) for bits in (2, 4)]


def test_the_page_on_backends_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SHOAL_PLUGINS", "none")
    Path("head.onnx").write_bytes(split().head)
    names: dict = {}
    for block in re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs/backends.md").read_text(), re.M | re.S):
        exec(compile(block, "docs/backends.md", "exec"), names)
    said = capsys.readouterr().out
    assert "cpu ['" in said and "QNN has no MatMulInteger" in said and "\n1.0 [] {'CPUExecutionProvider': " in said
    assert (
        "strict 2.139 s, npu idle 37.2%" in said and "ours 1.347 s, npu idle 0.2%" in said and "bound 1.344 s" in said
    )


@pytest.mark.parametrize("page", ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", (ROOT / page).read_text()):
        assert "://" in target or ((ROOT / page).parent / target).exists(), f"{page} links to {target}"
