"""Stacked bundles made of integer ones: every product becomes a matrix of a stack, its steps blocks and rungs.

A decomposition good enough to tell steps apart: the signs of what is left, and its size as a product of marginals.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import shoal
from shoal.converters.quantize import rtn
from shoal.converters.recipe import Format
from shoal.runtime.bitstack.layout import Index, Stacked, StackFormat, Step, add, header, pack
from shoal.runtime.bundle import Bundle, create
from shoal.runtime.kernels import layout
from shoal.runtime.kernels.layout import LinearFormat, dequantize, rotate, unpack

OPERATORS = {"QuantizedLinear": "StackedLinear", "QuantizedRows": "StackedRows"}


def block(format: StackFormat, left: np.ndarray) -> bytearray:
    """A block of `left` fp32 [outputs, inputs], which it is taken away from."""
    size = np.abs(left)
    v = size.mean(0, keepdims=True)
    u = size.mean(1, keepdims=True) / max(size.mean(), 1e-12)
    made = pack(format, u.astype(np.float16), v.astype(np.float16), left > 0)
    part = np.zeros_like(left)
    add(format, made, part)
    left -= part
    return made


def noise(format: StackFormat, at: int, random: np.random.Generator) -> bytearray:
    """A block of random signs, fast to make whatever the size; its weights have the size of a trained matrix's."""
    data = np.zeros(format.payload_bytes, np.uint8)
    v, u = (data[start:].view(np.float16) for start in (0, format.u_at))
    v[: format.inputs] = random.uniform(0.5, 1.5, format.inputs) * 0.3 / format.inputs**0.5
    u[: format.outputs] = random.uniform(0.5, 1.5, format.outputs) * 0.5**at
    data[format.signs_at :] = np.frombuffer(random.bytes(len(data) - format.signs_at), np.uint8)
    return bytearray(data)


def payloads_of(weights: np.ndarray, steps: tuple[Step, ...]) -> list[bytes]:
    """The payloads of a matrix fp32 [outputs, inputs], in the rotated domain where the steps are."""
    made, left = [], weights.astype(np.float32)
    for step in steps:
        if isinstance(step, StackFormat):
            made.append(bytes(block(step, left)))
            continue
        codes = rtn.quantize(weights.astype(np.float32), Format(step.bits, step.group, step.span))
        made.append(layout.pack(step, codes).tobytes())
        plain = LinearFormat(step.inputs, step.outputs, step.bits, step.group, step.span)
        left = weights - dequantize(plain, codes)
    return made


def index_of(matrices: list[Stacked]) -> Index:
    """Step by step, every matrix once a round; the first round is the floor."""
    most = max(len(one.steps) for one in matrices)
    order = [at for step in range(most) for at, one in enumerate(matrices) if step < len(one.steps)]
    return Index(tuple(matrices), tuple(order), len(matrices), "rounds")


def entries_of(index: Index, payloads: list[list[bytes]]) -> bytes:
    """The section "blocks"."""
    out = bytearray()
    for entry in index.entries():
        payload, step = payloads[entry.matrix][entry.step], index.matrices[entry.matrix].steps[entry.step]
        out += header(entry.matrix, entry.step, step, payload) + payload
    return bytes(out)


def stacked_bundle(
    source: Path, out: Path, steps: Callable[[LinearFormat], list], random: bool = False, alignment: int = 4096,
    change: Callable[[Index, bytes], tuple] = lambda index, data: (index.to_json(), data),
) -> Path:  # fmt: skip
    """`source`, a bundle of integer products, with its one graph stacked; `steps` says what a matrix becomes: 1 for a
    block of that rank, or a LinearFormat; nothing leaves it as it is. `change` is told the index and the entries' bytes
    and says the sections'."""
    with Bundle.open(source) as bundle, create(out, overwrite=True) as writer:
        graph = next(graph for graph in bundle.graphs if graph.name in ("decode", "embed", "part"))
        model = onnx.load_model_from_string(bundle.bytes(bundle.section("graph", graph.section)))
        weights = bundle.view(bundle.section("weights", "weights"))
        tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        numbers = np.random.default_rng(0)
        found: dict[str, int] = {}
        matrices: list[Stacked] = []
        payloads: list[list[bytes]] = []
        for node in model.graph.node:
            if node.op_type not in OPERATORS:
                continue
            integers = {item.name: item.i for item in node.attribute if item.type == onnx.AttributeProto.INT}
            linear = LinearFormat(**{field: integers[field] for field in LinearFormat.__dataclass_fields__})
            name, shape = node.input[1], (linear.inputs, linear.outputs)
            if name not in found and not steps(linear):
                continue
            if name not in found:
                found[name] = len(matrices)
                made = tuple(StackFormat(*shape, one, linear.rotated) if isinstance(one, int) else one
                             for one in steps(linear))  # fmt: skip
                matrices.append(Stacked(name, *shape, linear.rotated, made))
                if random:
                    payloads.append([bytes(noise(one, at, numbers)) for at, one in enumerate(made)])
                else:
                    place = {entry.key: entry.value for entry in tensors[name].external_data}
                    data = weights[int(place["offset"]) :][: int(place["length"])]
                    whole = dequantize(linear, unpack(linear, data))
                    payloads.append(payloads_of(rotate(whole) if linear.rotated else whole, made))
            kept = [item for item in node.attribute if item.name not in ("bits", "group", "span")]
            inputs = [node.input[0], "stack", *node.input[2:]]
            del node.attribute[:], node.input[:]
            kept += [helper.make_attribute(*item) for item in (("matrix", found[name]), ("rank", 1))]
            node.attribute.extend(kept)
            node.input.extend(inputs)
            node.op_type = OPERATORS[node.op_type]
        model.graph.input.append(helper.make_tensor_value_info("stack", TensorProto.INT64, [1]))
        for name in found:
            model.graph.initializer.remove(tensors[name])
        index = index_of(matrices)
        listed, data = change(index, entries_of(index, payloads))
        for section in bundle.sections:
            if section.kind != "graph":
                writer.add(section.kind, section.name, bundle.view(section), alignment=section.alignment)
        writer.add("graph", graph.section, model.SerializeToString(), alignment=64)
        writer.add("stack", "index", listed, alignment=64, required=True)
        writer.add("stack", "blocks", data, alignment=alignment, required=True)
        writer.graph(graph)
        writer.commit()
    return out


def _mixed(linear: LinearFormat) -> list[Step | int]:
    if linear.outputs < 100:
        return [1, 1, 1, 1]
    low, high = (Format(bits, 32).layout(linear.inputs, linear.outputs) for bits in (2, 4))
    low, high = (LinearFormat(*list(vars(one).values())[:5], linear.rotated) for one in (low, high))
    return [low, 1, high, 1, 1]


@pytest.fixture(scope="session")
def mixed() -> Callable:
    """Steps for `make_stack`: of wide matrices rungs of 2 and 4 bits with blocks on top, of others blocks alone."""
    return _mixed


@pytest.fixture(scope="session")
def int8_bundle(tiny_folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("stack") / "int8.shoal"
    shoal.convert(tiny_folder, out, "int8", check_parity=False)
    return out


@pytest.fixture(scope="session")
def tiny_stack(int8_bundle, tmp_path_factory) -> Path:
    """The tiny llama as a stack of blocks and, of wide matrices, rungs."""
    return stacked_bundle(int8_bundle, tmp_path_factory.mktemp("stack") / "tiny.shoal", _mixed)


@pytest.fixture(scope="session")
def make_stack() -> Callable:
    """stacked_bundle(source, out, steps, ...)."""
    return stacked_bundle


@pytest.fixture(scope="session")
def smollm2_stack(smollm2_bundle, tmp_path_factory) -> Path:
    """SmolLM2's shapes with a stack of 8 random blocks a matrix, 109 MB, but for the table that is the head."""
    out = tmp_path_factory.mktemp("stack") / "smollm2.shoal"
    return stacked_bundle(smollm2_bundle, out, lambda linear: [1] * 8 if linear.outputs < 9999 else [], random=True)
