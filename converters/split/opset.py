"""Graphs of opsets 7 to 10 as of opset 11, which what is written beside a network's own nodes needs.

Between these opsets numbers moved from attributes to inputs, Upsample became a Resize and Scatter got a longer name;
all other operators mean the same. The graph computes the same numbers, and its values keep their names. It runs
nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from shoal.runtime.errors import ConvertError

from .graph import Graph, Node

OLDEST, LEAST = 7, 11

_Changed = tuple[str, Mapping[str, Any], Sequence[str | np.ndarray]]  # op, attributes, inputs by name or as constants
_RULES: dict[str, Callable[[Node, int], _Changed]] = {}


def raised(graph: Graph) -> Graph:
    """`graph`, of opset 7 or later, of opset 11 or later. Raises ConvertError with the node that cannot be."""
    if graph.opset >= LEAST:
        return graph
    tensors, nodes = dict(graph.tensors), []
    for node in graph.nodes:
        if node.op not in _RULES:
            nodes.append(node)
            continue
        op, attributes, inputs = _RULES[node.op](node, graph.opset)
        names = []
        for one in inputs:
            if isinstance(one, str):
                names.append(one)
            else:
                names.append(f"{node.outputs[0]} {len(names)} of {node.op}")
                tensors[names[-1]] = one
        nodes.append(replace(node, op=op, inputs=tuple(names), attributes=attributes))
    return replace(graph, nodes=tuple(nodes), tensors=tensors, opset=LEAST)


def _rule(*names: str) -> Callable[[Callable[[Node, int], _Changed]], Callable[[Node, int], _Changed]]:
    def known(rule: Callable[[Node, int], _Changed]) -> Callable[[Node, int], _Changed]:
        _RULES.update(dict.fromkeys(names, rule))
        return rule

    return known


def _without(node: Node, *names: str) -> dict[str, Any]:
    return {key: value for key, value in node.attributes.items() if key not in names}


@_rule("Upsample", "Resize")
def _resize(node: Node, opset: int) -> _Changed:
    """Both sample at output / scale, and of the nearest take the one before."""
    if node.op == "Upsample" and "scales" in node.attributes:  # before opset 9
        scales: str | np.ndarray = np.array(node.attributes["scales"], np.float32)
    elif len(node.inputs) == 2:
        scales = node.inputs[1]
    else:
        raise _refuse(node, f"It has {len(node.inputs)} inputs and no scales, and is of opset {opset}.")
    mode = str(node.attributes.get("mode", "nearest"))
    attributes = {"mode": "linear" if mode == "bilinear" else mode, "nearest_mode": "floor",
                  "coordinate_transformation_mode": "asymmetric"}  # fmt: skip
    return "Resize", attributes, [node.inputs[0], np.zeros(0, np.float32), scales]


@_rule("Clip")
def _clip(node: Node, opset: int) -> _Changed:
    bounds = [np.array(node.attributes[key], np.float32) if key in node.attributes else "" for key in ("min", "max")]
    while bounds and isinstance(bounds[-1], str):
        bounds.pop()
    return "Clip", _without(node, "min", "max"), [node.inputs[0], *bounds]


@_rule("Pad")
def _pad(node: Node, opset: int) -> _Changed:
    if "pads" not in node.attributes:
        raise _refuse(node, f"It has no pads, and is of opset {opset}.")
    value = np.array(node.attributes.get("value", 0.0), np.float32)
    return "Pad", _without(node, "pads", "value"), [node.inputs[0], np.array(node.attributes["pads"], np.int64), value]


@_rule("Slice")
def _slice(node: Node, opset: int) -> _Changed:
    if len(node.inputs) > 1:  # of opset 10
        return node.op, node.attributes, node.inputs
    if not {"starts", "ends"} <= node.attributes.keys():
        raise _refuse(node, f"It has no starts and ends, and is of opset {opset}.")
    starts = node.attributes["starts"]
    rows = (starts, node.attributes["ends"], node.attributes.get("axes", range(len(starts))))
    return "Slice", {}, [node.inputs[0], *(np.array(row, np.int64) for row in rows)]


@_rule("TopK")
def _top_k(node: Node, opset: int) -> _Changed:
    if len(node.inputs) > 1:  # of opset 10
        return node.op, node.attributes, node.inputs
    if "k" not in node.attributes:
        raise _refuse(node, f"It has no k, and is of opset {opset}.")
    return "TopK", _without(node, "k"), [node.inputs[0], np.array([node.attributes["k"]], np.int64)]


@_rule("Scatter")
def _scatter(node: Node, opset: int) -> _Changed:
    return "ScatterElements", node.attributes, node.inputs


@_rule("BatchNormalization")
def _batch_norm(node: Node, opset: int) -> _Changed:
    if not node.attributes.get("spatial", 1):  # before opset 9
        raise _refuse(node, "It has statistics for each position (spatial = 0), which later opsets have not.")
    return node.op, _without(node, "spatial"), node.inputs


def _refuse(node: Node, why: str) -> ConvertError:
    return ConvertError(f"The {node} cannot be brought to opset {LEAST}.", why, "Export the network for opset 17.")
