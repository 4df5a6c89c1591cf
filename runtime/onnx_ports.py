"""What a graph takes and gives, read from its bytes without an engine: for whoever shows a bundle.

That is what the graph says of itself; an engine that opens it knows better. Nothing here knows about files.
"""

from dataclasses import dataclass

from .onnx_wire import Model, Walk

_DTYPES = {1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 8: "string", 9: "bool",
           10: "float16", 11: "float64", 12: "uint32", 13: "uint64", 16: "bfloat16"}  # fmt: skip


@dataclass(frozen=True)
class Port:
    """An input or output; a dim is a length, or the name of one that is open, or None. `dtype` is as numpy calls it,
    "" for what is no tensor."""

    name: str
    dtype: str
    dims: tuple[int | str | None, ...]


def ports(model: Model) -> tuple[list[Port], list[Port]]:
    """The inputs, without those that are initializers, and the outputs. Raises BundleError for what is none."""
    walk, held = Walk(model.data), {tensor.name for tensor in model.tensors}
    found: dict[int, list[Port]] = {11: [], 12: []}
    for number, start, stop, _ in walk.fields("graph", *model.graph[1:], 1):
        if number in found:
            found[number].append(_port(walk, start, stop))
    return [port for port in found[11] if port.name not in held], found[12]


def _port(walk: Walk, start: int, stop: int) -> Port:
    """A ValueInfoProto."""
    name, dtype = "", ""
    dims: list[int | str | None] = []
    for path, begin, end in walk.inside("value", start, stop, 2):
        if path == (1,):
            name = walk.text(begin, end, "value name")
        elif path == (2, 1, 1):
            kind = walk.varint(begin, end, "value type")[0]
            dtype = _DTYPES.get(kind, f"type {kind}")
        elif path == (2, 1, 2, 1):
            dims.append(None)
        elif path == (2, 1, 2, 1, 1):
            length = walk.varint(begin, end, "dim")[0]
            dims[-1] = length if length < 1 << 63 else None  # some exporters write -1
        elif path == (2, 1, 2, 1, 2):
            dims[-1] = walk.text(begin, end, "dim") or None
    return Port(name, dtype, tuple(dims))
