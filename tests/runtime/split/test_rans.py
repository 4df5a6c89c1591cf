"""The coder: an example worked by hand, the kernels and their twin, and how near to the entropy it comes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from shoal.runtime import kernels
from shoal.runtime.errors import BackendError
from shoal.runtime.split import rans
from shoal.runtime.split.quantise import Quantiser
from shoal.runtime.split.rans import Coder
from shoal.runtime.split.tables import Tables, frequencies

both = pytest.mark.parametrize("twin", [False, True], ids=["kernels", "twin"])


def coder(counts, shape, of=None) -> Coder:
    """Of symbols with these counts [tables][levels], 0 bits of which are wasted on what they stand for."""
    rows = np.stack([frequencies(np.array(row)) for row in counts])
    bits = rows.shape[1].bit_length() - 1
    return Coder(Tables(Quantiser(bits, [1], [0]), [0] * shape[0] if of is None else of, rows), shape)


def check(one: Coder, symbols: np.ndarray) -> bytes:
    """Codes by both, which must agree; the bytes."""
    data = one._encode(symbols)
    back = np.empty(symbols.size, np.uint8)
    assert one._decode(data, back) and (back == symbols.reshape(-1)).all()
    if kernels.available():
        assert one.encode(symbols) == data
        assert (one.decode(data, len(symbols)) == symbols).all()
    return data


@pytest.fixture
def use(request):
    """Lets a test go through the twin."""

    def use(twin: bool) -> None:
        if twin:
            request.getfixturevalue("without_kernels")
        elif not kernels.available():
            pytest.skip(kernels.missing())

    return use


def test_worked_by_hand():
    """Frequencies 12288 and 4096 of 16384; 1 0 1 1 from the last to the first, beginning at 1021:
    1: 0 * 16384 + 1021 + 12288 = 13309, which is 3 * 4096 + 1021
    1: 3 * 16384 + 1021 + 12288 = 62461, which is 5 * 12288 + 1021
    0: 5 * 16384 + 1021 + 0 = 82941, which is 20 * 4096 + 1021
    1: 20 * 16384 + 1021 + 12288 = 340989 = 0x0533FD."""
    tables = Tables(Quantiser(1, [1], [0]), [0], [[12288, 4096]])
    assert check(Coder(tables, (1, 4)), np.array([[[1, 0, 1, 1]]], np.uint8)) == b"\xfd\x33\x05"
    assert check(Coder(tables, (1, 4)), np.zeros((1, 1, 4), np.uint8)) == b"\xfd\x03"  # all of it below 12288


@both
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", [(1,), (16,), (5, 1), (3, 8, 8), (2, 3, 4, 5), (7, 61, 80), (300, 1, 1)])
def test_any_bits_and_shapes(made, use, twin, bits, shape):
    use(twin)
    tables, latents = made(shape, bits, count=3)
    symbols = tables.quantiser.quantise(latents)
    one = Coder(tables, shape)
    for count in (1, 3):
        data = one.encode(symbols[:count])
        assert (one.decode(data, count) == symbols[:count]).all()


@pytest.mark.parametrize("size", [rans.MANY - 1, rans.MANY, rans.MANY + 1, rans.MANY + 2, rans.MANY + 3, 3 * rans.MANY])
def test_from_one_state_to_several(size):
    rng = np.random.default_rng(size)
    one = coder([[60, 3, 2, 1]], (1, size))
    data = check(one, rng.choice(4, (1, 1, size), p=np.array([60, 3, 2, 1]) / 66).astype(np.uint8))
    assert rans.lanes(size) == (1 if size < rans.MANY else rans.LANES)
    assert len(data) % 2 == 0 or size < rans.MANY
    every = coder([[1, 1, 1, 1]] * 3, (size // 3, 3), of=np.arange(size // 3) % 3)  # runs shorter than the lanes
    check(every, rng.integers(0, 4, (1, size // 3, 3), np.uint8))


@pytest.mark.parametrize("bits", [1, 8])
@pytest.mark.parametrize("size", [1, 50, 40_000])
def test_one_symbol_has_all(bits, size):
    """All but one count of each other symbol; the rare ones can be coded all the same, at 14 bits each."""
    counts = [0] * 2**bits
    counts[-1] = 1
    one = coder([counts], (1, size))
    often = np.full((1, 1, size), 2**bits - 1, np.uint8)
    # -log2(16129 / 16384) bits each with 8 bits, next to none with 1
    assert len(check(one, often)) <= 4 + (16 if size > rans.MANY else 0) + size * (0.0227 if bits == 8 else 0.0001) / 8
    rare = np.zeros((1, 1, size), np.uint8)
    assert 14 * size / 8 <= len(check(one, rare)) <= 14 * size / 8 + 18


@given(some.data())
@settings(max_examples=200)
def test_kernels_and_twin_agree(data):
    bits = data.draw(some.integers(1, 8))
    tables = data.draw(some.lists(some.lists(some.integers(0, 1000), min_size=2**bits, max_size=2**bits), min_size=1,
                                  max_size=3))  # fmt: skip
    shape = tuple(data.draw(some.lists(some.integers(1, 6), min_size=1, max_size=3)))
    of = data.draw(some.lists(some.integers(0, len(tables) - 1), min_size=shape[0], max_size=shape[0]))
    count = data.draw(some.integers(1, 3))
    size = count * int(np.prod(shape))
    symbols = data.draw(some.lists(some.integers(0, 2**bits - 1), min_size=size, max_size=size))
    check(coder(tables, shape, of), np.array(symbols, np.uint8).reshape(count, *shape))


def test_what_is_coded_is_what_the_entropy_says():
    """No more than 0.05 % and the states' bytes above it, from nearly certain symbols to even ones."""
    rng = np.random.default_rng(0)
    for chances in ([0.999, 0.001], [0.9, 0.1], [0.5, 0.5], [0.97, 0.01, 0.01, 0.01], [1 / 256] * 256):
        symbols = rng.choice(len(chances), (1, 1, 400_000), p=chances).astype(np.uint8)
        counts = np.bincount(symbols.reshape(-1), minlength=len(chances))
        one = coder([counts], (1, symbols.size))
        chance = counts / symbols.size
        entropy = -(counts * np.log2(chance)).sum() / 8
        assert len(one.encode(symbols)) <= 1.0005 * entropy + 4 * rans.LANES + 2, chances


@both
def test_a_state_costs_two_bytes_not_eight(made, use, twin):
    """On average over small latents, above what their symbols cost under the tables."""
    use(twin)
    for shape in ((16,), (64,), (256,), (3, 8, 8)):
        for bits in (1, 2, 4, 8):
            tables, latents = made(shape, bits, count=100)
            symbols = tables.quantiser.quantise(latents)
            one = Coder(tables, shape)
            total = sum(len(one.encode(latent[None])) for latent in symbols)
            assert (total - tables.cost(symbols) / 8) / len(symbols) < 2.2


@both
def test_bytes_of_nobody(made, use, twin):
    """Each rule of the states and words, for one state and for several."""
    use(twin)
    few, many = coder([[70, 31]], (1, 40)), coder([[70, 31]], (1, rans.MANY))
    data = few.encode(np.arange(40, dtype=np.uint8).reshape(1, 1, 40) % 2)
    assert len(data) > 6 and few.decode(data, 1) is not None
    for wrong in (data[:-1], data[:-2], data + b"\0", data + b"\0\0", data[2:], b"", data[:4], b"\0" + data,
                  data[:2] + b"\0" + data[3:], b"\1", bytes(4)):  # fmt: skip
        assert few.decode(wrong, 1) is None, wrong
    data = many.encode(np.zeros((1, 1, rans.MANY), np.uint8))
    assert many.decode(data, 1) is not None
    heads = 4 * rans.LANES
    for wrong in (data[:-1], data[:-2], data + b"\0\0", b"", data[: heads - 1], data[:heads], bytes(len(data)),
                  data[:2] + b"\0\0" + data[4:]):  # fmt: skip
        assert many.decode(wrong, 1) is None


def test_a_symbol_that_no_table_has_is_refused_by_the_kernels():
    if not kernels.available():
        pytest.skip(kernels.missing())
    with pytest.raises(BackendError, match="out of range"):
        coder([[1, 1]], (3,)).encode(np.array([[0, 1, 2]], np.uint8))
