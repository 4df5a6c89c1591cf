"""Latents of a real network on a real page: tables from every other line, coded are the lines between them."""

import numpy as np
import pytest

from shoal.runtime.session import open_graph
from shoal.runtime.split.codec import Codec
from shoal.runtime.split.quantise import Quantiser
from shoal.runtime.split.tables import Tables

# Values inside PP-OCRv4's recogniser: after its first convolution, between its convolutions, where samples/reader.py
# cuts it, and after two more
INSIDE = ("conv2d_185.tmp_0", "p2o.Add.31", "conv2d_189.tmp_0", "p2o.AveragePool.1", "conv2d_204.tmp_0")
WAYS = {"one table": (False, False), "one table, steps by channel": (True, False), "a table a channel": (True, True)}


@pytest.fixture(scope="module")
def real_latents(reader_onnx) -> dict[str, np.ndarray]:
    """By name, fp32 [6 lines of a photographed page, channels, height, width]."""
    import onnx

    from models import FetchError, fetch
    from reader import frames

    try:
        lines = frames(fetch("page"))
    except FetchError as error:
        pytest.skip(str(error))
    model = onnx.shape_inference.infer_shapes(onnx.load(reader_onnx))
    head = onnx.utils.Extractor(model).extract_model(["x"], list(INSIDE))
    with open_graph(head.SerializeToString(), {}, threads=1) as graph:
        found = [graph.run({"x": line}) for line in lines]
    return {name: np.concatenate([one[name] for one in found]) for name in INSIDE}


def entropy(tables: Tables, symbols: np.ndarray) -> float:
    """Bits of these symbols under their own frequencies, counted as the tables count them."""
    bits = 0.0
    for table in range(len(tables.frequencies)):
        counts = np.bincount(symbols[:, tables.of == table].reshape(-1), minlength=2**tables.bits)
        counts = counts[counts > 0]
        bits -= float((counts * np.log2(counts / counts.sum())).sum())
    return bits


@pytest.mark.parametrize("name", INSIDE)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("way", WAYS)
def test_within_one_percent_of_the_entropy(real_latents, name, bits, way):
    latents, (by_channel, own_tables) = real_latents[name], WAYS[way]
    known, new = latents[::2], latents[1::2]
    quantiser = Quantiser.fit(known, bits, per_channel=by_channel, clip=0.001)
    tables = Tables.fit(quantiser, known, None if own_tables else np.zeros(latents.shape[1], int))
    codec, symbols = Codec(tables, latents.shape[1:]), quantiser.quantise(new)
    together, singly = codec.encode(new), [codec.encode(one[None]) for one in new]
    assert (codec.decode(together, len(new)) == quantiser.dequantise(symbols)).all()
    assert all(
        (codec.decode(one) == latent).all() for one, latent in zip(singly, codec.decode(together, 3), strict=True)
    )
    size, apart = len(together), sum(map(len, singly))
    promised, own = tables.cost(symbols) / 8, entropy(tables, symbols) / 8
    over = f"over the tables' {size / promised - 1:.3%}, singly {apart / promised - 1:.3%}"
    each = f"{8 * size / symbols.size:.2f} bits each"
    print(f"{name} {latents.shape[1:]} {bits} bits, {way}: {each}; {over}, over its own {size / own - 1:.2%}")
    assert size <= 1.01 * promised
    assert apart <= 1.015 * promised
    if not own_tables:  # else three lines of print say too little of a channel
        assert size <= 1.01 * own
