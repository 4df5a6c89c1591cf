"""What every test may ask for: real models, fetched once a machine and converted once a run; and `--deep`."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "tests" / "data" / "tiny"
# What the awkward widths of tests/data/tiny become: whole blocks and whole panels
WIDER = {48: 128, 72: 192, 64: 128, 32: 64, 16: 32, 144: 384}
WIDER_BERT = {48: 192, 88: 256}
sys.path.insert(0, str(ROOT / "samples"))
sys.path.insert(0, str(ROOT / "tests" / "data"))  # definitions of networks that tests train on
# A shell's background job starts with Ctrl-C ignored, and so would every program that a test starts and interrupts
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    parser.addoption("--deep", action="store_true", help="also run the slow and the large tests")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--deep"):
        deep = [item for item in items if item.get_closest_marker("deep")]
        config.hook.pytest_deselected(items=deep)
        items[:] = [item for item in items if item not in set(deep)]


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """What a test makes a device prepare goes into a folder of this run, not into the cache of whoever runs it."""
    from models import cache

    os.environ["SHOAL_TEST_CACHE"] = str(cache())  # models stay where they are
    os.environ["SHOAL_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def without_kernels(monkeypatch):
    """As on a device where no C++ compiler was found when shoal was installed."""
    from shoal.runtime import kernels

    monkeypatch.setattr(kernels, "_loaded", lambda: (None, "it was not built: the test says so"))


def _model(name: str) -> Path:
    from models import FetchError, fetch

    try:
        return fetch(name)
    except FetchError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def tiny_gguf() -> Path:
    """2 blocks of width 16 with heads of 4, 32k tokens, F16: for readers of the format."""
    return _model("tiny")


@pytest.fixture(scope="session")
def reader_onnx() -> Path:
    """PP-OCRv4's recogniser in fp32 ONNX; all of its weights are Constant nodes."""
    return _model("reader")


@pytest.fixture(scope="session")
def ocr_folder() -> Path:
    """PP-OCRv4's detector and its classifier of directions in ONNX, by their file names."""
    return _model("ocr")


@pytest.fixture(scope="session")
def efficientnet():
    """EfficientNet-Lite0 as a torch module in eval: fp32 [n, 3, h, w] as (x - 127) / 128, to 1,000 logits."""
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'shoal[train]'")
    path = _model("efficientnet")
    from efficientnet_lite0 import EfficientNetLite0

    module = EfficientNetLite0()
    module.load_state_dict(torch.load(path, weights_only=True))
    return module.eval()


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct, the default wherever a real language model is needed."""
    return _model("smollm2")


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
    """all-MiniLM-L6-v2 in fp32, a Hugging Face folder: sentence embeddings."""
    return _model("minilm")


@pytest.fixture(scope="session")
def qwen_gguf() -> Path:
    """Qwen2.5-Coder-0.5B-Instruct, 478 MB: deep tests only."""
    return _model("qwen")


@pytest.fixture(scope="session")
def gemma_gguf() -> Path:
    """Gemma 3 270M, 238 MB: deep tests only."""
    return _model("gemma")


def _bundle(source: Path, tmp_path_factory, name: str, recipe: str) -> Path:
    from shoal.converters.convert import convert

    out = tmp_path_factory.mktemp("bundles") / f"{name}.shoal"
    convert(source, out, recipe, check_parity=False)
    return out


@pytest.fixture(scope="session")
def tiny_folder() -> Path:
    """A llama of a few thousand random weights, a Hugging Face folder that is part of the tests."""
    return ROOT / "tests" / "data" / "tiny" / "llama"


@pytest.fixture(scope="session")
def wide(tmp_path_factory) -> Callable[[str], Path]:
    """wide(family): that model of tests/data/tiny with random weights of greater widths, that rotate and gate."""
    import json
    import shutil

    import numpy as np
    from safetensors.numpy import save_file

    from shoal.converters.sources import open_source

    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            folder = made[family] = tmp_path_factory.mktemp("wide") / family
            shutil.copytree(TINY / family, folder)
            wider, random = WIDER_BERT if "bert" in family else WIDER, np.random.default_rng(len(made))
            for path in folder.rglob("*config.json"):
                said = json.loads(path.read_text())
                for key in ("hidden_size", "intermediate_size", "head_dim", "word_embedding_dimension"):
                    if key in said:
                        said[key] = wider[said[key]]
                path.write_text(json.dumps(said))
            tensors = {}
            with open_source(TINY / family) as source:
                shapes = {name: info.shape for name, info in source.tensors().items()}
            for name, old in shapes.items():
                shape = [wider.get(length, length) for length in old]
                spread = 0.2 if "norm" in name.lower() else 0.5
                if len(shape) == 2:
                    spread = 1 if "embed" in name else shape[1] ** -0.5
                middle = 1 if "norm" in name.lower() and name.endswith("weight") and family != "gemma3" else 0
                tensors[name] = (random.standard_normal(shape) * spread + middle).astype(np.float32)
            save_file(tensors, folder / "model.safetensors")
        return made[family]

    return make


@pytest.fixture(scope="session")
def tiny_bundle(tiny_folder, tmp_path_factory) -> Path:
    """`tiny_folder` in fp32."""
    return _bundle(tiny_folder, tmp_path_factory, "tiny", "fp32")


@pytest.fixture(scope="session")
def static_bundle(tiny_bundle, tmp_path_factory) -> Path:
    """`tiny_bundle` with static graphs in fp32 for chunks of 4 and 8 tokens, made for the CPU."""
    from make_static import write

    out = tmp_path_factory.mktemp("static") / "fp32.shoal"
    write(tiny_bundle, out, None)
    return out


@pytest.fixture(scope="session")
def smollm2_bundle(smollm2_gguf, tmp_path_factory) -> Path:
    """`smollm2_gguf` in int4."""
    return _bundle(smollm2_gguf, tmp_path_factory, "smollm2", "int4")


@pytest.fixture(scope="session")
def smollm2_int8_bundle(smollm2_gguf, tmp_path_factory) -> Path:
    """`smollm2_gguf` in int8, for who needs it to make sense."""
    return _bundle(smollm2_gguf, tmp_path_factory, "smollm2-int8", "int8")


@pytest.fixture(scope="session")
def minilm_bundle(minilm_folder, tmp_path_factory) -> Path:
    """`minilm_folder` in int8."""
    return _bundle(minilm_folder, tmp_path_factory, "minilm", "int8")


@pytest.fixture(scope="session")
def stacked_bundle(tiny_folder, tmp_path_factory) -> Path:
    """`tiny_folder` as a stack of whole matrices and blocks."""
    return _bundle(tiny_folder, tmp_path_factory, "tiny.stack", "hybrid")


@pytest.fixture(scope="session")
def mixture_folder() -> Path:
    """A mixture of 4 layers of 32 experts, 4 a byte, as samples/train_mixture.py trained it: a Hugging Face folder that
    is part of the tests, for what random routing cannot show."""
    return ROOT / "tests" / "data" / "trained_mixture"


@pytest.fixture(scope="session")
def mixture_bundle(mixture_folder, tmp_path_factory) -> Path:
    """`mixture_folder` in int8."""
    return _bundle(mixture_folder, tmp_path_factory, "mixture", "int8")
