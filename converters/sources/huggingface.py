"""A Hugging Face folder as a source: config.json, tokenizer.json, safetensors, and what lies beside them.

Promises Hugging Face's own reading of the folder, checked: of a multimodal checkpoint the text model alone, of a
sentence-transformers folder its pooling as well. Nothing is unpickled, no code of the folder runs, and no name in a
file leads out of the folder (a symbolic link that its owner put there does: caches of downloads are made of them).
Knows nothing about architectures.
"""

import re
from collections import Counter
from pathlib import Path
from typing import Self

import numpy as np

from shoal.runtime.errors import SourceError

from . import TensorInfo
from .files import parse_json, read_file
from .gguf_tokenizer import check
from .safetensors import SafetensorsFile

_SMALL, _LARGE = 1 << 24, 1 << 28  # bytes: of a configuration, of a tokenizer or an index
_MAX_SHARDS = 1 << 12
_SHARD = re.compile(r"[^/\\\0]{1,200}\.safetensors")
_SAFE = "Save the model anew with transformers: model.save_pretrained(folder), tokenizer.save_pretrained(folder)."


class HuggingFaceFolder:
    """The `Source` of the folder at `path`. Raises SourceError, with a fix, for one that is damaged or incomplete."""

    def __init__(self, path: Path):
        self._path = path
        self._files: dict[str, SafetensorsFile] = {}
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def config(self) -> dict:
        return dict(self._config)

    def tensors(self) -> dict[str, TensorInfo]:
        return {name: file.tensors[stored] for name, (file, stored) in self._tensors.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        if name not in self._tensors:
            raise self._refuse(f"It has no tensor {name!r:.80}.", "Download the folder again.")
        file, stored = self._tensors[name]
        return file.read(stored, start, stop)

    def tokenizer(self) -> bytes:
        data = read_file(self._path / "tokenizer.json", _LARGE)
        check(data, lambda why: self._refuse(why, _SAFE))
        return data

    def chat_template(self) -> str:
        template = self._settings.get("chat_template")
        if (self._path / "chat_template.jinja").exists():  # the newer place, which wins in transformers too
            try:
                return read_file(self._path / "chat_template.jinja", _SMALL).decode()
            except UnicodeDecodeError:
                raise self._refuse("chat_template.jinja is not UTF-8.", "Download it again.") from None
        if isinstance(template, list):  # several, by name
            named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
            template = named[0].get("template") if named else None
        if template is None:
            return ""
        if not isinstance(template, str) or not _is_unicode(template):
            raise self._refuse("chat_template in tokenizer_config.json is not text.", "Mend or remove it.")
        return template

    def describe(self) -> str:
        infos = [file.tensors[stored] for file, stored in self._tensors.values()]
        formats = ", ".join(kind for kind, _ in Counter(info.dtype for info in infos).most_common())
        size = sum(info.bytes for info in infos) / 1e6
        name, kind = self._path.absolute().name, self._config.get("model_type")
        return f"{name}: Hugging Face folder, {kind}, {len(infos)} tensors ({formats}), {size:.1f} MB"

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _open(self) -> None:
        config = self._json("config.json", required="It is not a folder of a Hugging Face model.")
        if not (self._path / "tokenizer.json").exists():
            raise self._refuse("It has no tokenizer.json.", _SAFE)
        for key in ("quantization_config", "quantization", "compression_config"):
            if config.get(key):
                raise self._refuse(
                    f"Its weights are quantised already ({key} in config.json).",
                    "Convert the checkpoint in full precision that it was made from.",
                )
        self._settings = self._json("tokenizer_config.json")
        stored = self._open_weights()
        text = config.get("text_config")
        if isinstance(text, dict):
            if text.get("quantization_config"):
                raise self._refuse("Its weights are quantised already.", "Convert the one in full precision.")
            stored = self._text_model(stored)
        self._tensors = stored
        self._config = self._complete(config)

    def _open_weights(self) -> dict[str, tuple[SafetensorsFile, str]]:
        """Every tensor, with the file that holds it and its name there."""
        index = "model.safetensors.index.json"
        if (self._path / "model.safetensors").exists():
            file = self._shard("model.safetensors")
            return {name: (file, name) for name in file.tensors}
        if not (self._path / index).exists():
            if any(self._path.glob("*.bin")) or any(self._path.glob("*.pt")) or any(self._path.glob("*.pth")):
                raise self._refuse("Its weights are pickled, and unpickling runs whatever code a file holds.", _SAFE)
            raise self._refuse("It has neither model.safetensors nor an index of several.", _SAFE)
        mapping = self._json(index, limit=_LARGE).get("weight_map")
        if not isinstance(mapping, dict) or not mapping:
            raise self._refuse(f"{index} has no weight_map.", "Download it again.")
        names = set()
        for shard in mapping.values():
            if not isinstance(shard, str) or not _SHARD.fullmatch(shard):
                raise self._refuse(
                    f"{index} names {shard!r:.80}, which is no file of this folder.", "Download it again."
                )
            names.add(shard)
        if len(names) > _MAX_SHARDS:
            raise self._refuse(f"{index} names {len(names)} files.", "Download it again.")
        for shard in sorted(names):
            self._shard(shard)
        stored = {}
        for name, shard in mapping.items():
            if name not in self._files[shard].tensors:
                raise self._refuse(f"{shard} does not hold {name!r:.80}, as {index} says.", "Download both again.")
            stored[name] = (self._files[shard], name)
        return stored

    def _shard(self, name: str) -> SafetensorsFile:
        if not (self._path / name).exists():
            raise self._refuse(f"The file {name} is missing.", "Download the missing file into the folder.")
        self._files[name] = SafetensorsFile(self._path / name)
        return self._files[name]

    def _text_model(self, stored: dict) -> dict:
        """The names that the text model has when it is alone; those of the other models stay as they are."""
        renamed = {}
        for name, place in stored.items():
            target = re.sub(r"^(model\.)?language_model\.(model\.)?", "model.", name)
            if target.startswith("model.lm_head."):
                target = target.removeprefix("model.")
            if target in renamed:
                raise self._refuse(f"Two of its tensors are {target!r:.80}.", "Download it again.")
            renamed[target] = place
        return renamed

    def _complete(self, config: dict) -> dict:
        """One flat config: the text model's keys over the outer ones, and what generation_config.json,
        tokenizer_config.json and sentence-transformers say."""
        text = config.pop("text_config", None)
        if isinstance(text, dict):
            config |= {key: value for key, value in text.items() if value is not None}
        generation = self._json("generation_config.json")
        for key in ("bos_token_id", "pad_token_id"):
            if config.get(key) is None:
                config[key] = generation.get(key)
        ends: list = []
        for value in (generation.get("eos_token_id"), config.get("eos_token_id")):
            ends += value if isinstance(value, list) else [value]
        eos = list(dict.fromkeys(end for end in ends if type(end) is int and end >= 0))
        config["eos_token_id"] = eos[0] if len(eos) == 1 else eos or None
        for key in ("add_bos_token", "add_eos_token"):
            if isinstance(self._settings.get(key), bool):
                config[key] = self._settings[key]
        if not isinstance(config.get("tie_word_embeddings"), bool):  # the default differs from model to model
            config["tie_word_embeddings"] = "lm_head.weight" not in self._tensors
        config.setdefault("name", self._path.absolute().name)
        config |= self._sentence_embedding()
        return {key: value for key, value in config.items() if value is not None}

    def _sentence_embedding(self) -> dict:
        """`pooling` (mean, cls or another that the folder names), `normalize` and `max_seq_length` of a
        sentence-transformers folder (Reimers and Gurevych 2019)."""
        if not (self._path / "modules.json").exists():
            return {}
        path = self._path / "modules.json"
        found: dict = {"normalize": False}
        for module in parse_json(read_file(path, _SMALL), path, list):
            kind, folder = (module.get("type"), module.get("path")) if isinstance(module, dict) else (None, None)
            if not isinstance(kind, str):
                raise self._refuse("modules.json has a module without a type.", "Download it again.")
            if kind.endswith(".Normalize"):
                found["normalize"] = True
            elif kind.endswith(".Pooling"):
                if not isinstance(folder, str) or not re.fullmatch(r"\w{1,64}", folder):
                    raise self._refuse(f"modules.json names the folder {folder!r:.80}.", "Download it again.")
                found["pooling"] = _pooling(self._json(f"{folder}/config.json"))
        found["max_seq_length"] = self._json("sentence_bert_config.json").get("max_seq_length")
        return found

    def _json(self, name: str, *, limit: int = _SMALL, required: str = "") -> dict:
        """The object in a file of the folder; an empty one where there is no such file."""
        path = self._path / name
        if not path.exists():
            if required:
                raise self._refuse(f"It has no {name}.", f"{required} Name a folder that save_pretrained wrote.")
            return {}
        return parse_json(read_file(path, limit), path)

    def _refuse(self, why: str, fix: str) -> SourceError:
        return SourceError(f"The folder {self._path} cannot be used.", why, fix)


def _pooling(config: dict) -> str:
    """mean, cls, … or several joined by +, of both spellings that sentence-transformers has had."""
    if isinstance(config.get("pooling_mode"), str):
        return config["pooling_mode"]
    modes = [key[13:] for key, value in config.items() if key.startswith("pooling_mode_") and value is True]
    return "+".join(mode.removesuffix("_token").removesuffix("_tokens") for mode in modes)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
        return False
    return True
