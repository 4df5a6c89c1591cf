"""A stream as bytes: how near it stays, channels a thousand times the others included, and hostile bytes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.runtime.errors import LinkError, UsageError
from shoal.runtime.language.streams import FORMATS, pack, row_bytes, unpack


@pytest.mark.parametrize("hidden", [1, 7, 64, 577])
@pytest.mark.parametrize("format, error", [("float32", 0.0), ("float16", 6e-4), ("int8", 0.02)])
def test_rows_come_back(format, error, hidden):
    rows = np.random.default_rng(hidden).standard_normal((9, hidden)).astype(np.float32)
    rows[0] = 0
    rows[1, : hidden // 8] = 3e4  # massive activations
    rows[2, 0] = -7e5  # beyond float16
    rows[3] *= 1e-6
    data = pack(rows, format)
    assert len(data) == 9 * row_bytes(hidden, format)
    found = unpack(data, hidden, format)
    assert found.dtype == np.float32 and found.shape == rows.shape
    scale = np.abs(rows).max(axis=1, keepdims=True)
    if format == "int8":  # but for the eight largest, which are exact
        scale = np.sort(np.abs(rows), axis=1)[:, [max(0, hidden - 9)]]
    assert (np.abs(found - rows) <= error * scale + 1e-7).all()
    assert format != "int8" or found[2, 0] == rows[2, 0]


@given(st.sampled_from(FORMATS), st.binary(max_size=200))
def test_any_bytes_are_rows_or_refused(format, data):
    try:
        rows = unpack(data, 11, format)
    except LinkError:
        return
    assert rows.shape == (len(data) / row_bytes(11, format), 11) and np.isfinite(rows).all()


def test_an_unknown_format():
    with pytest.raises(UsageError, match="float16"):
        row_bytes(8, "int3")
