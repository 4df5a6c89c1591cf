"""The Python of README.md and docs/python.md is run as it stands: blocks in their order, on real models."""

import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def run_page(smollm2_bundle, minilm_bundle, tiny_folder, tmp_path, monkeypatch, capsys):
    """Runs a page's blocks in an empty folder; returns what they print."""

    def run(page: str) -> str:
        monkeypatch.chdir(tmp_path)
        shutil.copytree(tiny_folder, "checkpoint")
        text = (ROOT / page).read_text()
        names: dict = {"__name__": page}
        for match in re.finditer(r"^```python\n(.*?)^```$", text, re.M | re.S):
            block = match[1].replace('"model.gguf", "smollm2.shoal"', '"checkpoint", "model.shoal"')
            for name, path in (("smollm2.shoal", smollm2_bundle), ("minilm.shoal", minilm_bundle)):
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
    assert Path("mixed.shoal").exists()


def test_the_readme_runs(run_page):
    assert re.search("(Yes|No) [0-9.]+ [0-9.]+$", run_page("README.md"))
    assert Path("model.shoal").exists()


@pytest.mark.parametrize("page", ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", (ROOT / page).read_text()):
        assert "://" in target or ((ROOT / page).parent / target).exists(), f"{page} links to {target}"
