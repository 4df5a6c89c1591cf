"""Tiny llamas with static graphs (tests/data/make_static.py)."""

from pathlib import Path

import pytest
from make_static import write


@pytest.fixture(scope="session")
def shadowed_bundle(tiny_bundle, tmp_path_factory) -> Path:
    """With two products a block in 8 bits, whose activations are clipped often."""
    out = tmp_path_factory.mktemp("static") / "w8a8.shoal"
    write(tiny_bundle, out, 0.004)
    return out


@pytest.fixture(scope="session")
def npu_bundle(tiny_bundle, tmp_path_factory) -> Path:
    """In fp32, made for the npu."""
    out = tmp_path_factory.mktemp("static") / "npu.shoal"
    write(tiny_bundle, out, None, "npu")
    return out
