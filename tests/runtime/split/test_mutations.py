"""200,000 damaged messages, through either coder: each raises, or is the message of what it decodes to. Never a crash,
and never more memory than the latents that were expected: in a process of its own, whose address space is limited."""

import random
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from shoal.runtime.errors import LinkError
from shoal.runtime.split.codec import Codec
from shoal.runtime.split.quantise import Quantiser
from shoal.runtime.split.tables import Tables

SHAPES = [((12,), 2), ((16,), 8), ((3, 8, 8), 4), ((2, 40), 1), ((24, 3), 3)]
ROOM = 64 << 20  # bytes beyond what the process has when it begins


def codecs() -> list[tuple[Codec, list[bytes]]]:
    """Each with messages of 1 and of 4 latents."""
    found = []
    for seed, (shape, bits) in enumerate(SHAPES):
        latents = np.random.default_rng(seed).laplace(size=(4, *shape)).astype(np.float32)
        codec = Codec(Tables.fit(Quantiser.fit(latents, bits), latents, np.arange(shape[0]) % 3), shape)
        found.append((codec, [codec.encode(latents), *(codec.encode(one[None]) for one in latents)]))
    return found


def mutate(message: bytes, rng: random.Random) -> bytes:
    """Changed, cut, grown or joined; three of four keep their tag, or nothing behind it would ever be looked at."""
    data = bytearray(message)
    first = 0 if rng.random() < 0.25 else 4
    for _ in range(rng.randint(0, 3)):
        at = rng.randrange(first, len(data))
        data[at] = rng.choice((data[at] ^ 1 << rng.randrange(8), rng.randrange(256), 0, 255))
    match rng.randrange(6):
        case 0:
            del data[rng.randrange(first, len(data)) :]
        case 1:
            data += rng.randbytes(rng.randint(1, 9))
        case 2:
            at = rng.randrange(first, len(data))
            data[at:at] = rng.randbytes(rng.randint(1, 3))
        case 3:
            del data[rng.randrange(first, len(data))]
    return bytes(data)


def judge(count: int, seed: int) -> tuple[int, int]:
    """How many damaged messages of `count` were refused, and how many were messages of other latents."""
    rng, all_codecs = random.Random(seed), codecs()
    refused = other = 0
    while count:
        codec, messages = rng.choice(all_codecs)
        message = rng.choice(messages)
        damaged = mutate(message, rng)
        if damaged == message:
            continue
        count -= 1
        try:
            latents = codec.decode(damaged, most=4)
        except LinkError:
            refused += 1
            continue
        assert latents.shape[1:] == codec.shape and 1 <= len(latents) <= 4 and codec.encode(latents) == damaged
        other += 1
    return refused, other


def judged(count: int, coder: str) -> tuple[int, int]:
    """`judge` in a process that may have ROOM more than it begins with."""
    path = str(Path(__file__).parent)
    code = f"import sys; sys.path.insert(0, {path!r}); import test_mutations; test_mutations.main({count}, {coder!r})"
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]
    refused, other = map(int, done.stdout.split())
    return refused, other


def main(count: int, coder: str) -> None:
    from shoal.runtime import kernels

    if coder == "twin":
        kernels._loaded = lambda: (None, "it was not built: the test says so")
    codecs()  # what is loaded when it is needed is
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, size + ROOM))
    with pytest.raises(MemoryError):
        np.empty(2 * ROOM, np.uint8)
    print(*judge(count, seed=len(coder)))


@pytest.mark.parametrize("coder, count", [("kernels", 200_000), ("twin", 10_000)])
def test_damaged_messages_are_refused_or_messages(coder, count):
    refused, other = judged(count, coder)
    assert refused + other == count
    assert other < count / 50  # a tiny latent's bytes have little to spare that could be checked


@pytest.mark.deep
@pytest.mark.parametrize("coder, count", [("kernels", 5_000_000), ("twin", 200_000)])
def test_many_more(coder, count):
    test_damaged_messages_are_refused_or_messages(coder, count)


def test_the_twin_refuses_what_the_kernels_refuse():
    rng = random.Random(3)
    for codec, messages in codecs():
        for _ in range(400):
            damaged = mutate(rng.choice(messages), rng)[5:]
            for count in (1, 4):
                found = codec._coder.decode(damaged, count)
                symbols = np.empty((count, *codec.shape), np.uint8)
                assert codec._coder._decode(damaged, symbols.reshape(-1)) == (found is not None)
                assert found is None or (found == symbols).all()


def test_damaged_large_messages():
    """Of several states, whose end says more: nothing that was damaged passes."""
    shape = (8, 70, 70)
    latents = np.random.default_rng(0).laplace(size=(1, *shape)).astype(np.float32)
    codec = Codec(Tables.fit(Quantiser.fit(latents, 4), latents), shape)
    message, rng = codec.encode(latents), random.Random(0)
    for _ in range(1500):
        damaged = mutate(message, rng)
        if damaged != message:
            with pytest.raises(LinkError):
                codec.decode(damaged)
