"""Checkpoints as they come: one `Source` for a GGUF file, one for a Hugging Face folder.

A source speaks Hugging Face: names of config keys and tensors, layout of every weight. It reads rows, not models: the
weights stay in the mapped file until somebody asks for some. It knows nothing about architectures, recipes or bundles,
and nothing that a file says is believed before it was checked: every failure is a `SourceError`.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

import numpy as np

from shoal.runtime.errors import MissingPackageError, SourceError


@dataclass(frozen=True)
class TensorInfo:
    """A stored tensor: `shape` in Hugging Face order (rows first), `dtype` as the file names it (F32, BF16, Q4_1, …)
    and the `bytes` that it takes there."""

    shape: tuple[int, ...]
    dtype: str
    bytes: int


class Source(Protocol):
    """A checkpoint, opened. A context manager; reading after `close` is an error."""

    def config(self) -> dict:
        """The model's shape in the names of a Hugging Face config.json; no value is None. Beyond those names:

        - `eos_token_id` is an int or a list; `add_bos_token` and `add_eos_token` say what `tokenizer()` adds;
        - `rope_scaling` has `rope_type`; its type `factors` (llama.cpp's tables) means that inverse frequency i is
          divided by `factors[i]`;
        - `pooling`, `normalize` and `max_seq_length`, where a sentence-transformers folder states them.
        """

    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor by its Hugging Face name, in the file's order. Reads no weight."""

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows [start:stop] of the first axis, float32, in Hugging Face layout: a fresh array, and only those rows
        are touched. Raises SourceError for a name that is not there or a format that is not a weight's."""

    def tokenizer(self) -> bytes:
        """tokenizer.json, accepted by the tokenizers package."""

    def chat_template(self) -> str:
        """The Jinja template of a chat, or the empty string."""

    def describe(self) -> str:
        """One line for a person."""

    def close(self) -> None:
        """Lets the files go."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception) -> None: ...


def open_source(path: str | os.PathLike) -> Source:
    """The checkpoint at `path`: a .gguf file (of a split one, any part) or a Hugging Face folder.

    Raises SourceError if it is missing, damaged, incomplete or of another kind, saying what to do instead.
    """
    path = Path(path)
    try:
        if path.is_dir():
            from .huggingface import HuggingFaceFolder

            return HuggingFaceFolder(path)
        if not path.is_file():
            raise SourceError(
                f"There is no checkpoint at {path}.",
                "It is neither a file nor a folder.",
                "Check the path: it must name a .gguf file or a Hugging Face folder.",
            )
        with open(path, "rb") as file:
            magic = file.read(4)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise SourceError(
            f"The checkpoint {path} cannot be opened.", str(error), "Check the path and its rights."
        ) from None
    if magic != b"GGUF":
        raise SourceError(f"{path} is not a checkpoint that shoal reads.", *_another_kind(path, magic))
    try:
        from .gguf import GGUFFile
    except ImportError as error:
        raise MissingPackageError(
            "Reading a GGUF file needs a package that is not here.", str(error), "Run: pip install 'shoal[convert]'"
        ) from None
    return GGUFFile(path)


def _another_kind(path: Path, magic: bytes) -> tuple[str, str]:
    if path.suffix == ".safetensors" or path.name.endswith(".safetensors.index.json") or path.name == "config.json":
        return "It is one file of a Hugging Face folder.", f"Name the folder: {path.parent}"
    if magic[:2] == b"PK" or magic[:1] == b"\x80" or path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        return (
            "It looks like a pickle, and unpickling runs whatever code a file holds.",
            "Save the model as safetensors: model.save_pretrained(folder, safe_serialization=True).",
        )
    return f"It begins with {magic!r} instead of b'GGUF'.", "Name a .gguf file or a Hugging Face folder."
