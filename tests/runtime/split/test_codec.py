"""Messages: there and back, by any process and either coder, and refused by who has other tables."""

import hashlib
import os
import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from shoal.runtime.errors import LinkError, UsageError
from shoal.runtime.split.codec import Codec
from shoal.runtime.split.quantise import Quantiser
from shoal.runtime.split.tables import Tables


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", [(1,), (12,), (6, 4, 4), (9, 70, 70)])
@pytest.mark.parametrize("count", [1, 3, 200])
def test_a_message_has_the_nearest_levels(made, bits, shape, count):
    if np.prod(shape) * count > 300_000:
        count = 5
    tables, latents = made(shape, bits, count=count)
    latents[0, 0] = 3e38
    codec = Codec(tables, shape)
    message = codec.encode(latents)
    assert message[:4] == codec.tag
    other_side = Codec(Tables.from_bytes(tables.to_bytes()), shape)
    back = other_side.decode(message, most=count)
    assert back.dtype == np.float32
    assert back.tobytes() == tables.quantiser.dequantise(tables.quantiser.quantise(latents)).tobytes()
    assert other_side.encode(back) == message  # levels are the nearest to themselves


def test_a_message_byte_by_byte():
    """As docs/split.md has it."""
    tables = Tables(Quantiser(1, [0.5], [-1]), [0], [[12288, 4096]])
    codec = Codec(tables, (1, 2))
    assert tables.digest.hex() == hashlib.sha256(tables.to_bytes()).hexdigest()
    tag = hashlib.sha256(tables.digest + bytes([1, 0, 0, 0, 2, 0, 0, 0])).digest()[:4]
    latents = np.array([[[-0.5, -1]], [[-0.5, -0.5]]], np.float32)  # 1 0, 1 1
    assert codec.encode(latents) == tag + b"\x02" + b"\xfd\x33\x05"
    assert codec.encode(np.full((300, 1, 2), -9, np.float32)) == tag + b"\xac\x02" + b"\xfd\x03"


@pytest.mark.parametrize("shape", [(12,), (9, 70, 70)])
def test_without_kernels_it_is_the_same(made, request, shape):
    tables, latents = made(shape, 4)
    codec = Codec(tables, shape)
    message = codec.encode(latents)
    back = codec.decode(message, 4)
    request.getfixturevalue("without_kernels")
    assert codec.encode(latents) == message and (codec.decode(message, 4) == back).all()


PROCESS = """
import hashlib, sys
import numpy as np
from shoal.runtime import kernels
from shoal.runtime.split.codec import Codec
from shoal.runtime.split.quantise import Quantiser
from shoal.runtime.split.tables import Tables

if sys.argv[1] == "twin":
    kernels._loaded = lambda: (None, "it was not built")
digest = hashlib.sha256()
for bits, shape in ((1, (5,)), (3, (4, 5, 6)), (5, (10, 60, 60)), (8, (64,))):
    latents = np.random.Generator(np.random.PCG64(bits)).integers(-999, 999, (2, *shape)).astype(np.float32) / 64
    tables = Tables.fit(Quantiser(bits, [32 / 2**bits] * shape[0], [-15.5] * shape[0]), latents)
    codec = Codec(tables, shape)
    message = codec.encode(latents)
    for part in (tables.to_bytes(), message, codec.decode(message, 2).tobytes()):
        digest.update(part)
print(digest.hexdigest())
"""
# What these bytes are on every machine: a change here is a new version of the format
DIGEST = "5479af592d93a75e607b9595009e3dd55b9d2db7766f0b6f6b3a8fa7db087403"


def test_other_processes_make_the_same_bytes():
    for coder, seed, threads in (("kernels", "0", "1"), ("kernels", "7", "2"), ("twin", "12345", "1")):
        environment = {"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
        done = subprocess.run([sys.executable, "-c", PROCESS, coder], env=os.environ | environment, text=True,
                              capture_output=True)  # fmt: skip
        assert done.stdout.strip() == DIGEST, (coder, done.stderr)


def test_threads_may_share_a_codec(made):
    tables, latents = made((8, 40, 40), 6, count=32)
    codec = Codec(tables, (8, 40, 40))
    with ThreadPoolExecutor(4) as pool:
        messages = list(pool.map(lambda one: codec.encode(one[None]), latents))
        back = np.concatenate(list(pool.map(codec.decode, messages)))
    assert (back == codec.decode(codec.encode(latents), 32)).all()


def test_other_tables_another_shape_or_something_else(made):
    tables, latents = made((6, 4, 4), 4)
    codec = Codec(tables, (6, 4, 4))
    message = codec.encode(latents)
    others = [made((6, 4, 4), 4, seed=1)[0], made((6, 4, 4), 3)[0]]
    scaled = Quantiser(4, tables.quantiser.scales * np.float32(1.5), tables.quantiser.offsets)
    others.append(Tables(scaled, tables.of, tables.frequencies))
    for other in [*(Codec(one, (6, 4, 4)) for one in others), Codec(tables, (6, 2, 8)), Codec(tables, (6, 16))]:
        with pytest.raises(LinkError, match="was made with other tables, for another shape"):
            other.decode(message, 4)
    for wrong in (b"", message[:3], bytes(40), b"\xff" + message):
        with pytest.raises(LinkError, match="other tables"):
            codec.decode(wrong, 4)


@pytest.mark.parametrize(
    "number, why",
    [
        (b"", "does not say how many"),
        (b"\x80", "does not say how many"),
        (b"\xff\xff\xff\xff\x0f", "does not say how many"),
        (b"\x00", "impossible way"),
        (b"\x81\x00", "impossible way"),
        (b"\x05", "5 latents, and 4 were expected at most"),
        (b"\xff\xff\xff\x7f", "268435455 latents, and 4 were"),
        (b"\x03", r"does not decode to 3 latents of shape \[6, 4, 4\]"),
    ],
)
def test_numbers_of_latents(made, number, why):
    tables, latents = made((6, 4, 4), 4)
    codec = Codec(tables, (6, 4, 4))
    message = codec.encode(latents)
    assert message[4] == 4
    tracemalloc.start()
    try:
        with pytest.raises(LinkError, match=why):
            codec.decode(message[:4] + number + message[5:] if number and number[-1] < 128 else message[:4] + number, 4)
        assert tracemalloc.get_traced_memory()[1] < 1 << 16
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "latents", [np.zeros((2, 6, 4), np.float32), np.zeros((6, 4, 4), np.float32), np.zeros((1, 6, 4, 4)),
                np.zeros((0, 6, 4, 4), np.float32), np.full((1, 6, 4, 4), np.nan, np.float32)]
)  # fmt: skip
def test_other_latents(made, latents):
    with pytest.raises(UsageError):
        Codec(made((6, 4, 4), 4)[0], (6, 4, 4)).encode(latents)


@pytest.mark.parametrize("shape", [(), (5,), (6, 0), (6, 1 << 30), (6, *(1,) * 8)])
def test_other_shapes(made, shape):
    with pytest.raises(UsageError):
        Codec(made((6,), 4)[0], shape)
