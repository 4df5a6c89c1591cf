"""Tensors in the bodies of the Open Inference Protocol v2: both directions, as JSON or raw. Knows nothing about HTTP.

A body is a JSON object whose list "inputs" or "outputs" describes tensors; their values are in it, or follow it as raw
little-endian bytes (Triton's binary tensor data extension), in which case a header tells the JSON's length. What comes
is hostile: nothing is allocated but for bytes that came, and shapes, types and lengths have to agree.

https://github.com/kserve/open-inference-protocol and Triton's extension_binary_data.md.
"""

import json
import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from shoal.runtime.errors import LinkError, UsageError

JSON_LENGTH = "Inference-Header-Content-Length"  # bytes of JSON before the raw tensors
MAX_JSON = 16 << 20  # of JSON, which takes some twenty times as much memory while it is read
TENSORS, DIMS = 64, 8

DATATYPES = {
    "BOOL": "?", "UINT8": "u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8", "INT8": "i1", "INT16": "<i2",
    "INT32": "<i4", "INT64": "<i8", "FP16": "<f2", "FP32": "<f4", "FP64": "<f8", "BYTES": "O",
}  # fmt: skip
_NAMES = {np.dtype(code).newbyteorder("="): name for name, code in DATATYPES.items()}


List = Literal["inputs", "outputs"]


def encode(
    which: List, tensors: Mapping[str, np.ndarray], about: Mapping[str, Any] | None = None, *, binary: bool = True
) -> tuple[dict[str, str], list[bytes]]:
    """Headers and parts of a body that lists `tensors` as `which`; `about` holds more keys of its JSON.

    An object array holds bytes (BYTES). Raises UsageError for a type that the protocol, or its JSON, has no word for.
    """
    listed: list[dict[str, Any]] = []
    raw: list[bytes] = []
    for name, given in tensors.items():
        array = np.asarray(given)
        datatype = _NAMES.get(array.dtype.newbyteorder("="))
        if datatype is None:
            raise _unsendable(name, f"The protocol has no {array.dtype.name}.")
        tensor: dict[str, Any] = {"name": name, "shape": list(array.shape), "datatype": datatype}
        if binary:
            if datatype == "BYTES":
                data = b"".join(len(item).to_bytes(4, "little") + item for item in array.ravel().tolist())
            else:
                data = array.astype(DATATYPES[datatype], copy=False).tobytes()
            tensor["parameters"] = {"binary_data_size": len(data)}
            raw.append(data)
        else:
            tensor["data"] = _plain(name, datatype, array)
        listed.append(tensor)
    head = json.dumps({**(about or {}), which: listed}, separators=(",", ":"), allow_nan=False).encode()
    if not binary:
        return {"Content-Type": "application/json"}, [head]
    return {"Content-Type": "application/octet-stream", JSON_LENGTH: str(len(head))}, [head, *raw]


def decode(which: List, body: bytes, json_length: str | None = None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensors that a body lists as `which`, and its JSON; `json_length` is the header of that name.

    Raises LinkError for what is no such body.
    """
    value, raw = split(body, json_length)
    listed = value.get(which)
    if not isinstance(listed, list) or len(listed) > TENSORS:
        raise wrong(f"It has no list of at most {TENSORS} {which}.")
    found: dict[str, np.ndarray] = {}
    for tensor in listed:
        name = tensor.get("name") if isinstance(tensor, dict) else None
        if not isinstance(name, str) or name in found:
            raise wrong("A tensor has no name, or another's.")
        datatype, shape, parameters = (
            tensor.get("datatype"),
            _shape(name, tensor.get("shape")),
            tensor.get("parameters"),
        )
        if not isinstance(datatype, str) or datatype not in DATATYPES:
            raise wrong(f"Tensor {shown(name)} has an unknown type.")
        size = parameters.get("binary_data_size") if isinstance(parameters, dict) else None
        if size is None:
            found[name] = _listed(name, datatype, shape, tensor.get("data"))
        elif type(size) is not int or not 0 <= size <= len(raw):
            raise wrong(f"Tensor {shown(name)} is longer than what came.")
        else:
            found[name] = _unpacked(name, datatype, shape, raw[:size])
            raw = raw[size:]
    if len(raw):
        raise wrong(f"{len(raw):,} bytes belong to no tensor.")
    return found, value


def split(body: bytes, json_length: str | None) -> tuple[dict[str, Any], memoryview]:
    """The JSON object at the beginning of a body, and the bytes after it."""
    end = len(body)
    if json_length is not None:
        if not (json_length.isascii() and json_length.isdigit() and len(json_length) < 12 and int(json_length) <= end):
            raise wrong(f"Its {JSON_LENGTH} is {shown(json_length)}.")
        end = int(json_length)
    if end > MAX_JSON:
        raise wrong(f"Its JSON has {end:,} bytes; at most {MAX_JSON:,} are taken.")
    try:
        value = json.loads(body[:end])
    except (ValueError, RecursionError):
        raise wrong("It is not JSON.") from None
    if not isinstance(value, dict):
        raise wrong("It is not a JSON object.")
    return value, memoryview(body)[end:]


def _shape(name: str, shape: Any) -> tuple[int, ...]:
    good = isinstance(shape, list) and len(shape) <= DIMS
    if not good or not all(type(length) is int and 0 <= length < 1 << 31 for length in shape):
        raise wrong(f"Tensor {shown(name)} has no shape of at most {DIMS} lengths.")
    return tuple(shape)


def _unpacked(name: str, datatype: str, shape: tuple[int, ...], data: memoryview) -> np.ndarray:
    """From raw bytes."""
    count = math.prod(shape)
    if datatype != "BYTES":
        dtype = np.dtype(DATATYPES[datatype])
        if count * dtype.itemsize != len(data):
            raise wrong(f"Tensor {shown(name)} has {len(data):,} bytes, its shape says {count * dtype.itemsize:,}.")
        array = np.frombuffer(data, dtype).reshape(shape)
        if datatype == "BOOL":
            return np.frombuffer(data, "u1").reshape(shape) != 0
        return array.astype(dtype.newbyteorder("="))  # its own copy: the body shall not live as long as a slice of it
    items: list[bytes] = []
    at = 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "little")
        if len(items) == count or at + 4 + size > len(data):
            raise wrong(f"Tensor {shown(name)} ends within an element.")
        items.append(bytes(data[at + 4 : at + 4 + size]))
        at += 4 + size
    return _objects(name, shape, items)


def _listed(name: str, datatype: str, shape: tuple[int, ...], data: Any) -> np.ndarray:
    """From a JSON list, flat or nested."""
    while isinstance(data, list) and data and all(isinstance(row, list) for row in data):
        data = [item for row in data for item in row]
    kinds: tuple[type, ...] = {"BY": (str,), "BO": (bool,), "FP": (int, float)}.get(datatype[:2], (int,))
    if not isinstance(data, list) or not all(type(item) in kinds for item in data):
        raise wrong(f"Tensor {shown(name)} holds what is no {datatype}.")
    if len(data) != math.prod(shape):
        raise wrong(f"Tensor {shown(name)} has {len(data):,} elements, its shape says {math.prod(shape):,}.")
    if datatype == "BYTES":
        return _objects(name, shape, [item.encode("utf-8", "surrogatepass") for item in data])
    dtype = np.dtype(DATATYPES[datatype]).newbyteorder("=")
    try:
        if dtype.kind in "iu" and data and not np.iinfo(dtype).min <= min(data) <= max(data) <= np.iinfo(dtype).max:
            raise OverflowError(f"a value is beyond {datatype}")
        return np.array(data, dtype).reshape(shape)
    except (ValueError, OverflowError) as error:
        raise wrong(f"Tensor {shown(name)}: {shown(str(error), 120)}.") from None


def _objects(name: str, shape: tuple[int, ...], items: list[bytes]) -> np.ndarray:
    if len(items) != math.prod(shape):
        raise wrong(f"Tensor {shown(name)} has {len(items):,} elements, its shape says {math.prod(shape):,}.")
    array = np.empty(len(items), object)
    array[:] = items
    return array.reshape(shape)


def _plain(name: str, datatype: str, array: np.ndarray) -> list[Any]:
    """A flat list that JSON can hold."""
    if datatype == "FP16":
        raise _unsendable(name, "JSON has no half precision in this protocol, and the server takes no raw tensors.")
    if datatype == "BYTES":
        try:
            return [item.decode() for item in array.ravel().tolist()]
        except UnicodeDecodeError:
            raise _unsendable(name, "It is not UTF-8, and the server takes no raw tensors.") from None
    if datatype[0] == "F" and not np.isfinite(array).all():
        raise _unsendable(name, "JSON has no NaN or infinity, and the server takes no raw tensors.")
    return array.ravel().tolist()


def shown(text: str, limit: int = 60) -> str:
    """What the other side said, fit to be shown."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:limit])


def wrong(why: str) -> LinkError:
    return LinkError("What came over HTTP are no tensors.", why, "See that the other side speaks protocol v2.")


def _unsendable(name: str, why: str) -> UsageError:
    return UsageError(f"Input {name!r} cannot be sent.", why, "Send another type, or use a server that takes it.")
