"""A torch module as a network: traced once, with an open batch, into the same graph that an ONNX file gives.

Tracing is torch.export's, which refuses what it cannot follow instead of recording one way through it. What a module at
a path ("blocks.2") gives is a value by that name. The parameters keep their names. How an operator of torch is
written in ONNX is in aten.py. Imported only where something is trained: it needs torch.
"""

import os
import traceback
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from shoal.runtime.errors import ConvertError
from shoal.runtime.session import Value

from ..split.graph import Cut, Graph, tidy
from ..split.graph import cuts as _cuts
from .aten import OPSET, Builder

if TYPE_CHECKING:
    from ..split.network import Network

_TORCH = os.path.dirname(str(torch.__file__))


def network(module: nn.Module, example: Tensor | Sequence[Tensor]) -> "Network":
    """`module` as a network that can be cut, with a copy of its weights (see split/network.py); `example` has the
    shapes of its inputs. Raises ConvertError where it cannot be traced, saying what prevents it."""
    from ..split.network import Network

    return Network(graph(module, example))


def cuts(
    module: nn.Module, example: Tensor | Sequence[Tensor], shapes: Mapping[str, Sequence[int]] | None = None
) -> list[Cut]:
    """Where `module` can be cut (see split/graph.py)."""
    return _cuts(graph(module, example), shapes)


def graph(module: nn.Module, example: Tensor | Sequence[Tensor]) -> Graph:
    """What `module` computes in eval, for any batch and otherwise for shapes as in `example`."""
    examples = [example] if isinstance(example, Tensor) else list(example)
    if any(not one.ndim for one in examples):
        raise ConvertError("The module cannot be traced.", "An example has no batch.", "Give tensors [n, ...].")
    # torch takes a length of 1 for a constant
    batch = max(2, *(one.shape[0] for one in examples))
    rows = tuple(one if one.shape[0] > 1 else one.expand(batch, *one.shape[1:]).contiguous() for one in examples)
    training = {part: part.training for part in module.modules()}
    try:
        module.eval()
        axes = tuple({0: torch.export.Dim.DYNAMIC} for _ in rows)
        with torch.no_grad():
            program = torch.export.export(module, rows, dynamic_shapes=axes)
    except Exception as error:  # torch's own, of many kinds
        raise _untraceable(error) from None
    finally:
        for part, was in training.items():
            part.training = was
    return _built(program)


def _built(program: Any) -> Graph:
    signature = program.graph_signature
    stored = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    lifted = signature.inputs_to_lifted_tensor_constants
    builder = Builder()
    inputs = []
    for node in program.graph.nodes:
        if node.op == "placeholder":
            if node.name in signature.user_inputs:
                shape = node.meta["val"].shape
                dtype = np.dtype(str(node.meta["val"].dtype).removeprefix("torch."))
                inputs.append(Value(node.name, dtype, (None, *(int(length) for length in shape[1:]))))
                builder.names[node] = node.name
                builder.batch = node.name
            else:
                name = stored.get(node.name) or lifted[node.name]
                held = program.state_dict.get(name)
                tensor = program.constants[name] if held is None else held
                builder.names[node] = builder.tensor(tensor.detach().cpu().numpy(), name)
        elif node.op == "call_function":
            builder.call(node)
        elif node.op != "output":
            why = f"It has a part {node.name!r} of the kind {node.op}."
            raise ConvertError("The module cannot be traced.", why, "Give a module of plain layers.")
    given = [builder.names.get(node) for node in _results(program)]
    outputs = tuple(name for name in given if isinstance(name, str))
    if len(set(outputs)) != len(given):
        raise ConvertError("The module cannot be traced.", "Its outputs are not tensors, each its own.", "Change them.")
    made = Graph(tuple(builder.nodes), tuple(inputs), outputs, builder.tensors, OPSET,
                 _paths(program, builder.names), frozenset(signature.inputs_to_parameters.values()))  # fmt: skip
    return tidy(made)


def _results(program: Any) -> list[Any]:
    (output,) = (node for node in program.graph.nodes if node.op == "output")
    by_name = {node.name: node for node in program.graph.nodes}
    return [by_name.get(str(name)) for name in program.graph_signature.user_outputs] if output else []


def _paths(program: Any, names: Mapping[Any, Any]) -> dict[str, str]:
    """The value that leaves each module, by its path: of those that are called once and give one value. Of two paths to
    one value the shorter comes later."""
    calls: dict[str, set[str]] = {}
    leaving: dict[str, set[str]] = {}
    for node in program.graph.nodes:
        inside = {path: key for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items() if path}
        for path, key in inside.items():
            calls.setdefault(path, set()).add(key)
            users = [{path for path, _ in (user.meta.get("nn_module_stack") or {}).values()} for user in node.users]
            if isinstance(names.get(node), str) and any(path not in user for user in users):
                leaving.setdefault(path, set()).add(names[node])
    found = {path: min(values) for path, values in leaving.items() if len(values) == 1 and len(calls[path]) == 1}
    return dict(sorted(found.items(), key=lambda item: (-item[0].count("."), item[0])))


def _untraceable(error: Exception) -> ConvertError:
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(_TORCH)]
    where = f" at {os.path.basename(frames[-1].filename)}:{frames[-1].lineno} ({frames[-1].line})" if frames[1:] else ""
    fix = "Make its forward depend on shapes only, not on the batch or on values; or give the network as an ONNX file."
    return ConvertError("The module cannot be traced.", f"torch says{where}: {said[:300]}", fix)
