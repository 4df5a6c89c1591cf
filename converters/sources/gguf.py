"""A GGUF file as a source: mapped, and dequantised a few rows at a time.

Promises the values that llama.cpp would compute with, as float32, under Hugging Face names and in Hugging Face layout.
Of a file that was split into parts, naming any part opens them all. Header, names and tokenizer have modules of their
own; this one knows how they meet.
"""

import math
import re
from collections import Counter
from pathlib import Path
from typing import Self

import numpy as np
from gguf.quants import dequantize

from shoal.runtime.errors import SourceError, UsageError

from . import TensorInfo, gguf_config, gguf_tokenizer
from .gguf_config import Weight
from .gguf_header import Header, Tensor

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_MAX_PARTS = 1000
_SLAB = 1 << 20  # values dequantised at once: enough to be fast, little to hold


class GGUFFile:
    """The `Source` of the GGUF file at `path`. Raises SourceError where the file cannot be what it says."""

    def __init__(self, path: Path):
        self._headers = [Header(path)]
        try:
            self._open(path)
        except BaseException:
            self.close()
            raise

    def config(self) -> dict:
        return dict(self._config)

    def tensors(self) -> dict[str, TensorInfo]:
        return {name: self._info(weight) for name, weight in self._weights.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        weight = self._weights.get(name)
        if weight is None:
            raise self._refuse(f"It has no tensor {name!r:.80}.")
        info = self._info(weight)
        stop = info.shape[0] if stop is None else stop
        if not 0 <= start <= stop <= info.shape[0]:
            raise UsageError(
                f"Rows {start} to {stop} of {name} cannot be read.",
                f"Its shape is {info.shape}.",
                "Ask for rows within it.",
            )
        if weight.heads and info.shape[0] % (2 * weight.heads):
            raise self._refuse(f"{name} has {info.shape[0]} rows, which {weight.heads} heads cannot share.")
        if weight.row:
            return self._dequantize(
                np.frombuffer(weight.tensor.data, np.uint8, info.bytes, weight.tensor.offset).reshape(1, -1),
                weight.tensor, info.shape[1],
            )[start:stop]  # fmt: skip
        chosen = (
            gguf_config.interleaved(start, stop, info.shape[0], weight.heads) if weight.heads else slice(start, stop)
        )
        begin = weight.tensor.offset + (weight.expert or 0) * info.bytes
        raw = np.frombuffer(weight.tensor.data, np.uint8, info.bytes, begin)
        if len(info.shape) == 1:  # blocks run along the one axis there is
            values = self._dequantize(raw.reshape(1, -1), weight.tensor, info.shape[0])[0][chosen]
        else:
            rows = raw.reshape(info.shape[0], -1)[chosen]
            values = self._dequantize(rows, weight.tensor, math.prod(info.shape[1:]))
        if weight.offset:
            values -= np.float32(weight.offset)
        return values.reshape(stop - start, *info.shape[1:])

    def tokenizer(self) -> bytes:
        return gguf_tokenizer.build(self._metadata, self._refuse)

    def chat_template(self) -> str:
        return self._metadata.text("tokenizer.chat_template", "")

    def describe(self) -> str:
        kinds = Counter(tensor.type.name for tensor in self._tensors.values())
        formats = ", ".join(kind for kind, _ in kinds.most_common())
        size = sum(tensor.bytes for tensor in self._tensors.values()) / 1e6
        name = "".join(filter(str.isprintable, self._metadata.text("general.name", self._path.stem)))[:80]
        return f"{name}: GGUF, {self._architecture}, {len(self._tensors)} tensors ({formats}), {size:.1f} MB"

    def close(self) -> None:
        for header in self._headers:
            header.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _open(self, path: Path) -> None:
        self._path, self._metadata = path, self._headers[0].metadata
        self._tensors = self._headers[0].tensors
        if self._metadata.integer("split.count", 1, high=_MAX_PARTS) > 1:
            self._open_parts(path)
        self._architecture = self._metadata.text("general.architecture")
        if not re.fullmatch(r"[a-zA-Z0-9_.-]{1,64}", self._architecture):
            raise self._refuse(f"general.architecture is {self._architecture!r:.80}.")
        self._config = gguf_config.config(self._architecture, self._metadata, self._tensors, self._refuse)
        heads, kv_heads = self._config.get("num_attention_heads", 0), self._config.get("num_key_value_heads", 0)
        self._weights = gguf_config.weights(self._architecture, self._tensors, heads, kv_heads, self._refuse)

    def _open_parts(self, path: Path) -> None:
        """All parts of a split file, in order; the first one holds the metadata."""
        count = self._metadata.integer("split.count")
        match = _PART.fullmatch(path.name)
        if not match or int(match[3]) != count:
            raise self._refuse(
                f"It is one of {count} parts, but its name does not end in -00001-of-{count:05}.gguf.",
                "Give the parts their original names.",
            )
        given = int(match[2])
        self._headers = [
            self._headers[0]
            if number == given
            else Header(path.with_name(f"{match[1]}-{number:05}-of-{count:05}.gguf"))
            for number in range(1, count + 1)
        ]
        self._tensors = {}
        for number, header in enumerate(self._headers):
            if header.metadata.integer("split.no", -1) != number or header.metadata.integer("split.count", 1) != count:
                raise self._refuse(f"{header.path.name} is not part {number + 1} of {count}.")
            if self._tensors.keys() & header.tensors.keys():
                raise self._refuse(f"{header.path.name} holds a tensor that an earlier part holds too.")
            self._tensors |= header.tensors
        self._path, self._metadata = self._headers[0].path, self._headers[0].metadata
        if self._metadata.integer("split.tensors.count", len(self._tensors)) != len(self._tensors):
            raise self._refuse(f"Its parts hold {len(self._tensors)} tensors, not as many as it says.")

    def _info(self, weight: Weight) -> TensorInfo:
        tensor = weight.tensor
        if weight.expert is None:
            shape = (1, *tensor.shape) if weight.row else tensor.shape
            return TensorInfo(shape, tensor.type.name, tensor.bytes)
        return TensorInfo(tensor.shape[1:], tensor.type.name, tensor.bytes // tensor.shape[0])

    def _dequantize(self, raw: np.ndarray, tensor: Tensor, width: int) -> np.ndarray:
        """float32 [rows, width] of `raw`, uint8 [rows, bytes of a row]."""
        out = np.empty((len(raw), width), np.float32)
        step = max(1, _SLAB // width)
        try:
            with np.errstate(all="ignore"):  # a damaged scale is an infinity, not a message
                for row in range(0, len(raw), step):
                    out[row : row + step] = dequantize(raw[row : row + step], tensor.type).reshape(-1, width)
        except NotImplementedError:
            raise self._refuse(
                f"{tensor.name} is stored as {tensor.type.name}, which is no format of weights here.",
                "Use a file with common formats, such as Q4_K_M, Q8_0 or F16.",
            ) from None
        return out

    def _refuse(self, why: str, fix: str = "Download it again, or convert the model to GGUF again.") -> SourceError:
        return SourceError(f"The GGUF file {self._path} cannot be used.", why, fix)
