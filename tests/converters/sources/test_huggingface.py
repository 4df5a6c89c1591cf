"""Hugging Face folders: what they say together, and what is missing or wrong in them."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from shoal.converters.sources import open_source
from shoal.runtime.errors import SourceError

TINY = Path(__file__).parents[2] / "data" / "tiny"


@pytest.fixture
def folder(tmp_path):
    """A copy of a tiny llama, to be broken."""
    shutil.copytree(TINY / "llama", tmp_path / "llama")
    return tmp_path / "llama"


def change(path: Path, **values) -> None:
    content = json.loads(path.read_bytes()) if path.exists() else {}
    path.write_text(json.dumps({key: value for key, value in (content | values).items() if value != "absent"}))


def shard(folder: Path, **mapping) -> dict[str, np.ndarray]:
    """Cuts model.safetensors in two; `mapping` goes over the index's weight_map."""
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    names = sorted(tensors)
    files = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, held in files.items():
        safetensors.numpy.save_file({name: tensors[name] for name in held}, folder / file)
    (folder / "model.safetensors").unlink()
    weight_map = {name: file for file, held in files.items() for name in held} | mapping
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tensors


def test_a_folder(folder):
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    with open_source(folder) as source:
        config = source.config()
        assert (config["model_type"], config["hidden_size"], config["eos_token_id"]) == ("llama", 48, 2)
        assert config["name"] == "llama" and config["add_bos_token"] is True and None not in config.values()
        assert set(source.tensors()) == set(tensors)
        name = "model.layers.1.mlp.up_proj.weight"
        assert np.array_equal(source.read(name, 5, 20), tensors[name][5:20])
        assert source.chat_template().startswith("{% for m in messages %}")
        assert source.tokenizer() == (folder / "tokenizer.json").read_bytes()
        assert "llama" in source.describe() and "\n" not in source.describe()


def test_minilm(minilm_folder):
    with open_source(minilm_folder) as source:
        config = source.config()
        assert (config["pooling"], config["normalize"], config["max_seq_length"]) == ("mean", True, 256)
        name = "embeddings.word_embeddings.weight"
        with safetensors.safe_open(minilm_folder / "model.safetensors", "np") as reference:
            assert np.array_equal(source.read(name, 1000, 1010), reference.get_slice(name)[1000:1010])
        with pytest.raises(SourceError):
            source.read("embeddings.position_ids")  # integers


def test_cls_pooling():
    with open_source(TINY / "bert-cls") as source:
        assert (source.config()["pooling"], source.config()["normalize"]) == ("cls", False)


def test_shards_and_symbolic_links(folder, tmp_path):
    """A cache of downloads keeps files elsewhere and links to them from the folder."""
    tensors = shard(folder)
    (tmp_path / "blobs").mkdir()
    for path in list(folder.iterdir()):
        blob = path.rename(tmp_path / "blobs" / path.name.replace(".", "-"))
        path.symlink_to(blob)
    with open_source(folder) as source:
        assert list(source.tensors()) == sorted(tensors, key=lambda name: (sorted(tensors).index(name) % 2, name))
        for name, value in tensors.items():
            assert np.array_equal(source.read(name), value)


def test_ends_come_from_everywhere(folder):
    change(folder / "generation_config.json", eos_token_id=[7, 2], pad_token_id=9, bos_token_id=8)
    change(folder / "config.json", eos_token_id=3, pad_token_id=None)
    with open_source(folder) as source:
        config = source.config()
    assert (config["eos_token_id"], config["pad_token_id"], config["bos_token_id"]) == ([7, 2, 3], 9, 1)


def test_tied_unless_there_is_a_head(folder):
    for name, tied in (("llama", False), ("llama3", True)):
        copy = folder.parent / f"copy-{name}"
        shutil.copytree(TINY / name, copy)
        change(copy / "config.json", tie_word_embeddings="absent")
        with open_source(copy) as source:
            assert source.config()["tie_word_embeddings"] is tied


@pytest.mark.parametrize("prefixes", [("language_model.model.", "language_model."), ("model.language_model.", "")])
def test_the_text_model_of_a_multimodal_one(folder, prefixes):
    inner, outer = prefixes
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    renamed = {
        inner + name.removeprefix("model.") if name.startswith("model.") else outer + name: value
        for name, value in tensors.items()
    }
    renamed["vision_tower.weight"] = np.ones(3, "f4")
    safetensors.numpy.save_file(renamed, folder / "model.safetensors")
    text = json.loads((folder / "config.json").read_bytes())
    outside = {
        "model_type": "two_senses",
        "vision_config": {},
        "text_config": text,
        "eos_token_id": [2, 5],
        "hidden_size": 1,
    }
    (folder / "config.json").write_text(json.dumps(outside))
    with open_source(folder) as source:
        config = source.config()
        assert (config["model_type"], config["hidden_size"]) == ("llama", 48) and "text_config" not in config
        assert set(source.tensors()) == set(tensors) | {"vision_tower.weight"}
        assert np.array_equal(source.read("lm_head.weight"), tensors["lm_head.weight"])


def test_chat_templates(folder):
    def template() -> str:
        with open_source(folder) as source:
            return source.chat_template()

    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    change(folder / "tokenizer_config.json", chat_template=named)
    assert template() == "D"
    change(folder / "tokenizer_config.json", chat_template="absent")
    assert template() == ""
    (folder / "chat_template.jinja").write_text("J")
    assert template() == "J"
    (folder / "chat_template.jinja").unlink()
    for wrong in (1, {"a": 1}, "\ud800", [{"name": "default", "template": 3}]):
        change(folder / "tokenizer_config.json", chat_template=wrong)
        with pytest.raises(SourceError):
            template()


def remove(name):
    return lambda folder: (folder / name).unlink()


def write(name, content: bytes):
    return lambda folder: (folder / name).write_bytes(content)


def pickled(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"PK")


def without_a_shard(folder):
    shard(folder)
    (folder / "two.safetensors").unlink()


def directory(name):
    return lambda folder: ((folder / name).unlink(), (folder / name).mkdir())


BROKEN = {
    "no config.json": (remove("config.json"), "save_pretrained"),
    "no tokenizer.json": (remove("tokenizer.json"), "tokenizer.save_pretrained"),
    "no weights": (remove("model.safetensors"), "save_pretrained"),
    "pickled weights": (pickled, "save_pretrained"),
    "a missing shard": (without_a_shard, "missing file"),
    "a shard without its tensor": (lambda f: shard(f, **{"lm_head.weight": "two.safetensors"}) and None, "Download"),
    "a shard outside": (lambda f: shard(f, **{"lm_head.weight": "../llama/one.safetensors"}), "Download"),
    "an absolute shard": (lambda f: shard(f, **{"lm_head.weight": "/etc/x.safetensors"}), "Download"),
    "a shard in a subfolder": (lambda f: shard(f, **{"lm_head.weight": "sub/one.safetensors"}), "Download"),
    "a shard with a backslash": (lambda f: shard(f, **{"lm_head.weight": "..\\one.safetensors"}), "Download"),
    "a shard with a NUL": (lambda f: shard(f, **{"lm_head.weight": "a\0.safetensors"}), "Download"),
    "a shard that is a pickle": (lambda f: shard(f, **{"lm_head.weight": "pytorch_model.bin"}), "Download"),
    "a shard that is a number": (lambda f: shard(f, **{"lm_head.weight": 1}), "Download"),
    "an index without a map": (
        lambda f: (shard(f), (f / "model.safetensors.index.json").write_text('{"weight_map": []}')),
        "Download",
    ),
    "a quantised checkpoint": (lambda f: change(f / "config.json", quantization_config={"bits": 4}), "full precision"),
    "a quantised text model": (
        lambda f: change(f / "config.json", text_config={"quantization_config": {"bits": 4}}),
        "full precision",
    ),
    "config.json that is a list": (write("config.json", b"[]"), "Download"),
    "config.json that is empty": (write("config.json", b""), "Download"),
    "config.json with NaN": (write("config.json", b'{"a": NaN}'), "Download"),
    "config.json with 1e999": (write("config.json", b'{"a": 1e999}'), "Download"),
    "config.json with a key twice": (write("config.json", b'{"a": 1, "a": 2}'), "Download"),
    "config.json nested 200,000 deep": (write("config.json", b"[" * 200_000), "Download"),
    "config.json of 1 TB": (lambda f: os.truncate(f / "config.json", 1 << 40), "Download"),
    "config.json that is a folder": (directory("config.json"), "rights"),
    "tokenizer_config.json that is no JSON": (write("tokenizer_config.json", b"x"), "Download"),
    "generation_config.json that is a number": (write("generation_config.json", b"1"), "Download"),
    "modules.json that is an object": (write("modules.json", b"{}"), "Download"),
    "modules.json of numbers": (write("modules.json", b"[1]"), "Download"),
    "modules.json that leads out": (
        write("modules.json", b'[{"type": "a.Pooling", "path": "../x"}]'),
        "Download",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folder(case, folder, refused):
    damage, fix = BROKEN[case]
    damage(folder)
    with refused() as failure:
        open_source(folder)
    assert fix in failure.value.fix


@pytest.mark.parametrize(
    "content", [b"", b"x", b"{}", b"[]", b'{"model": {}}', b'{"version": "1.0", "model": {"type": "BPE"}}', b"\xff" * 9]
)
def test_a_tokenizer_that_is_none(content, folder, refused):
    (folder / "tokenizer.json").write_bytes(content)
    with open_source(folder) as source, refused():
        source.tokenizer()


def test_an_empty_folder(tmp_path, refused):
    with refused():
        open_source(tmp_path)
