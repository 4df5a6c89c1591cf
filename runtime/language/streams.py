"""The stream between two parts of a model as bytes: exact, in half, or a little more than a quarter of the size.

A row has a scale, but for `float32`, and its values, all little-endian. `float16`: the scale is a power of two that
keeps the largest in range, since the streams of some models pass 65504. `int8`: a stream has a few channels a thousand
times the others (Sun et al. 2024, massive activations), which would leave nothing of these under one scale; so the
eight largest are sent apart, exactly, and the rest rounded (Dettmers et al. 2022). It knows nothing about models or
links.
"""

from functools import cache

import numpy as np

from ..errors import LinkError, UsageError

FORMATS = ("float32", "float16", "int8")
_OUTLIERS = 8


@cache
def _row(hidden: int, format: str) -> np.dtype:
    if format == "float32":
        return np.dtype([("values", "<f4", (hidden,))])
    if format == "float16":
        return np.dtype([("scale", "<f4"), ("values", "<f2", (hidden,))])
    if format == "int8":
        most = min(_OUTLIERS, hidden)
        outliers = [("channels", "<u4", (most,)), ("outliers", "<f4", (most,))]
        return np.dtype([("scale", "<f4"), *outliers, ("values", "i1", (hidden,))])
    raise UsageError(f"A stream has no format {format!r:.40}.", f"It is one of {', '.join(FORMATS)}.", "Name one.")


def row_bytes(hidden: int, format: str = "float32") -> int:
    """Bytes of a row of `hidden` channels. Raises UsageError for a format that there is none of."""
    return _row(hidden, format).itemsize


def pack(rows: np.ndarray, format: str = "float32") -> bytes:
    """The bytes of finite fp32 [n, hidden]."""
    data = np.zeros(len(rows), _row(rows.shape[1], format))
    if format == "float32":
        data["values"] = rows
        return data.tobytes()
    if format == "float16":
        most = np.abs(rows).max(axis=1)
        data["scale"] = np.exp2(np.maximum(np.frexp(most)[1] - 15, 0))
        data["values"] = rows / data["scale"][:, None]
        return data.tobytes()
    count = data["channels"].shape[1]
    channels = np.argpartition(np.abs(rows), rows.shape[1] - count, axis=1)[:, -count:]
    data["channels"], data["outliers"] = channels, np.take_along_axis(rows, channels, 1)
    rest = rows.copy()
    np.put_along_axis(rest, channels, 0, 1)
    scale = np.abs(rest).max(axis=1) / np.float32(127)
    data["scale"] = scale
    data["values"] = np.rint(rest / np.where(scale > 0, scale, 1)[:, None]).clip(-127, 127)
    return data.tobytes()


def unpack(data: bytes | bytearray | memoryview, hidden: int, format: str = "float32") -> np.ndarray:
    """fp32 [n, hidden] of whole rows from a peer. Raises LinkError for other lengths and for what is not a number."""
    kind = _row(hidden, format)
    if len(data) % kind.itemsize:
        why = f"It has {len(data)} bytes, a row has {kind.itemsize}."
        raise LinkError("A stream was cut within a row.", why, "Send it again.")
    found = np.frombuffer(data, kind)
    rows = found["values"].astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        if format != "float32":
            rows *= found["scale"][:, None]
    if format == "int8":
        channels = found["channels"].astype(np.int64)
        if channels.size and channels.max() >= hidden:
            raise LinkError("A stream names a channel that there is none of.", "It was made wrongly.", "Send it again.")
        np.put_along_axis(rows, channels, found["outliers"], 1)
    if not np.isfinite(rows).all():
        raise LinkError("A stream has what is not a number.", "It was made wrongly or damaged.", "Send it again.")
    return rows
