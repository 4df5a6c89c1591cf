"""Texts in an ONNX model, read and replaced on its wire: its metadata, and attributes of its nodes.

Nothing here knows what a text means; what is checked is checked by onnx_wire.py.
"""

from collections.abc import Iterator

from .errors import BundleError
from .onnx_wire import Model, Node, Walk, field_bytes, rewrite


def metadata(model: Model) -> dict[str, str]:
    """The model's metadata_props. Raises BundleError for one that is none."""
    walk = Walk(model.data)
    fields = walk.fields("model", 0, len(model.data), 0)
    return dict(walk.pair(start, stop) for number, start, stop, _ in fields if number == 14)


def texts(model: Model, node: Node) -> dict[str, str | None]:
    """The attributes of a node by their names: text where they are, None where they are of another kind. Raises
    BundleError for one without a name, or whose name comes twice."""
    found: dict[str, str | None] = {}
    for start, stop, _ in _attributes(model, node):
        name, text = _attribute(model, start, stop)
        if not name or name in found:
            raise BundleError(
                "The model's graph cannot be used.", f"ONNX attribute {name!r:.40} has no name or comes twice.",
                "Convert the checkpoint again.",
            )  # fmt: skip
        found[name] = text
    return found


def with_text(model: Model, node: Node, key: str, text: str) -> bytes:
    """The model with the attribute `key` of one of its nodes being `text`; the rest is copied verbatim."""
    at, stop = _payload(model, node)
    pieces = []
    for start, end, begin in _attributes(model, node):
        if _attribute(model, start, end)[0] == key:
            pieces.append(model.data[at:begin])
            at = end
    said = field_bytes(1, key.encode()) + field_bytes(4, text.encode()) + b"\xa0\x01\x03"
    return rewrite(model, {node: [b"".join([*pieces, model.data[at:stop], field_bytes(5, said)])]}, (), ())


def _payload(model: Model, node: Node) -> tuple[int, int]:
    """Where a node's fields are."""
    walk, (start, stop) = Walk(model.data), node.span
    return walk.varint(walk.varint(start, stop, "node")[1], stop, "node")[1], stop


def _attributes(model: Model, node: Node) -> Iterator[tuple[int, int, int]]:
    """(payload from, to, field from) of a node's attributes."""
    for number, start, end, begin in Walk(model.data).fields("node", *_payload(model, node), 2):
        if number == 5:
            yield start, end, begin


def _attribute(model: Model, start: int, stop: int) -> tuple[str, str | None]:
    """Its name, and its text where it is one."""
    walk, name, text = Walk(model.data), "", None
    for number, begin, end, key in walk.fields("attribute", start, stop, 3):
        if number in (1, 4) and model.data[key] & 7 == 2:
            found = walk.text(begin, end, "attribute")
            name, text = (found, text) if number == 1 else (name, found)
    return name, text
