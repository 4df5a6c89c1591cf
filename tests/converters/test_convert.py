"""Converting: the same bytes every time, all or nothing whatever happens on the way, and never more memory than a part
of the model."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from shoal import cli
from shoal.converters.convert import convert
from shoal.converters.recipe import NAMED, Format, Recipe
from shoal.runtime.bundle import Bundle
from shoal.runtime.errors import ConvertError, ShoalError, SourceError, StorageError, UsageError

# `shoal convert` as a person runs it; ACT happens at the first event of STAGE that is past the middle
CHILD = """
import os, resource, signal, sys
from shoal import cli, show
stage, act = sys.argv[1:3]
tell = show.Show.progress
def progress(self, event):
    tell(self, event)
    if event.stage == stage and 2 * event.done >= event.total:
        if act.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, act))
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(act), int(act)))
show.Show.progress = progress
sys.exit(cli.main(["convert", *sys.argv[3:]]))
"""


def child(stage, act, *arguments) -> tuple[int, str]:
    """Runs `shoal convert` in a process of its own: its status and what it says on stderr."""
    command = [sys.executable, "-c", CHILD, stage, str(act), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stderr


@pytest.fixture
def folder(tmp_path):
    """Where a bundle is to be, and nothing else."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.fixture
def checkpoint(tiny, tmp_path):
    """checkpoint(config=…, **tensors): the tiny llama with other settings and other or without (None) tensors."""

    def make(config=(), drop=(), **tensors):
        path = tmp_path / "checkpoint"
        shutil.copytree(tiny / "llama", path)
        said = json.loads((path / "config.json").read_text()) | dict(config)
        (path / "config.json").write_text(json.dumps(said))
        weights = load_file(path / "model.safetensors") | tensors
        save_file({name: array for name, array in weights.items() if array is not None}, path / "model.safetensors")
        for name in drop:
            (path / name).unlink()
        return path

    return make


@contextmanager
def unchanged(folder):
    """What is in the folder, hidden files too, is afterwards what it was."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    yield
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


# The same bytes


@pytest.mark.parametrize("recipe", ["fp32", "int8", "int4"])
def test_two_processes_make_the_same_file(tiny, tmp_path, folder, recipe):
    for name in ("a", "b"):
        assert child("", "", tiny / "llama", "-o", tmp_path / name, "--recipe", recipe)[0] == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with Bundle.open(tmp_path / "a") as bundle:
        bundle.verify()


def test_the_figures_are_in_the_bundle_and_shown(tiny, folder, capsys):
    report = convert(tiny / "llama", folder / "a", "int8")
    with Bundle.open(folder / "a") as bundle:
        figures = json.loads(bundle.bytes(bundle.section("parity")))
    assert figures == json.loads(json.dumps({"parity": report.parity, "baseline": report.baseline}))
    assert report.parity["kl"] < 0.01 and report.parity["first_divergent_block"] is None
    assert cli.main(["inspect", str(folder / "a")]) == 0
    assert f"top-1 agreement {report.parity['top1_agreement']:.1%}" in capsys.readouterr().out
    assert report.bundle_bytes == (folder / "a").stat().st_size and (8 < report.bits_per_weight < 13)
    assert [path.name for path in folder.iterdir()] == ["a"]


@pytest.mark.parametrize("recipe", [Recipe("plain", linear=Format(4), head=Format(8)), NAMED["int4-gptq"]],
                         ids=lambda recipe: recipe.name)  # fmt: skip
def test_without_kernels_of_our_own_the_same_comes_out(tiny, folder, request, recipe):
    ours = convert(tiny / "qwen3", folder / "ours", recipe)
    request.getfixturevalue("without_kernels")
    report = convert(tiny / "qwen3", folder / "lowered", recipe)
    assert sorted(path.name for path in folder.iterdir()) == ["lowered", "ours"]
    np.testing.assert_allclose(report.parity["block_errors"], ours.parity["block_errors"], rtol=0.05)
    if recipe.name == "plain":  # what is rounded by calibration sees sums in another order
        with Bundle.open(folder / "ours") as a, Bundle.open(folder / "lowered") as b:
            for kind, name in (("weights", "weights"), ("graph", "decode"), ("graph", "decode.fp16"), ("card", "")):
                assert a.bytes(a.section(kind, name)) == b.bytes(b.section(kind, name))


# All or nothing


@pytest.mark.parametrize("stage", ["convert", "parity", "write"])
@pytest.mark.parametrize("old", [False, True])
def test_killed_in_the_middle_and_begun_anew(tiny, folder, stage, old):
    out = folder / "a"
    if old:
        out.write_bytes(b"old")
    options = ["--overwrite"] if old else []
    assert child(stage, "SIGKILL", tiny / "llama", "-o", out, "--recipe", "int8", *options)[0] == -9
    assert out.exists() == old and (not old or out.read_bytes() == b"old")
    left = [path for path in folder.iterdir() if path != out]
    assert left and all(path.name.startswith(".a.") for path in left), "hidden, and known as this target's"
    assert stage != "parity" or any(path.is_dir() for path in left)
    convert(tiny / "llama", out, "int8", overwrite=old, check_parity=False)
    assert list(folder.iterdir()) == [out]


@pytest.mark.parametrize(("stage", "recipe"), [("convert", "fp32"), ("calibrate", "int4-gptq"), ("parity", "int4")])
def test_ctrl_c_leaves_nothing(tiny, folder, stage, recipe):
    (folder / "a").write_bytes(b"old")
    with unchanged(folder):
        status, said = child(stage, "SIGINT", tiny / "llama", "-o", folder / "a", "--recipe", recipe, "--overwrite")
    assert status == 130 and "Traceback" not in said


@pytest.mark.parametrize(
    ("stage", "limit", "recipe"),
    [
        ("convert", 20_000, "fp32"),
        ("calibrate", 60_000, "int4-gptq"),
        ("parity", 120_000, "int4"),
        ("write", 9, "int4"),
    ],
)
def test_a_limit_on_the_size_of_files(tiny, folder, stage, limit, recipe):
    """The bundle fails under the first, scratch files larger than the bundle under the next two."""
    (folder / "a").write_bytes(b"old")
    with unchanged(folder):
        status, said = child(stage, limit, tiny / "llama", "-o", folder / "a", "--recipe", recipe, "--overwrite")
    assert status == StorageError.code, said
    assert "Free some space" in said and str(folder) in said


@pytest.fixture
def disk(tmp_path):
    """disk(size): an empty file system of that many KiB."""
    mounted = tmp_path / "disk"
    mounted.mkdir()

    def mount(size: int):
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "shoal", str(mounted)]
        if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a file system needs root")
        return mounted

    yield mount
    while os.path.ismount(mounted):
        subprocess.run(["umount", "-l", str(mounted)], check=True)


@pytest.mark.parametrize("recipe", ["fp32", "int4"])
def test_a_disk_of_every_size(tiny, disk, recipe):
    """Each is full a little later: in the weights, the graphs, the scratch files of each block, the index."""
    whole = 0
    for size in (int(24 * 1.3**step) for step in range(20)):
        folder = disk(size)
        (folder / "a").write_bytes(b"old")
        try:
            convert(tiny / "llama", folder / "a", recipe, overwrite=True)
            whole += 1
        except StorageError as error:
            assert not whole and "Free some space" in error.fix
            assert (folder / "a").read_bytes() == b"old"
        assert os.listdir(folder) == ["a"]
        subprocess.run(["umount", str(folder)], check=True)
        if whole == 2:
            return
    pytest.fail("no disk was large enough")


# What is refused


def test_an_existing_file_is_replaced_only_when_asked(tiny, folder):
    out = folder / "a"
    out.write_bytes(b"old")
    with unchanged(folder), pytest.raises(UsageError, match="exists"):
        convert(tiny / "llama", out)
    before = out.stat().st_ino
    with open(out, "rb") as reader:
        convert(tiny / "llama", out, "int8", overwrite=True, check_parity=False)
        assert reader.read() == b"old" and out.stat().st_ino != before
    with Bundle.open(out) as bundle:
        bundle.verify()


@pytest.mark.parametrize(
    ("out", "options", "family"),
    [
        ("absent/a", {}, StorageError),
        ("folder", {}, UsageError),
        ("folder", {"overwrite": True}, UsageError),
        ("file/a", {}, StorageError),
        ("a\0b", {}, UsageError),
        ("", {}, UsageError),
        ("n" * 300, {}, StorageError),
        ("a", {"recipe": "int3"}, UsageError),
        ("a", {"recipe": "int4-gptq", "calibration_text": "absent"}, SourceError),
        ("a", {"recipe": "int4-gptq", "calibration_text": "file"}, SourceError),
    ],
)
def test_what_cannot_be_written_is_refused(tiny, folder, monkeypatch, out, options, family):
    monkeypatch.chdir(folder)
    (folder.parent / "folder").mkdir()
    (folder / "file").write_bytes(b"short")
    if out == "folder":
        out = "../folder"
    with unchanged(folder), pytest.raises(family) as caught:
        convert(tiny / "llama", out, **options)
    assert caught.value.what and caught.value.why and caught.value.fix


BAD = np.ones((72, 48), np.float32)
BAD[70, 3] = np.nan
GATE, DOWN = "model.layers.1.mlp.gate_proj.weight", "model.layers.2.mlp.down_proj.weight"
NORM, TABLE = "model.norm.weight", "model.embed_tokens.weight"
REFUSED = {
    "no tokenizer": ({"drop": ["tokenizer.json"]}, SourceError, ["tokenizer.json"]),
    "no configuration": ({"drop": ["config.json"]}, SourceError, ["config.json"]),
    "no weights": ({"drop": ["model.safetensors"]}, SourceError, ["safetensors"]),
    "architecture": ({"config": {"model_type": "mamba"}}, ConvertError, ["mamba"]),
    "everything that is missing": (
        {"config": {"hidden_act": "relu"}, GATE: None, DOWN: np.ones((72, 48), np.float32)},
        ConvertError, ["'relu'", GATE, "missing", DOWN, "[72, 48], not [48, 72]"],
    ),
    "integers": ({GATE: np.ones((72, 48), np.int32)}, SourceError, [GATE, "I32"]),
    "no number in a matrix": ({GATE: BAD}, ConvertError, [GATE, "not finite"]),
    "no number in a vector": ({NORM: np.full(48, np.inf, np.float32)}, ConvertError, [NORM, "not finite"]),
    "no number in the embedding": ({TABLE: np.full((260, 48), -np.inf, np.float16)}, ConvertError, [TABLE]),
}  # fmt: skip


@pytest.mark.parametrize("recipe", ["fp32", "int4", "int4-gptq"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_converted_is_refused_by_name(checkpoint, folder, name, recipe):
    changes, family, named = REFUSED[name]
    with unchanged(folder), pytest.raises(family) as caught:
        convert(checkpoint(**changes), folder / "a", recipe)
    assert all(word in str(caught.value) for word in named), caught.value


@pytest.mark.parametrize("path", ["absent", "config.json", "model.safetensors"])
def test_what_is_no_checkpoint_is_refused(checkpoint, folder, path):
    with unchanged(folder), pytest.raises(SourceError):
        convert(checkpoint() / path, folder / "a")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_a_source_that_may_not_be_read(checkpoint, folder):
    path = checkpoint()
    (path / "model.safetensors").chmod(0)
    with unchanged(folder), pytest.raises(SourceError):
        convert(path, folder / "a")


def test_the_source_is_never_replaced(checkpoint, tiny_gguf, tmp_path):
    folder = checkpoint()
    for out in (folder / "model.safetensors", folder / "config.json"):
        with unchanged(tmp_path / "checkpoint"), pytest.raises(UsageError, match="replace the checkpoint"):
            convert(folder, out, "int8", overwrite=True)
    (tmp_path / "m.gguf").write_bytes(tiny_gguf.read_bytes())
    (tmp_path / "link").symlink_to("m.gguf")
    for source, out in (("m.gguf", "m.gguf"), ("link", "m.gguf"), ("m.gguf", "link")):
        with pytest.raises(UsageError, match="replace the checkpoint"):
            convert(tmp_path / source, tmp_path / out, "int8", overwrite=True)
    assert (tmp_path / "m.gguf").read_bytes() == tiny_gguf.read_bytes()
    for _ in range(2):  # a bundle beside its source may be replaced
        convert(folder, folder / "a.shoal", "int8", overwrite=True, check_parity=False)


@pytest.mark.parametrize("kind", [OSError(28, "No space left on device"), ValueError("mine"), BrokenPipeError()])
def test_what_the_caller_raises_leaves_as_it_is(tiny, folder, kind):
    def progress(event):
        if event.stage == "parity":
            raise kind

    with unchanged(folder), pytest.raises((type(kind), ShoalError)) as caught:
        convert(tiny / "llama", folder / "a", "int8", progress=progress)
    assert caught.value is kind or isinstance(kind, OSError)


# Streaming

MEASURE = """
import sys
from shoal.converters import parity
from shoal.converters.convert import convert
from shoal.runtime.measure import anonymous_bytes
parity.compare.__kwdefaults__["tokens"] = 96  # what a text takes is not the question
convert(sys.argv[1], sys.argv[3] + ".small", sys.argv[4])  # what the libraries take, once
before = anonymous_bytes()
print(before, convert(sys.argv[2], sys.argv[3], sys.argv[4]).peak_bytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
@pytest.mark.parametrize("recipe", ["fp32", "int4"])
def test_a_part_of_the_model_is_in_memory_and_never_all(checkpoint, tiny, folder, recipe):
    """32 blocks of 2 MB in fp32 are converted, opened for the cache's scales and compared with themselves."""
    sizes = dict(hidden_size=256, intermediate_size=384, num_hidden_layers=32, num_attention_heads=8, head_dim=32,
                 num_key_value_heads=1)  # fmt: skip
    rng = np.random.default_rng(0)

    def random(*shape):
        return rng.standard_normal(shape, np.float32) * np.float32(shape[-1] ** -0.5)

    tensors = {TABLE: random(260, 256), NORM: np.ones(256, np.float32), "lm_head.weight": random(260, 256)}
    for block in range(32):
        prefix = f"model.layers.{block}."
        for part, rows in zip("qkvo", (256, 32, 32, 256), strict=True):
            tensors[f"{prefix}self_attn.{part}_proj.weight"] = random(rows, 256)
        tensors |= {f"{prefix}mlp.{part}_proj.weight": random(384, 256) for part in ("gate", "up")}
        tensors[f"{prefix}mlp.down_proj.weight"] = random(256, 384)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = np.ones(256, np.float32)
    path = checkpoint(sizes, **tensors)
    size = (path / "model.safetensors").stat().st_size
    assert size > 50 << 20
    if recipe == "int4":  # what calibration text takes is not the question either
        recipe = folder / "int4.toml"
        recipe.write_text(
            "smooth = true\nlinear = { bits = 4 }\nembedding = { bits = 8 }\nhead = { bits = 4 }\n"
            "[calibration]\ntokens = 256\nlength = 64"
        )
    command = [sys.executable, "-c", MEASURE, tiny / "llama", path, folder / "a", recipe]
    before, peak = map(int, subprocess.run(command, capture_output=True, check=True, text=True).stdout.split())
    assert peak - before < size // 2
