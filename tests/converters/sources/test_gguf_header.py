"""The GGUF reader against files that lie: only SourceError, little memory, whatever the bytes."""

import os
import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.converters.sources import open_source
from shoal.converters.sources.gguf_header import Header
from shoal.runtime.errors import SourceError

U32, F32, BOOL, STRING, ARRAY, U64 = 4, 6, 7, 8, 9, 10
TENSOR = [("token_embd.weight", (8, 4), 0, 0)]


@pytest.fixture
def opened(tmp_path):
    def read(data: bytes) -> Header:
        path = tmp_path / "x.gguf"
        path.write_bytes(data)
        return Header(path)

    return read


def use(path) -> None:
    """Everything that a conversion asks of a source."""
    with open_source(path) as source:
        source.config()
        source.describe()
        source.chat_template()
        source.tokenizer()
        for name in source.tensors():
            source.read(name, 0, 1)


def test_values_and_tensors(gguf_bytes, opened):
    keys = [
        ("u", U32, 7), ("f", F32, 0.5), ("b", BOOL, True), ("s", STRING, "grün"), ("big", U64, 1 << 60),
        ("strings", ARRAY, (STRING, ["", "a", "ü"])), ("numbers", ARRAY, (F32, [1.0, 2.0])),
        ("same", ARRAY, (U32, [3, 3])), ("flags", ARRAY, (BOOL, [True, False])),
    ]  # fmt: skip
    header = opened(gguf_bytes(keys, [("a", (4, 2), 0, 0), ("b", (3,), 0, 32)], bytes(44)))
    metadata = header.metadata
    assert metadata.integer("u") == 7 and metadata.number("f") == 0.5 and metadata.flag("b") is True
    assert metadata.text("s") == "grün" and metadata.strings("strings") == ["", "a", "ü"]
    assert metadata.numbers("numbers").tolist() == [1.0, 2.0] and metadata.numbers("flags").tolist() == [True, False]
    assert metadata.integer("same") == 3 and metadata.integer("absent", 5) == 5
    assert header.tensors["a"].shape == (2, 4) and header.tensors["b"].offset % 32 == 0
    for wrong in (
        lambda: metadata.integer("s"), lambda: metadata.integer("big"), lambda: metadata.integer("b"),
        lambda: metadata.integer("numbers"), lambda: metadata.number("b"), lambda: metadata.text("u"),
        lambda: metadata.flag("u"), lambda: metadata.strings("numbers"), lambda: metadata.numbers("strings"),
        lambda: metadata.integer("absent"), lambda: metadata.strings("u"), lambda: metadata.numbers("f"),
    ):  # fmt: skip
        with pytest.raises(SourceError):
            wrong()


def array(kind: int, count: int, rest: bytes = b"") -> bytes:
    return struct.pack("<Q1sIIQ", 1, b"k", ARRAY, kind, count) + rest


def nested(depth: int) -> bytes:
    return struct.pack("<Q1sI", 1, b"k", ARRAY) + struct.pack("<IQ", ARRAY, 1) * depth + struct.pack("<IQB", 0, 1, 0)


HOSTILE = {
    "array of 2^63 numbers, 49 bytes": dict(keys=[array(U32, 1 << 63)]),
    "array of 2^63 strings": dict(keys=[array(STRING, 1 << 63)]),
    "array of 2^40 strings": dict(keys=[array(STRING, 1 << 40, bytes(800))]),
    "string beyond the end in an array": dict(keys=[array(STRING, 2, struct.pack("<QQ", 0, 1 << 62))]),
    "string that wraps around": dict(keys=[array(STRING, 2, struct.pack("<QQ", (1 << 64) - 8, 0))]),
    "nested arrays": dict(keys=[nested(2)]),
    "arrays nested 1000 deep": dict(keys=[nested(1000)]),
    "array of an unknown type": dict(keys=[array(99, 1, bytes(8))]),
    "value of an unknown type": dict(keys=[struct.pack("<Q1sI", 1, b"k", 13)]),
    "string of 2^62 bytes": dict(keys=[struct.pack("<Q1sIQ", 1, b"k", STRING, 1 << 62)]),
    "key of 2^64-1 bytes": dict(keys=[struct.pack("<Q", (1 << 64) - 1)]),
    "key that is not UTF-8": dict(keys=[(b"\xff", U32, 1)]),
    "key twice": dict(keys=[("k", U32, 1), ("k", U32, 1)]),
    "2^62 tensors": dict(counts=(1 << 62, 0)),
    "2^62 keys": dict(counts=(0, 1 << 62)),
    "alignment 2^30": dict(keys=[("general.alignment", U32, 1 << 30)]),
    "alignment 0": dict(keys=[("general.alignment", U32, 0)]),
    "alignment 24": dict(keys=[("general.alignment", U32, 24)]),
    "alignment as a string": dict(keys=[("general.alignment", STRING, "32")]),
    "dimension 2^42+1": dict(tensors=[("t", ((1 << 42) + 1,), 0, 0)]),
    "dimensions whose product wraps": dict(tensors=[("t", (1 << 32, 1 << 32), 0, 0)]),
    "dimensions whose product is 2^64+8": dict(tensors=[("t", (8, (1 << 61) + 1), 0, 0)]),
    "dimension 0": dict(tensors=[("t", (0, 8), 0, 0)]),
    "no dimensions": dict(tensors=[("t", (), 0, 0)]),
    "2^31 dimensions": dict(keys=[b""], counts=(1, 0), data=struct.pack("<Q1sI", 1, b"t", 1 << 31) + bytes(99)),
    "unknown tensor type": dict(tensors=[("t", (8,), 77, 0)]),
    "removed tensor type": dict(tensors=[("t", (8,), 4, 0)]),
    "row that is no whole number of blocks": dict(tensors=[("t", (8, 4), 2, 0)]),
    "offset that is not aligned": dict(tensors=[("t", (8,), 0, 8)]),
    "offset 2^64-32": dict(tensors=[("t", (8,), 0, (1 << 64) - 32)]),
    "tensor beyond the end": dict(tensors=[("t", (32,), 0, 0)]),
    "tensors that overlap": dict(tensors=[("t", (16,), 0, 0), ("u", (8,), 0, 32)]),
    "tensor twice": dict(tensors=[("t", (8,), 0, 0), ("t", (8,), 0, 32)]),
    "version 1": dict(version=1),
    "version 4": dict(version=4),
    "big endian": dict(version=3 << 24),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_file(case, gguf_bytes, opened, refused):
    with refused():
        opened(gguf_bytes(**{"data": bytes(64)} | HOSTILE[case]))


def test_many_small_strings_cost_little(gguf_bytes, opened, refused):
    """A length that fits, but beyond any vocabulary: refused before the strings are walked."""
    data = gguf_bytes([array(STRING, 5_000_000, bytes(40_000_000))])
    with refused():
        opened(data)


def test_every_prefix_is_refused(gguf_bytes, llama_keys, tmp_path):
    data = gguf_bytes(llama_keys(), TENSOR, bytes(128))
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    use(path)
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(SourceError):
            use(path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_changed_bits(gguf_bytes, llama_keys, tmp_path, data):
    content = bytearray(gguf_bytes(llama_keys(), TENSOR, bytes(128)))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    try:
        use(path)
    except SourceError as error:
        assert error.what and error.why and error.fix


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=400))
def test_any_bytes_after_the_magic(tmp_path, tail):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF\x03\0\0\0" + tail)
    with pytest.raises(SourceError):
        use(path)


WRONG = [
    ("general.architecture", (U32, 1)), ("general.architecture", (STRING, "\x1b[2J")), ("general.architecture", None),
    ("llama.block_count", (STRING, "1")), ("llama.block_count", (F32, 1.0)), ("llama.block_count", (U32, 0)),
    ("llama.block_count", (ARRAY, (U32, [1, 2]))), ("llama.block_count", (ARRAY, (STRING, ["1"]))),
    ("llama.block_count", None), ("llama.embedding_length", (U32, 7)), ("llama.attention.head_count", (U32, 0)),
    ("llama.attention.head_count", (U64, 1 << 63)), ("llama.attention.layer_norm_rms_epsilon", (F32, float("nan"))),
    ("llama.rope.freq_base", (STRING, "x")), ("llama.rope.freq_base", (F32, float("inf"))),
    ("llama.rope.scaling.factor", (F32, -1.0)), ("llama.rope.dimension_count", (U32, 1000)),
    ("tokenizer.ggml.model", (U32, 1)), ("tokenizer.ggml.model", (STRING, "t5")), ("tokenizer.ggml.model", None),
    ("tokenizer.ggml.pre", (STRING, "nobody-knows")), ("tokenizer.ggml.pre", (U32, 1)),
    ("tokenizer.ggml.tokens", (ARRAY, (U32, [1, 2, 3, 4]))), ("tokenizer.ggml.tokens", (STRING, "a")),
    ("tokenizer.ggml.tokens", (ARRAY, (STRING, ["a", "a", "b", "ab"]))), ("tokenizer.ggml.tokens", None),
    ("tokenizer.ggml.tokens", (ARRAY, (STRING, [b"\xff", "a", "b", "ab"]))),
    ("tokenizer.ggml.tokens", (ARRAY, (STRING, ["a", "b", "c", "d", "e"]))),  # one more than rows of embeddings
    ("tokenizer.ggml.token_type", (ARRAY, (STRING, ["1"] * 4))), ("tokenizer.ggml.token_type", (ARRAY, (U32, [1]))),
    ("tokenizer.ggml.merges", (ARRAY, (STRING, ["ab"]))), ("tokenizer.ggml.merges", (ARRAY, (STRING, ["x y"]))),
    ("tokenizer.ggml.merges", (ARRAY, (STRING, [""]))), ("tokenizer.ggml.merges", None),
    ("tokenizer.ggml.eos_token_id", (STRING, "0")), ("tokenizer.ggml.add_bos_token", (U32, 1)),
    ("tokenizer.ggml.add_bos_token", (BOOL, True)),  # and no bos token
    ("tokenizer.chat_template", (U32, 1)), ("split.count", (U32, 3)), ("split.count", (STRING, "3")),
]  # fmt: skip


@pytest.mark.parametrize("key, value", WRONG)
def test_wrong_value(key, value, gguf_bytes, llama_keys, tmp_path, refused):
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf_bytes(llama_keys(**{key: value}), TENSOR, bytes(128)))
    with refused():
        use(path)


def test_a_damaged_scale_is_no_warning(gguf_bytes, llama_keys, tmp_path, recwarn):
    path = tmp_path / "x.gguf"
    data = gguf_bytes(
        llama_keys(), [("token_embd.weight", (8, 4), 0, 0), ("x", (32, 1), 8, 128)], bytes(128) + b"\xff\x7f" * 17
    )
    path.write_bytes(data)
    use(path)
    assert not recwarn.list


def test_what_is_no_file(tmp_path, refused):
    (tmp_path / "empty.gguf").write_bytes(b"")
    (tmp_path / "pickle.bin").write_bytes(b"PK\x03\x04" + bytes(50))
    (tmp_path / "model.safetensors").write_bytes(bytes(8))
    os.mkfifo(tmp_path / "pipe.gguf")
    fixes = {
        "absent.gguf": ".gguf file",
        "empty.gguf": ".gguf",
        "pickle.bin": "safe_serialization",
        "pipe.gguf": ".gguf",
    }
    for name, fix in fixes.items():
        with refused() as failure:
            open_source(tmp_path / name)
        assert fix in failure.value.fix
    with refused() as failure:
        open_source(tmp_path / "model.safetensors")
    assert str(tmp_path) in failure.value.fix
    with refused():
        open_source("nul\0byte")
    with refused():
        Header(tmp_path / "pipe.gguf")
