"""The protobuf wire of an ONNX model, walked and rewritten without an ONNX library.

It promises two things. `read` lists the nodes and initializers of untrusted ModelProto bytes and refuses every way a
model could reach a file that its bundle did not name: external data anywhere but in a top-level initializer, in a
location that is not a section, outside that section, or with entries nobody asked for. `relocate` writes the same
model with other external data. It knows nothing about files, sessions or what an operator means.

The field numbers are those of onnx.proto (IR version 12); the encoding is the Protocol Buffers wire format. A field
that is not in the table is refused: a newer field could hold a tensor that this walk would not see.
"""

import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from .errors import BundleError

MAX_MODEL = 64 << 20  # bytes of a graph section: weights are external, so a graph is small
MAX_FIELDS = 1 << 18  # of one model, so that a walk ends within a second; a 48-block decoder has about 40,000
MAX_DEPTH = 12  # message within message

# data_type -> bits of an element. Strings and complex numbers cannot be external.
BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 16: 16,
        17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4, 23: 4, 24: 8, 25: 2, 26: 2}  # fmt: skip

# message -> field number -> name of the message inside, or "" for a plain value.
_PLAIN = ""
_FIELDS: dict[str, dict[int, str]] = {
    "model": {1: _PLAIN, 2: _PLAIN, 3: _PLAIN, 4: _PLAIN, 5: _PLAIN, 6: _PLAIN, 7: "graph", 8: _PLAIN, 14: _PLAIN,
              20: "training", 25: "function", 26: _PLAIN},
    "graph": {1: "node", 2: _PLAIN, 5: "tensor", 10: _PLAIN, 11: _PLAIN, 12: _PLAIN, 13: _PLAIN, 14: _PLAIN,
              15: "sparse", 16: _PLAIN},
    "node": {1: _PLAIN, 2: _PLAIN, 3: _PLAIN, 4: _PLAIN, 5: "attribute", 6: _PLAIN, 7: _PLAIN, 8: _PLAIN, 9: _PLAIN,
             10: _PLAIN},
    "attribute": {1: _PLAIN, 2: _PLAIN, 3: _PLAIN, 4: _PLAIN, 5: "tensor", 6: "graph", 7: _PLAIN, 8: _PLAIN, 9: _PLAIN,
                  10: "tensor", 11: "graph", 13: _PLAIN, 14: _PLAIN, 15: _PLAIN, 20: _PLAIN, 21: _PLAIN, 22: "sparse",
                  23: "sparse"},
    "tensor": dict.fromkeys((1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 16), _PLAIN),
    "sparse": {1: "tensor", 2: "tensor", 3: _PLAIN},
    "training": {1: "graph", 2: "graph", 3: _PLAIN, 4: _PLAIN},
    "function": {1: _PLAIN, 4: _PLAIN, 5: _PLAIN, 6: _PLAIN, 7: "node", 8: _PLAIN, 9: _PLAIN, 10: _PLAIN,
                 11: "attribute", 12: _PLAIN, 13: _PLAIN, 14: _PLAIN},
    "value": {1: _PLAIN, 2: "type", 3: _PLAIN, 4: _PLAIN},
    "type": {1: "array", 4: _PLAIN, 5: _PLAIN, 6: _PLAIN, 7: _PLAIN, 8: _PLAIN, 9: _PLAIN},
    "array": {1: _PLAIN, 2: "shape"},
    "shape": {1: "dim"},
    "dim": {1: _PLAIN, 2: _PLAIN, 3: _PLAIN},
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class External:
    """Where an initializer's bytes are: `length` bytes from `offset` of `location`, and ORT's further entries."""

    location: str
    offset: int
    length: int
    prepacked: tuple[str, ...] = ()  # values of ORT's prepacked_n entries: "key|offset;length;checksum|..."


@dataclass(frozen=True, slots=True)
class Tensor:
    """A top-level initializer. `external` is None when its bytes are in the model; `span` is its field in the model."""

    name: str
    dtype: int
    dims: tuple[int, ...]
    external: External | None
    span: tuple[int, int] = field(compare=False)

    @property
    def nbytes(self) -> int:
        """Bytes of its elements, by shape and type."""
        count = 1
        for dim in self.dims:
            count *= dim
        return (count * BITS.get(self.dtype, 0) + 7) // 8


@dataclass(frozen=True, slots=True)
class Node:
    """A top-level node; `integers` and `floats` are its attributes of these kinds. `span` is its field in the model."""

    op: str
    domain: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    integers: dict[str, int] = field(compare=False)
    floats: dict[str, float] = field(compare=False)
    span: tuple[int, int] = field(compare=False)


@dataclass(frozen=True, slots=True)
class Model:
    """What `read` found. `data` is the model's bytes; `graph` says where its one graph's field, and payload, begin."""

    data: bytes
    graph: tuple[int, int, int]  # field from, payload from, to
    tensors: tuple[Tensor, ...]
    nodes: tuple[Node, ...]
    header: tuple[tuple[int, int], ...]  # spans of ir_version and opset_import


def read(data: bytes, sections: Mapping[str, int], prepacked: str | None = None) -> Model:
    """Walks all of `data` (a ModelProto) against `sections`: name -> bytes that external data may use.

    Only tensors in section `prepacked` may have prepacked entries: ORT does not check those, so they must come from a
    cache that this device wrote. Raises BundleError naming the field; time and memory are bounded by MAX_FIELDS.
    """
    if len(data) > MAX_MODEL:
        raise _refuse("graph", f"has {len(data)} bytes; the limit is {MAX_MODEL}")
    data = bytes(data)
    walk = Walk(data)
    tensors: list[Tensor] = []
    nodes: list[Node] = []
    graphs, header = [], []
    for number, start, stop, key in walk.fields("model", 0, len(data), 0):
        if number == 7:
            graphs.append((key, start, stop))
        elif number in (1, 8):
            header.append((key, stop))
        elif number in (20, 25):
            walk.no_external(_FIELDS["model"][number], start, stop, 1)
    if len(graphs) != 1:  # protobuf merges repeated ones: what runs would not be what was checked
        raise _refuse("graph", f"appears {len(graphs)} times in the model")
    for number, start, stop, key in walk.fields("graph", *graphs[0][1:], 1):
        if number == 5:
            tensors.append(walk.tensor(start, stop, key, sections, prepacked))
        elif number == 1:
            nodes.append(walk.node(start, stop, key))
        elif number == 15:
            walk.no_external("sparse", start, stop, 2)
    names = {tensor.name for tensor in tensors}
    if len(names) != len(tensors):
        raise _refuse("initializer", "has a name that appears twice")
    return Model(data, graphs[0], tuple(tensors), tuple(nodes), tuple(header))


def relocate(model: Model, change: Callable[[Tensor], External | None]) -> bytes:
    """The model with each initializer's external data replaced by `change(tensor)`; None keeps the tensor as it is.

    A tensor whose bytes are in the model becomes external when `change` says so. Everything else is copied verbatim.
    """
    data, (key, start, stop) = model.data, model.graph
    pieces, at = [], start
    for tensor in model.tensors:
        external = change(tensor)
        if external is not None:
            pieces += [data[at : tensor.span[0]], field_bytes(5, tensor_bytes(replace(tensor, external=external)))]
            at = tensor.span[1]
    pieces.append(data[at:stop])
    return data[:key] + field_bytes(7, b"".join(pieces)) + data[stop:]


def rewrite(
    model: Model, nodes: Mapping[Node, Iterable[bytes]], tensors: Iterable[bytes], drop: Iterable[str]
) -> bytes:
    """The model with some nodes replaced by others (NodeProtos, in their place), further `tensors` (TensorProtos) and
    without the initializers named in `drop`."""
    data, (key, start, stop), dropped = model.data, model.graph, set(drop)
    changes = [(node.span, b"".join(field_bytes(1, one) for one in made)) for node, made in nodes.items()]
    changes += [(tensor.span, b"") for tensor in model.tensors if tensor.name in dropped]
    pieces, at = [], start
    for span, made in sorted(changes):
        pieces += [data[at : span[0]], made]
        at = span[1]
    pieces += [data[at:stop], *(field_bytes(5, tensor) for tensor in tensors)]
    return data[:key] + field_bytes(7, b"".join(pieces)) + data[stop:]


def part(model: Model, nodes: Iterable[Node], outputs: Iterable[str]) -> bytes:
    """The model with only these of its nodes, none of which has a body, and the initializers that they take. They give
    `outputs`, which are without a type: ORT finds it by itself."""
    data, (key, start, stop) = model.data, model.graph
    nodes = list(nodes)
    taken = {name for node in nodes for name in node.inputs}
    kept = {node.span for node in nodes} | {tensor.span for tensor in model.tensors if tensor.name in taken}
    pieces = []
    for number, _, end, begin in Walk(data).fields("graph", start, stop, 1):
        if number != 12 and (number not in (1, 5) or (begin, end) in kept):
            pieces.append(data[begin:end])
    pieces += [field_bytes(12, field_bytes(1, name.encode())) for name in outputs]
    return data[:key] + field_bytes(7, b"".join(pieces)) + data[stop:]


def node_bytes(op: str, inputs: Iterable[str], outputs: Iterable[str], domain: str = "", name: str = "", **attributes):
    """A NodeProto; attributes are integers, floats or texts, and those that are None are left out."""
    out = b"".join(field_bytes(1, text.encode()) for text in inputs)
    out += b"".join(field_bytes(2, text.encode()) for text in outputs)
    out += field_bytes(3, name.encode()) + field_bytes(4, op.encode()) + field_bytes(7, domain.encode())
    for key, value in attributes.items():
        if isinstance(value, float):
            payload = b"\x15" + struct.pack("<f", value) + b"\xa0\x01\x01"
        elif isinstance(value, int):
            payload = b"\x18" + _varint(value & 0xFFFFFFFFFFFFFFFF) + b"\xa0\x01\x02"
        elif value is not None:
            payload = field_bytes(4, value.encode()) + b"\xa0\x01\x03"
        else:
            continue
        out += field_bytes(5, field_bytes(1, key.encode()) + payload)
    return out


def array_bytes(name: str, array: np.ndarray) -> bytes:
    """A TensorProto of float32 or int64, its bytes in the model."""
    out = b"".join(b"\x08" + _varint(dim) for dim in array.shape)
    out += b"\x10" + _varint({"float32": 1, "int64": 7}[array.dtype.name]) + field_bytes(8, name.encode())
    return out + field_bytes(9, np.ascontiguousarray(array).tobytes())


def single(model: Model, node: Node, tensors: Iterable[Tensor], inputs: Mapping[str, int]) -> bytes:
    """A model of one node of `model`: `tensors` are its initializers, `inputs` its other inputs and their dtypes.

    The inputs and outputs have no shapes; the outputs have the type of the first input.
    """
    kind = next(iter(inputs.values()))
    graph = model.data[slice(*node.span)] + field_bytes(2, b"one")
    graph += b"".join(
        field_bytes(5, tensor_bytes(tensor)) if tensor.external else model.data[slice(*tensor.span)]
        for tensor in tensors
    )
    graph += b"".join(field_bytes(11, _value(name, dtype)) for name, dtype in inputs.items())
    graph += b"".join(field_bytes(12, _value(name, kind)) for name in node.outputs if name)
    return b"".join(model.data[slice(*span)] for span in model.header) + field_bytes(7, graph)


def tensor_bytes(tensor: Tensor) -> bytes:
    """A TensorProto of `tensor`, whose bytes must be external."""
    external = tensor.external
    if external is None:
        raise ValueError(f"{tensor.name} has no external data")
    entries = [("location", external.location), ("offset", str(external.offset)), ("length", str(external.length))]
    entries += [(f"prepacked_{index}", value) for index, value in enumerate(external.prepacked)]
    out = b"".join(b"\x08" + _varint(dim) for dim in tensor.dims)
    out += b"\x10" + _varint(tensor.dtype) + field_bytes(8, tensor.name.encode())
    for key, value in entries:
        out += field_bytes(13, field_bytes(1, key.encode()) + field_bytes(2, value.encode()))
    return out + b"\x70\x01"  # data_location = EXTERNAL


def blobs(entry: str) -> tuple[str, list[tuple[int, int]]]:
    """A prepacked entry as (key, [(offset, length)...]). Raises BundleError when it is not one."""
    key, *parts = entry.split("|")
    ranges = []
    for part in parts:
        numbers = part.split(";")
        if len(numbers) != 3:
            raise _refuse("prepacked", f"entry {entry!r:.80} is not key|offset;length;checksum")
        ranges.append((_count(numbers[0], "prepacked"), _count(numbers[1], "prepacked")))
    if not key or not ranges:
        raise _refuse("prepacked", f"entry {entry!r:.80} is empty")
    return key, ranges


def entry(key: str, ranges: Iterable[tuple[int, int]]) -> str:
    """The inverse of `blobs`; ORT writes and ignores a checksum of 0."""
    return "|".join([key, *(f"{offset};{length};0" for offset, length in ranges)])


class Walk:
    """One pass over untrusted bytes; counts fields so that hostile bytes cannot hold it for long."""

    def __init__(self, data: bytes):
        self.data = data
        self.left = MAX_FIELDS

    def fields(self, message: str, at: int, stop: int, depth: int) -> Iterator[tuple[int, int, int, int]]:
        """(number, payload from, to, field from) of each field; a varint is its own payload."""
        if depth > MAX_DEPTH:
            raise _refuse(message, f"is nested deeper than {MAX_DEPTH}")
        known = _FIELDS[message]
        while at < stop:
            self.left -= 1
            if self.left < 0:
                raise _refuse(message, f"is one of more than {MAX_FIELDS} fields")
            begin = at
            key, at = self.varint(at, stop, message)
            number, wire = key >> 3, key & 7
            if number not in known:
                raise _refuse(message, f"has an unknown field {number}")
            if known[number] and wire != 2:
                raise _refuse(message, f"field {number} has wire type {wire}")
            if wire == 0:
                start = at
                _, at = self.varint(at, stop, message)
            elif wire == 2:
                length, start = self.varint(at, stop, message)
                at = start + length
            elif wire in (1, 5):
                start = at
                at += 8 if wire == 1 else 4
            else:
                raise _refuse(message, f"field {number} has wire type {wire}")
            if at > stop:
                raise _refuse(message, f"field {number} ends {at - stop} bytes beyond its message")
            yield number, start, at, begin

    def inside(self, message: str, start: int, stop: int, depth: int) -> Iterator[tuple[tuple[int, ...], int, int]]:
        """(numbers of the fields that lead there, payload from, to) of everything inside, outer before inner."""
        for number, begin, end, _ in self.fields(message, start, stop, depth):
            yield (number,), begin, end
            if inner := _FIELDS[message][number]:
                for path, first, last in self.inside(inner, begin, end, depth + 1):
                    yield (number, *path), first, last

    def varint(self, at: int, stop: int, message: str) -> tuple[int, int]:
        value = shift = 0
        data = self.data
        while at < stop and shift < 64:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value & 0xFFFFFFFFFFFFFFFF, at
            shift += 7
        raise _refuse(message, "has a number that does not end")

    def no_external(self, message: str, start: int, stop: int, depth: int) -> None:
        """Walks everything inside and refuses external data in any tensor."""
        for number, begin, end, _ in self.fields(message, start, stop, depth):
            inside = _FIELDS[message][number]
            if inside:
                self.no_external(inside, begin, end, depth + 1)
            elif message == "tensor" and number == 13:
                raise _refuse("tensor", "has external data but is not an initializer of the graph")
            elif message == "tensor" and number == 14 and self.data[begin:end] != b"\x00":
                raise _refuse("tensor", "has external data but is not an initializer of the graph")

    def tensor(self, start: int, stop: int, at: int, sections: Mapping[str, int], prepacked: str | None) -> Tensor:
        name: str | None = None
        dtype = place = None
        dims: list[int] = []
        entries: list[tuple[str, str]] = []
        inline = False
        for number, begin, end, key in self.fields("tensor", start, stop, 2):
            wire = self.data[key] & 7
            if number == 1:
                if wire == 2:  # packed
                    while begin < end and len(dims) <= 16:
                        dim, begin = self.varint(begin, end, "tensor")
                        dims.append(dim)
                else:
                    dims.append(self.varint(begin, end, "tensor")[0])
                if len(dims) > 16 or dims and dims[-1] >= 1 << 48:
                    raise _refuse("tensor", "has an impossible shape")
            elif number == 2 and wire == 0 and dtype is None:
                dtype = self.varint(begin, end, "tensor")[0]
            elif number == 8 and wire == 2 and name is None:
                name = self.text(begin, end, "tensor name")
            elif number == 14 and wire == 0 and place is None:
                place = self.varint(begin, end, "tensor")[0]
            elif number == 13 and wire == 2:
                entries.append(self.pair(begin, end))
            elif number in (2, 8, 13, 14):
                raise _refuse("tensor", f"has field {number} twice or of a wrong type")
            elif number in (4, 5, 6, 7, 9, 10, 11):
                inline = True
        if not name or dtype is None:
            raise _refuse("initializer", "has no name or no type")
        external = None
        if entries or place:
            if place != 1 or inline:
                raise _refuse(f"initializer {name!r:.80}", "is neither wholly external nor wholly inside")
            external = _external(name, entries, sections, prepacked)
            if dtype not in BITS:
                raise _refuse(f"initializer {name!r:.80}", f"of type {dtype} cannot be external")
        tensor = Tensor(name, dtype, tuple(dims), external, (at, stop))
        if external and external.length != tensor.nbytes:
            raise _refuse(f"initializer {name!r:.80}", f"needs {tensor.nbytes} bytes but has {external.length}")
        return tensor

    def node(self, start: int, stop: int, at: int) -> Node:
        text = {3: "", 4: "", 7: ""}
        inputs, outputs = [], []
        integers: dict[str, int] = {}
        floats: dict[str, float] = {}
        for number, begin, end, key in self.fields("node", start, stop, 2):
            if number in (1, 2, 3, 4, 7) and self.data[key] & 7 != 2:
                raise _refuse("node", f"field {number} is not text")
            if number == 1:
                inputs.append(self.text(begin, end, "node input"))
            elif number == 2:
                outputs.append(self.text(begin, end, "node output"))
            elif number in text:
                text[number] = self.text(begin, end, "node")
            elif number == 5:
                self.attribute(begin, end, integers, floats)
        return Node(text[4], text[7], text[3], tuple(inputs), tuple(outputs), integers, floats, (at, stop))

    def attribute(self, start: int, stop: int, integers: dict[str, int], floats: dict[str, float]) -> None:
        name, value, real = "", None, None
        for number, begin, end, key in self.fields("attribute", start, stop, 3):
            wire = self.data[key] & 7
            inside = _FIELDS["attribute"][number]
            if inside:
                self.no_external(inside, begin, end, 4)
            elif number == 1 and wire == 2:
                name = self.text(begin, end, "attribute name")
            elif number == 3 and wire == 0:
                value = self.varint(begin, end, "attribute")[0]
            elif number == 2 and wire == 5:
                real = struct.unpack("<f", self.data[begin:end])[0]
        if real is not None:
            floats[name] = real
        if value is not None:
            integers[name] = value - (1 << 64) if value >> 63 else value

    def pair(self, start: int, stop: int) -> tuple[str, str]:
        """A StringStringEntryProto."""
        found: dict[int, str] = {}
        at = start
        while at < stop:
            key, at = self.varint(at, stop, "external data")
            length, at = self.varint(at, stop, "external data")
            if key not in (10, 18) or key in found or length > stop - at:
                raise _refuse("external data", "has an entry that is not one key and one value")
            found[key] = self.text(at, at + length, "external data")
            at += length
        if len(found) != 2:
            raise _refuse("external data", "has an entry that is not one key and one value")
        return found[10], found[18]

    def text(self, start: int, stop: int, what: str) -> str:
        try:
            return self.data[start:stop].decode()
        except UnicodeDecodeError:
            raise _refuse(what, "is not UTF-8") from None


def _external(
    name: str, entries: list[tuple[str, str]], sections: Mapping[str, int], prepacked: str | None
) -> External:
    what = f"initializer {name!r:.80}"
    plain = {key: value for key, value in entries if key in ("location", "offset", "length")}
    packed = tuple(value for key, value in entries if key.startswith("prepacked"))
    if len(plain) + len(packed) != len(entries) or "location" not in plain or "length" not in plain:
        raise _refuse(what, "has external data entries that are unknown, repeated or missing")
    location = plain["location"]
    if location not in sections:
        raise _refuse(what, f"points to {location!r:.80}, which is not a section")
    if packed and location != prepacked:
        raise _refuse(what, "brings prepacked data, which only this device's cache may")
    offset, length = _count(plain.get("offset", "0"), what), _count(plain["length"], what)
    ranges = [(offset, length)]
    for value in packed:
        ranges += blobs(value)[1]
    for start, count in ranges:
        if start > sections[location] or count > sections[location] - start:
            raise _refuse(what, f"uses bytes {start} to {start + count} of a section of {sections[location]}")
    return External(location, offset, length, packed)


def _count(text: str, what: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise _refuse(what, f"has {text!r:.40} where a number of bytes belongs")
    return int(text)


def _refuse(what: str, why: str) -> BundleError:
    return BundleError("The model's graph cannot be used.", f"ONNX {what} {why}.", "Convert the checkpoint again.")


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def field_bytes(number: int, payload: bytes) -> bytes:
    """A field that holds bytes."""
    return _varint(number << 3 | 2) + _varint(len(payload)) + payload


def _value(name: str, dtype: int) -> bytes:
    """A ValueInfoProto of a tensor without a shape."""
    return field_bytes(1, name.encode()) + field_bytes(2, field_bytes(1, b"\x08" + _varint(dtype)))
