"""The rules of the tree, held by reading the source: which way imports point, who may know which package, how long a
file is. Two more by running: what a bare import loads."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {
    "sdk": "shoal",
    "runtime": "shoal.runtime",
    "converters": "shoal.converters",
    "device_agents": "shoal.device_agents",
}
MAY_IMPORT = {
    "sdk": ("shoal",),
    "runtime": ("shoal.runtime",),
    "converters": ("shoal.converters", "shoal.runtime"),
    "device_agents": ("shoal.device_agents", "shoal.runtime"),
}
# Packages that a folder may import anywhere, and those it may import only inside a function
ALWAYS = {
    "sdk": {"numpy", "starlette", "uvicorn", "h11"},  # files that only a verb's run() imports
    "runtime": {"numpy", "flatbuffers"},
    "converters": {"numpy", "onnx_ir", "safetensors", "gguf", "tokenizers"},
    "device_agents": {"numpy", "cryptography", "spake2", "serial", "zeroconf"},
}
LAZILY = {
    "sdk": {"tqdm", "psutil", "readline", "llguidance", "onnxruntime", "xllamacpp"},
    "runtime": {"tokenizers", "jinja2", "llguidance"},
    "converters": {"torch", "jinja2", "PIL"},
    "device_agents": {"segno", "flwr", "starlette", "uvicorn", "ray"},
}
# Where something is trained: they import torch at their top, and nobody else imports them there
TRAINED = {
    *(f"converters/split/{name}.py" for name in ("network", "operators", "operators_plain")),
    *(f"converters/split/{name}.py" for name in ("bottleneck", "distil", "entropic", "exits", "export", "modes")),
    *(f"converters/split/{name}.py" for name in ("neural_filter", "offload", "offload_sac", "slimmable", "train")),
    *(f"converters/sources/{name}.py" for name in ("aten", "torch_module")),
}
NETWORK = {"http.client", "urllib.request", "starlette", "uvicorn", "httpx", "requests"}
ENGINE_DOORS = {"runtime/session.py", "runtime/prepack.py", "runtime/providers.py"}
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
IDS = [str(path.relative_to(ROOT)) for path in SOURCES]


def module_of(path: Path) -> str:
    folder, *rest = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([FOLDERS[folder], *(part for part in rest if part != "__init__")])


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(absolute module, whether it is imported inside a function or for type checkers only) of every import."""
    package = module_of(path).split(".") if path.name == "__init__.py" else module_of(path).split(".")[:-1]

    def visit(node: ast.AST, lazy: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.Import):
            yield from ((alias.name, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = [*base, *(node.module.split(".") if node.module else [])]
            # `from . import x` names a module, `from .x import y` lives in one
            yield from ((".".join([*module, alias.name] if not node.module else module), lazy) for alias in node.names)
        inner = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        inner = inner or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inner)

    yield from visit(ast.parse(path.read_bytes()), False)


def within(module: str, packages) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


@pytest.mark.parametrize("path", SOURCES, ids=IDS)
def test_imports_follow_the_arrows(path):
    folder = path.relative_to(ROOT).parts[0]
    name = str(path.relative_to(ROOT))
    for module, lazy in imports(path):
        top = module.split(".")[0]
        if name not in TRAINED and not lazy:
            trained = {module_of(ROOT / path) for path in TRAINED}
            assert not within(module, trained), f"{name} must import {module} inside the function that needs it"
        if top == "shoal":
            assert within(module, MAY_IMPORT[folder]), f"{name} may not import {module}"
        elif top == "onnxruntime" and folder != "sdk":
            assert name in ENGINE_DOORS, f"{name} imports onnxruntime: only {sorted(ENGINE_DOORS)} may"
        elif top not in sys.stdlib_module_names:
            assert top in ALWAYS[folder] or top in LAZILY[folder], f"{name} imports {top}"
            assert lazy or top in ALWAYS[folder] or (top == "torch" and name in TRAINED), (
                f"{name} must import {top} inside the function that needs it"
            )


@pytest.mark.parametrize("path", SOURCES, ids=IDS)
def test_a_file_is_short_and_says_what_it_promises(path):
    text = path.read_text()
    assert text.count("\n") <= 500
    tree = ast.parse(text)
    assert ast.get_docstring(tree) or not tree.body, "no module docstring"
    if path.relative_to(ROOT).parts[0] != "sdk":
        library = (node for node in tree.body if "__name__ == '__main__'" not in ast.unparse(node))
        names = {node.id for part in library for node in ast.walk(part) if isinstance(node, ast.Name)}
        assert "print" not in names, "library code reports events, it does not print"


def test_every_package_is_installed():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    assert {module_of(path) for path in SOURCES if path.name == "__init__.py"} == listed


@pytest.mark.parametrize("path", sorted((ROOT / "sdk" / "commands").glob("[!_]*.py")), ids=lambda path: path.stem)
def test_a_verb_loads_nothing_before_it_runs(path):
    here = {module for module, lazy in imports(path) if not lazy}
    assert all(module.split(".")[0] in sys.stdlib_module_names or module == "shoal.options" for module in here), here


def loaded_by(statement: str) -> set[str]:
    """The modules in sys.modules after `statement`, in a fresh Python where torch cannot be imported."""
    code = f"import sys; sys.modules['torch'] = None; {statement}; print(*(m for m in sys.modules if sys.modules[m]))"
    command = [sys.executable, "-P", "-c", code]
    return set(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split())


@pytest.mark.parametrize("statement", ["import shoal", "import shoal.runtime"])
def test_a_bare_import_loads_no_engine_and_no_network(statement):
    added = loaded_by(statement) - loaded_by("pass")
    assert not added & {*NETWORK, "asyncio", "numpy", "onnxruntime", "tokenizers"}


def test_the_runtime_needs_no_converter_and_no_network():
    added = loaded_by("import shoal.runtime.model") - loaded_by("import onnxruntime, numpy")
    assert not {module for module in added if within(module, ("shoal.converters", "shoal.device_agents", "shoal.cli"))}
    assert not added & {*NETWORK, "tokenizers", "jinja2"}


def test_help_imports_no_library():
    added = loaded_by("import shoal.cli\ntry: shoal.cli.main(['--help'])\nfinally: sys.stdout.flush()")
    assert not {module for module in added if within(module, ("shoal.runtime", "shoal.converters", "numpy", "tqdm"))}
