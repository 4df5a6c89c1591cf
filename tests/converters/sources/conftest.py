"""Small GGUF files: as bytes, with any field wrong, and written by the gguf package."""

import struct
import tracemalloc
from contextlib import contextmanager

import gguf
import numpy as np
import pytest

from shoal.runtime.errors import SourceError

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
_CODES = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d"}


def _string(text) -> bytes:
    data = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(kind: int, value) -> bytes:
    if kind == STRING:
        return _string(value)
    if kind == ARRAY:
        element, items = value
        return struct.pack("<IQ", element, len(items)) + b"".join(_value(element, item) for item in items)
    return struct.pack("<" + _CODES[kind], value)


@pytest.fixture(scope="session")
def gguf_bytes():
    """gguf_bytes(keys, tensors, …): a GGUF file. keys: (name, type, value) or raw bytes; tensors: (name, dimensions in
    GGUF's order, type, offset); data follows the header at the alignment."""

    def build(keys=(), tensors=(), data=b"", alignment=32, version=3, counts=None) -> bytes:
        head = struct.pack("<4sIQQ", b"GGUF", version, *(counts or (len(tensors), len(keys))))
        for key in keys:
            head += key if isinstance(key, bytes) else _string(key[0]) + struct.pack("<I", key[1]) + _value(*key[1:])
        for name, dimensions, kind, offset in tensors:
            head += _string(name) + struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, kind, offset)
        return head + bytes(-len(head) % alignment) + data

    return build


@pytest.fixture(scope="session")
def llama_keys():
    """The metadata of a complete llama of one block; a value of None takes its key away."""

    def make(**changes) -> list:
        keys = {
            "general.architecture": (STRING, "llama"),
            "general.name": (STRING, "small"),
            "llama.block_count": (U32, 1),
            "llama.context_length": (U32, 64),
            "llama.embedding_length": (U32, 8),
            "llama.feed_forward_length": (U32, 4),
            "llama.attention.head_count": (U32, 2),
            "llama.attention.head_count_kv": (U32, 1),
            "llama.attention.layer_norm_rms_epsilon": (F32, 1e-5),
            "llama.rope.freq_base": (F32, 10000.0),
            "tokenizer.ggml.model": (STRING, "gpt2"),
            "tokenizer.ggml.pre": (STRING, "smollm"),
            "tokenizer.ggml.tokens": (ARRAY, (STRING, ["<|end|>", "a", "b", "ab"])),
            "tokenizer.ggml.token_type": (ARRAY, (I32, [3, 1, 1, 1])),
            "tokenizer.ggml.merges": (ARRAY, (STRING, ["a b"])),
            "tokenizer.ggml.eos_token_id": (U32, 0),
            "tokenizer.chat_template": (STRING, "{{ messages }}"),
        } | changes
        return [(name, *value) for name, value in keys.items() if value is not None]

    return make


@pytest.fixture(scope="session")
def write_gguf():
    """write_gguf(path, architecture, keys, tensors): a file by the gguf package. tensors: name to float32 array, or to
    (array, quantisation type)."""

    def write(path, architecture, keys, tensors):
        writer = gguf.GGUFWriter(path, architecture)
        for name, value in keys.items():
            if isinstance(value, bool):
                writer.add_bool(name, value)
            elif isinstance(value, int):
                writer.add_uint32(name, value)
            elif isinstance(value, float):
                writer.add_float32(name, value)
            elif isinstance(value, str):
                writer.add_string(name, value)
            else:
                writer.add_array(name, value)
        for name, value in tensors.items():
            if isinstance(value, tuple):
                stored = gguf.quants.quantize(*value)
                writer.add_tensor(name, stored, raw_shape=stored.shape, raw_dtype=value[1])
            else:
                writer.add_tensor(name, np.ascontiguousarray(value, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


@pytest.fixture(scope="session")
def refused():
    """`with refused() as failure:` the block fails with a SourceError that says what, why and how to go on, and holds
    no more than `most` bytes on the way; `failure.value` is the error."""

    @contextmanager
    def expect(most=16 << 20):
        tracemalloc.start()
        try:
            with pytest.raises(SourceError) as caught:
                yield caught
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert caught.value.what and caught.value.why and caught.value.fix
        assert peak < most

    return expect
