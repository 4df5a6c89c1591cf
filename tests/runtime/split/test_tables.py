"""Frequencies from counts, and tables as bytes that nobody trusts."""

import random
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

from shoal.runtime.errors import BundleError, UsageError
from shoal.runtime.split.quantise import Quantiser
from shoal.runtime.split.tables import MAX_CHANNELS, MAX_TABLES, Tables, frequencies

TOTAL = 1 << 14


def test_frequencies_worked_by_hand():
    # 16384 - 4 = 16380 are shared 1 : 2 : 0 : 4 over 1 each: 2340, 4680, 0, 9360 of 16380
    assert frequencies(np.array([1, 2, 0, 4])).tolist() == [2341, 4681, 1, 9361]
    # 16382 / 3 and twice that: 5460 2/3, 10921 1/3; the larger remainder gets what is left
    assert frequencies(np.array([1, 2])).tolist() == [5462, 10922]
    assert frequencies(np.array([0, 0])).tolist() == [8192, 8192]
    assert frequencies(np.array([0, 9])).tolist() == [1, 16383]
    assert frequencies(np.array([3, 3, 3])).tolist() == [5462, 5461, 5461]  # of equal remainders the first


@given(some.lists(some.integers(0, 2**60), min_size=2, max_size=256))
def test_frequencies_add_up_and_leave_nobody_out(counts):
    found = frequencies(np.array(counts))
    assert found.sum(dtype=np.int64) == TOTAL and found.min() >= 1
    if sum(counts):
        room = TOTAL - len(counts)
        assert all(abs(int(f) - 1 - c * room / sum(counts)) <= 1 for f, c in zip(found, counts, strict=True))


def test_groups_of_channels_share_a_table(made):
    tables, latents = made((6, 5), 3)
    assert tables.of.tolist() == [0, 1, 2, 0, 1, 2] and tables.frequencies.shape == (3, 8)
    symbols = tables.quantiser.quantise(latents)
    for group in range(3):
        counts = np.bincount(symbols[:, group::3].reshape(-1), minlength=8)
        assert (tables.frequencies[group] == frequencies(counts)).all()
    bits = -np.log2(tables.frequencies[tables.of] / TOTAL)
    cost = sum(bits[channel, symbol] for one in symbols for channel in range(6) for symbol in one[channel])
    assert tables.cost(symbols) == pytest.approx(cost)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("per_channel", [True, False])
def test_bytes_there_and_back(bits, per_channel):
    latents = np.random.default_rng(0).normal(size=(9, 4, 3)).astype(np.float32)
    tables = Tables.fit(Quantiser.fit(latents, bits, per_channel=per_channel), latents)
    data = tables.to_bytes()
    again = Tables.from_bytes(data)
    assert again.to_bytes() == data and again.digest == tables.digest and again.bits == bits
    assert again.quantiser.quantise(latents).tobytes() == tables.quantiser.quantise(latents).tobytes()
    assert Tables.from_bytes(bytearray(data)).digest == tables.digest  # and does not change with what it was read from
    for array in (again.of, again.frequencies, again.quantiser.scales, again.quantiser.offsets):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


def test_bytes_as_they_are_written():
    tables = Tables(Quantiser(1, [0.5], [-1]), [0, 0, 1], [[1, 16383], [8192, 8192]])
    assert tables.to_bytes() == (
        b"shcodec\x01" + struct.pack("<BBHII", 1, 14, 2, 3, 1) + struct.pack("<ff", 0.5, -1)
        + struct.pack("<HHH", 0, 0, 1) + struct.pack("<HHHH", 1, 16383, 8192, 8192)
    )  # fmt: skip


def forged(**fields) -> bytes:
    """Tables of 3 channels and 1 bit with a header of these numbers, nothing else changed."""
    numbers = {"bits": 1, "precision": 14, "tables": 2, "channels": 3, "scales": 1} | fields
    tables = Tables(Quantiser(1, [0.5], [-1]), [0, 0, 1], [[1, 16383], [8192, 8192]])
    return b"shcodec\x01" + struct.pack("<BBHII", *numbers.values()) + tables.to_bytes()[20:]


@pytest.mark.parametrize(
    "data, why",
    [
        (b"", "do not begin"),
        (forged()[:19], "do not begin"),
        (b"shcodec\x02" + forged()[8:], "do not begin"),
        (forged(bits=0), "0 bits"),
        (forged(bits=9), "9 bits"),
        (forged(precision=15), "frequencies of 15"),
        (forged(tables=0), "0 tables"),
        (forged(tables=MAX_TABLES + 1), f"{MAX_TABLES + 1} tables"),
        (forged(channels=0), "for 0 channels"),
        (forged(channels=MAX_CHANNELS + 1), "for 65537 channels"),
        (forged(channels=(1 << 32) - 1), "for 4294967295 channels"),
        (forged(scales=2), "2 scales"),
        (forged(scales=(1 << 32) - 1), "4294967295 scales"),
        (forged(bits=8), "42 bytes, not 1058"),
        (forged(channels=4), "42 bytes, not 44"),
        (forged(tables=1000), "42 bytes, not 4034"),
        (forged()[:-1], "41 bytes, not 42"),
        (forged() + b"\0", "43 bytes, not 42"),
        (forged(scales=3, channels=3)[:20] + bytes(38), "cannot tell apart"),
        (forged()[:20] + struct.pack("<ff", 0.5, float("nan")) + forged()[28:], "cannot tell apart"),
        (forged()[:28] + struct.pack("<HHH", 0, 2, 1) + forged()[34:], "a channel without a table"),
        (forged()[:34] + struct.pack("<HHHH", 0, 16384, 1, 16383), "frequencies that are 0"),
        (forged()[:34] + struct.pack("<HHHH", 2, 16383, 1, 16383), "do not add up"),
    ],
)
def test_refusals(data, why):
    with pytest.raises(BundleError) as caught:
        Tables.from_bytes(data)
    assert why in caught.value.why and caught.value.what == "The bundle's codec cannot be used."


def test_mutated_tables_are_refused_or_are_tables(made):
    """And cost no more memory than their bytes and a little."""
    rng = random.Random(0)
    originals = [made((5,), 1)[0].to_bytes(), made((4,), 4)[0].to_bytes(), forged()]
    taken = 0
    tracemalloc.start()
    try:
        for _ in range(10_000):
            data = bytearray(rng.choice(originals))
            for _ in range(rng.randint(1, 3)):
                data[rng.randrange(len(data) if rng.random() < 0.5 else 20)] = rng.choice(
                    (0, 1, 127, 255, rng.randrange(256))
                )
            if rng.random() < 0.2:
                del data[rng.randrange(len(data)) :]
            try:
                tables = Tables.from_bytes(data)
            except BundleError:
                continue
            taken += 1
            assert tables.to_bytes() == data
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert 0 < taken < 5_000


@pytest.mark.parametrize("groups", [[0], [0, 1, 2, -1], [0, 1, 2, MAX_TABLES], [[0, 1, 2, 3]]])
def test_impossible_groups(groups):
    latents = np.zeros((1, 4), np.float32)
    with pytest.raises(UsageError, match="groups"):
        Tables.fit(Quantiser(1, [1], [0]), latents, np.array(groups))


def test_tables_that_do_not_belong_together():
    with pytest.raises(UsageError, match="2 frequencies for 8 bits"):
        Tables(Quantiser(8, [1], [0]), [0], [[8192, 8192]])
    with pytest.raises(UsageError, match="2 scales"):
        Tables(Quantiser(1, [1, 1], [0, 0]), [0, 0, 0], [[8192, 8192]])
