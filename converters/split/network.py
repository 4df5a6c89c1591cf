"""A graph of ONNX operators as a torch module: trained, cut in two, and written back to ONNX.

Weights are parameters, running means and variances of batch norms are buffers, and every value of the graph can be
asked for by its name, as features to distil. Halves share their weights with the whole. Imported only where something
is trained: it needs torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shoal.runtime.errors import ConvertError, UsageError

from . import operators_plain  # noqa: F401  its operators become known
from .graph import Graph, halves
from .operators import OPERATORS, At
from .write import fold, write

# Where a tensor is a weight; of those after it, one that holds more than a number
_WEIGHTS = {"Conv": (1, 2), "ConvTranspose": (1, 2), "Gemm": (0, 1, 2), "MatMul": (0, 1), "PRelu": (1,),
            "BatchNormalization": (1, 2), "InstanceNormalization": (1, 2), "GroupNormalization": (1, 2),
            "LayerNormalization": (1, 2), "Einsum": (0, 1)}  # fmt: skip
_OPERANDS = {"Add": (0, 1), "Sub": (0, 1), "Mul": (0, 1), "Div": (0, 1), "Gather": (0,), "Concat": range(99)}
_SAME = {"Identity", "Transpose", "Reshape", "Unsqueeze", "Squeeze", "Flatten", "Expand"}  # a weight stays one
# What is read as Python numbers, and so stays on the CPU
_NUMBERS = {
    "Clip": (1, 2),
    "Resize": (1, 2, 3),
    "Upsample": (1,),
    "Pad": (1, 2, 3),
    "Dropout": (1, 2),
    "Range": (0, 1, 2),
}


class Network(nn.Module):
    """`graph`, run node by node in torch; takes its inputs in order, with any batch, and gives the output, or a tuple
    of several. A node without an operator here is refused, by ConvertError, where something needs it, not earlier:
    what lies behind a cut may be written back without ever being run."""

    def __init__(self, graph: Graph, shared: "Network | None" = None):
        super().__init__()
        self.graph = graph
        self._keys: dict[str, str] = {}
        self._plain: dict[str, Tensor] = {}
        self._named: dict[str, str] = {}
        self._plans: dict[tuple[str, ...], tuple[list[int], list[list[str]]]] = {}
        read = {name for node in graph.nodes for name in node.inputs} | set(graph.outputs)
        self._at = [
            At(str(node), node.attributes, graph.opset, len(node.outputs), not read.isdisjoint(node.outputs[1:]))
            for node in graph.nodes
        ]
        weights, numbers = graph.weights or _weights(graph), _numbers(graph)
        for name, array in graph.tensors.items():
            key = name.replace(".", "/")
            if shared is not None and name in shared._plain:
                self._plain[name] = shared._plain[name]
            elif shared is not None and name in shared._keys:
                self._keys[name] = key = shared._keys[name]
                held = getattr(shared, key)
                if isinstance(held, nn.Parameter):
                    self.register_parameter(key, held)
                else:
                    self.register_buffer(key, held)
            elif array.dtype != np.float32 or name in numbers:
                self._plain[name] = torch.from_numpy(np.array(array))
            else:
                while hasattr(self, key):  # "a.b" and "a/b", or a name that a module has
                    key += "'"
                self._keys[name] = key
                tensor = torch.from_numpy(np.array(array))
                if name in weights:
                    self.register_parameter(key, nn.Parameter(tensor))
                else:
                    self.register_buffer(key, tensor)

    def forward(self, *inputs: Tensor) -> Any:
        found = self._run(self.graph.outputs, inputs)
        return found[0] if len(found) == 1 else tuple(found)

    def features(self, names: Sequence[str], *inputs: Tensor) -> dict[str, Tensor]:
        """The values of these names (as `Graph.value` has them, module paths included), and nothing that they do not
        need is computed. Raises ConvertError for an operator that is not known or a name that is not there."""
        for name in names:
            if name not in self._named:
                self._named[name] = self.graph.value(name)
        return dict(zip(names, self._run(tuple(self._named[name] for name in names), inputs), strict=True))

    def _run(self, wanted: tuple[str, ...], inputs: Sequence[Tensor]) -> list[Tensor]:
        if len(inputs) != len(self.graph.inputs):
            names = ", ".join(port.name for port in self.graph.inputs)
            why = f"It takes {names}, not {len(inputs)} tensors."
            raise UsageError("The network cannot be run.", why, "Give a tensor for each input.")
        steps, gone = self._plan(wanted)
        held: dict[str, Tensor] = {**self._plain, **{name: getattr(self, key) for name, key in self._keys.items()}}
        held |= {port.name: tensor for port, tensor in zip(self.graph.inputs, inputs, strict=True)}
        for step, over in zip(steps, gone, strict=True):
            node, at = self.graph.nodes[step], self._at[step]
            at.training = self.training
            try:
                made = OPERATORS[node.op](at, *(held[name] if name else None for name in node.inputs))
            except (RuntimeError, ValueError, IndexError, TypeError, OverflowError) as error:
                taken = ", ".join(str(tuple(held[name].shape)) for name in node.inputs if name)
                why = f"Its inputs are {taken}: {' '.join(str(error).split())[:300]}"
                raise ConvertError(f"The {node} fails.", why, "Give the network what it was made for.") from error
            held.update(zip(node.outputs, made if isinstance(made, (tuple, list)) else (made,), strict=False))
            for name in over:
                del held[name]
        return [held[name] for name in wanted]

    def trained(self) -> Graph:
        """The graph with the weights as they are now."""
        now = {name: getattr(self, key).detach().cpu().numpy().copy() for name, key in self._keys.items()}
        return replace(self.graph, tensors={**self.graph.tensors, **now})

    def _plan(self, wanted: tuple[str, ...]) -> tuple[list[int], list[list[str]]]:
        """Which nodes to run, and after each the values that nothing needs any longer."""
        if wanted in self._plans:
            return self._plans[wanted]
        needed, steps, gone = set(wanted), [], []
        for i in reversed(range(len(self.graph.nodes))):
            node = self.graph.nodes[i]
            if needed.isdisjoint(node.outputs):
                continue
            if node.op not in OPERATORS:
                why = f"Its operator is not known here; it reads {', '.join(map(repr, node.inputs))[:200]}."
                fix = "Export the network without it, or cut it and distil before that node."
                raise ConvertError(f"The {node} cannot be trained.", why, fix)
            gone.append([name for name in dict.fromkeys(node.inputs) if name and name not in needed])
            needed.update(name for name in node.inputs if name)
            steps.append(i)
        self._plans[wanted] = steps[::-1], gone[::-1]
        return self._plans[wanted]


def split(network: Network, cut: str) -> tuple[Network, Network]:
    """What makes the value `cut`, and what goes on from it; both with the network's own weights, so that training one
    trains the whole. Raises ConvertError where `cut` does not separate inputs from outputs, naming what prevents it."""
    head, tail = halves(network.graph, cut)
    return Network(head, network).train(network.training), Network(tail, network).train(network.training)


def export(
    module: nn.Module, example: Tensor | Sequence[Tensor], *, inputs: Sequence[str] = (), outputs: Sequence[str] = (),
    dims: Mapping[str, Sequence[int | str | None]] | None = None,
) -> bytes:  # fmt: skip
    """ModelProto bytes of a `Network` as it is trained, or of any torch module, as for inference: batch norms are
    folded into convolutions. The first axis of every input is open, the others are as in `example`, but for `dims` by
    the (new) name of an input. `inputs` and `outputs` rename those, in order. Raises ConvertError.
    """
    examples = [example] if isinstance(example, Tensor) else list(example)
    if isinstance(module, Network):
        graph = module.trained()
    else:
        from ..sources.torch_module import graph as traced

        graph = traced(module, examples)
    old = [port.name for port in graph.inputs]
    names = dict(zip(old, inputs or old, strict=True)) | dict(zip(graph.outputs, outputs or graph.outputs, strict=True))
    taken = {value for node in graph.nodes for value in node.outputs} | {*old, *graph.tensors}
    for new in taken.intersection(names.values()) - names.keys():  # another value has the new name
        names[new] = f"{new} inside"
    shapes: dict[str, Sequence[int | str | None]] = {
        name: (None, *tensor.shape[1:]) for name, tensor in zip(old, examples, strict=True)
    }
    back = {new: name for name, new in names.items()}
    shapes |= {back[name]: row for name, row in (dims or {}).items()}
    return write(fold(graph), dims=shapes, names=names)


def _weights(graph: Graph) -> set[str]:
    """The tensors that are trained, also where they are reshaped or transposed first."""
    found: set[str] = set()
    for node in reversed(graph.nodes):
        if node.op in _SAME and found.intersection(node.outputs):
            found.add(node.inputs[0])
        found.update(node.inputs[i] for i in _WEIGHTS.get(node.op, ()) if i < len(node.inputs))
        for i in _OPERANDS.get(node.op, ()):
            if i < len(node.inputs) and (node.inputs[i] not in graph.tensors or graph.tensors[node.inputs[i]].size > 1):
                found.add(node.inputs[i])
    return found & graph.tensors.keys()


def _numbers(graph: Graph) -> set[str]:
    return {node.inputs[i] for node in graph.nodes for i in _NUMBERS.get(node.op, ()) if i < len(node.inputs)}
