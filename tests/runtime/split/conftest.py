"""Latents of any shape and tables for them; and a slimmable network of three members, cut, packed for both sides."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from shoal.converters.split.tail import pack, pack_tail
from shoal.runtime.session import open_graph
from shoal.runtime.split.quantise import Quantiser
from shoal.runtime.split.tables import Tables

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "data"))
from make_split import MEMBERS, slimmable  # noqa: E402

BITS = (2, 8)


@pytest.fixture(scope="session")
def made() -> Callable:
    """made(shape, bits) -> (tables, latents fp32 [4, *shape]); a table for every third channel."""

    def made(shape: tuple[int, ...], bits: int, seed: int = 0, count: int = 4) -> tuple[Tables, np.ndarray]:
        rng = np.random.default_rng(seed)
        latents = rng.laplace(0, 1, (count, *shape)).astype(np.float32)
        quantiser = Quantiser.fit(latents, bits, clip=0.01)
        return Tables.fit(quantiser, latents, np.arange(shape[0]) % 3), latents

    return made


@pytest.fixture(scope="session")
def network(tmp_path_factory) -> SimpleNamespace:
    """`device` and `edge` are bundles of `split`, `modes` and `codecs` what they were packed with: a mode for every
    number of members at every number of bits, accuracies made up. `images` fp32 [8, 3, 32, 32]; `latents` of each
    number of members and `whole`, the local network's outputs, are theirs."""
    split, folder = slimmable(), tmp_path_factory.mktemp("network")
    images = np.random.default_rng(5).random((8, 3, 32, 32), np.float32)
    modes, codecs, latents = [], {}, {}
    with open_graph(split.head, {}, threads=1) as head:
        for members in range(1, MEMBERS + 1):
            latents[members] = head.run({"image": images, "encoder": np.array(members)})["latent"]
            for bits in BITS:
                tables = Tables.fit(Quantiser.fit(latents[members], bits), latents[members], np.zeros(16, int))
                name, number = f"e{members}b{bits}", len(modes) + 1
                codecs[name] = tables.to_bytes()
                modes.append({"id": number, "encoder": members, "codec": name, "bits": bits, "bytes": 128 * bits,
                              "device_ms": 0.02 * members, "accuracy": 0.5 + number / 20})  # fmt: skip
    device, edge = folder / "device.shoal", folder / "edge.shoal"
    graphs = {"head": split.head, "local": split.whole}
    pack(graphs, device, "cats", modes=modes, codecs=codecs, local={"device_ms": 0.1, "accuracy": 0.52})
    pack_tail(split.tail, edge, "cats", modes=modes, codecs=codecs)
    with open_graph(split.whole, {}, threads=1) as whole:
        answers = whole.run({"image": images})
    return SimpleNamespace(split=split, device=device, edge=edge, modes=modes, codecs=codecs, images=images,
                           latents=latents, whole=answers)  # fmt: skip
