"""What prefill in fixed chunks adds to a bundle (runtime/static/layout.py): matrices, graphs, the index.

Its matrices lie in a section of their own, rows by inputs, so that a shadow reads few of them; every graph of every
chunk length points there, and for norms, biases and the head at what the bundle has already.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np

from shoal.runtime.bundle import Graph
from shoal.runtime.bundle.layout import MAX_GRAPHS, MAX_SECTIONS
from shoal.runtime.bundle.write import Writer
from shoal.runtime.card import Card
from shoal.runtime.errors import ConvertError
from shoal.runtime.events import Event, Progress, silent
from shoal.runtime.kernels.layout import BLOCK, rotate
from shoal.runtime.static import layout
from shoal.runtime.static.layout import Attend, Call, Shadow, Step

from ..graph import GraphBuilder
from ..recipe import NAMED, Recipe, Static
from ..walk import Scratch, Walk
from ..weights import ALIGNMENT, Sink, Stored, Weights
from .graphs import Attention, Cut, Names, Part, Recorder, attention, cut, part
from .scales import Fit, Seen, even, round_weights, with_shadow, without_shadow

KINDS = ("fp32", "fp16", "int8")  # of caches
_SHADOW = ".shadow"  # behind a value's name: what its shadow gives
_SPARE = 64  # entries of a bundle that other parts may want


@dataclass(frozen=True)
class Product:
    """A product's matrix int8 [inputs, outputs] and its scales fp32 [outputs], also as shares of the `top` one; and how
    its input is rounded with and without a shadow."""

    matrix: Stored
    scales: Stored
    shares: Stored
    top: float
    shadow: Fit
    alone: Fit

    @property
    def importance(self) -> float:
        """What leaving the shadow out costs: squared error of the product, relative to its output."""
        return max(0.0, self.alone.error - self.shadow.error)


def refuse(card: Card, recipe: Recipe) -> None:
    """Raises ConvertError for a model that cannot be prefilled so."""
    why = ""
    if card.task != "generate":
        why = f"it does not generate ({card.model_type})"
    elif card.is_part:
        why = "it is a part of a model"
    elif card.experts:
        why = "its products are of experts that a router chooses"
    if why:
        raise ConvertError(
            f"The recipe {recipe.name!r} cannot be used.", f"It has static graphs for fixed chunks, and of this model "
            f"there are none: {why}.", "Name another recipe.",
        )  # fmt: skip


def add(
    writer: Writer, architecture: ModuleType, card: Card, weights: Weights, chosen: Static, rows: np.ndarray,
    cache_scales: np.ndarray, folder: Path, progress: Progress = silent,
) -> dict[str, bytes]:  # fmt: skip
    """Adds all of it, and returns the device's graphs by their names. `weights` hold the decode graph's; `rows` int64
    [rows, length] are calibration text; `cache_scales` an int8 cache's. Scratch files lie in `folder`, one at a time.
    Raises ConvertError for a model of too many blocks."""
    products: dict[Names, Product] = {}
    own: dict[Names, Stored] = {}
    with writer.section("weights", layout.SECTION, alignment=4096) as sink:
        turn = _write(sink, "rotation", rotate(np.eye(BLOCK, dtype=np.float32))) if chosen.rotate else None
        recorder = Recorder(card, weights, chosen.bits == 8, turn)
        architecture.build(recorder, card, card.span)
        if chosen.bits == 8:
            products = _round(architecture, card, weights, sink, rows, recorder, folder, progress)
        else:
            own = _exact(recorder, weights, sink)
    ranked = sorted(products, key=lambda names: -products[names].importance)
    shadowed = set(ranked[: round(chosen.shadow * len(ranked))])
    found = cut(recorder, shadowed)
    graphs = sum(isinstance(step, Part) for step in found.steps) * len(chosen.chunks) + card.blocks * len(KINDS)
    if graphs + _SPARE > min(MAX_GRAPHS, MAX_SECTIONS):
        raise ConvertError(
            f"The model's {card.blocks} blocks cannot be cut into static graphs.",
            f"They would be {graphs}, and a bundle has at most {min(MAX_GRAPHS, MAX_SECTIONS)} of all kinds.",
            "Name fewer chunks in the recipe, or keep fewer shadows.",
        )

    def emit(g: GraphBuilder, names: Names, x, bias):
        if names in own:
            return g.op("Gemm", x, g.external(own[names]), bias, transB=1)
        one = products[names]
        return _product(g, one, one.shadow if names in shadowed else one.alone, x, bias, chosen.backend)

    steps = _steps(recorder, found, products, shadowed)
    taken = {step.name: set(step.takes) for step in steps if isinstance(step, Call)}
    parts = [step for step in found.steps if isinstance(step, Part)]
    made: dict[str, bytes] = {}
    for at, one in enumerate(parts):
        progress(Event("static", at, len(parts), one.name, "graphs"))
        both = {name + _SHADOW for name in one.takes.values()} & taken[one.name]
        shadows = {name.removesuffix(_SHADOW): name for name in sorted(both)}
        for chunk in chosen.chunks:
            name = layout.graph_name(one.name, chunk)
            made[name] = part(recorder, one, chunk, shadows, found.widths, emit)
            writer.add("graph", name, made[name])
            writer.graph(Graph(name, layout.STATIC, chosen.backend, chunk, one.block, one.last + 1, name))
    progress(Event("static", len(parts), len(parts), "", "graphs"))
    _attentions(writer, recorder, found, cache_scales)
    for name, g in recorder.ends.items():
        at = 0 if name == "embed" else card.blocks
        writer.add("graph", name, g.serialize())
        writer.graph(Graph(name, layout.PREFILL, "cpu", 0, at, at, name))
    widths = found.widths | {step.gives: step.outputs for step in steps if isinstance(step, Shadow)}
    index = layout.Static(chosen.backend, chosen.chunks, widths, tuple(steps), found.stream, "head")
    writer.add(layout.KIND, "index", index.to_json())
    return made


def _steps(recorder: Recorder, found: Cut, products: Mapping[Names, Product], shadowed: set[Names]) -> list[Step]:
    steps: list[Step] = [Call("embed", 0, (layout.TOKENS,), (found.first,), device=False)]
    shadows: set[str] = set()  # values that have one now

    def both(values) -> tuple[str, ...]:
        return tuple(name for value in values for name in (value, value + _SHADOW)[: 1 + (value in shadows)])

    for step in found.steps:
        if isinstance(step, Attention):
            steps.append(Attend(f"attend.{step.block}", step.block, both([step.takes]), step.gives))
            continue
        steps.append(Call(step.name, step.block, both(step.takes.values()), tuple(step.gives.values())))
        names = recorder.products.get(step.nodes[0])
        if names in shadowed:
            one = products[names]
            (x,), (y,) = step.takes.values(), step.gives.values()
            shadows.add(y)
            inputs, outputs = one.matrix.shape
            steps.append(Shadow(
                step.block, x, y + _SHADOW, one.shadow.scale, inputs, outputs, one.matrix.offset, one.scales.offset,
                one.shadow.hot, one.importance,
            ))  # fmt: skip
        else:
            shadows.difference_update(step.gives.values())
    return steps


def _attentions(writer: Writer, recorder: Recorder, found: Cut, scales: np.ndarray) -> None:
    """The attentions' graphs; equal ones share a section."""
    sections: dict[bytes, str] = {}
    for step in found.steps:
        if not isinstance(step, Attention):
            continue
        for kind in KINDS:
            name = f"attend.{step.block}" + ("" if kind == "fp32" else f".{kind}")
            data = attention(recorder, step, found.widths[step.takes], kind, scales)
            if data not in sections:
                sections[data] = name
                writer.add("graph", name, data)
            writer.graph(Graph(name, layout.PREFILL, "cpu", 0, step.block, step.block + 1, sections[data]))


def _round(
    architecture: ModuleType, card: Card, weights: Weights, sink: Sink, rows: np.ndarray, recorder: Recorder,
    folder: Path, progress: Progress,
) -> dict[Names, Product]:  # fmt: skip
    """Rounds the blocks' matrices to `sink`, with scales of their inputs as `rows` show them: a block runs once in fp32
    with the input of every product tapped, on what exact blocks before it give; what `recorder` does to it is done."""
    walk, found = Walk(architecture, card, rows), {}
    exact = NAMED["fp32"]
    for block in range(card.blocks):
        progress(Event("outliers", block, card.blocks, f"block {block}", "blocks"))
        one = range(block, block + 1)
        seen: dict[Names, Seen] = {}
        with Scratch(weights.source, folder, exact, weights.factors) as scratch:
            for inputs in walk.inputs(one, scratch):
                for names, x in inputs.items():
                    x = even(x) if names in recorder.evened else x
                    x = rotate(x) if names in recorder.turned else x
                    seen.setdefault(names, Seen()).add(x, len(rows))
            if block + 1 < card.blocks:
                walk.advance(one, scratch)
        for names in seen:
            found[names] = _keep(weights, sink, names, seen[names], names in recorder.turned)
    progress(Event("outliers", card.blocks, card.blocks, "", "blocks"))
    return found


def _keep(weights: Weights, sink: Sink, names: Names, seen: Seen, turned: bool) -> Product:
    matrix = np.concatenate(list(weights.slices(tuple(f"{name}.weight" for name in names))))
    codes, scales = round_weights(rotate(matrix) if turned else matrix)
    rounded = codes * scales[:, None]
    top = float(scales.max())
    shares = scales / np.float32(top)

    def keep(suffix: str, array: np.ndarray) -> Stored:
        return _write(sink, f"{names[0]}.{suffix}", array)

    return Product(
        keep("int8", codes.T), keep("scales", scales), keep("shares", shares), top,
        with_shadow(seen, rounded, shares), without_shadow(seen, rounded, shares),
    )  # fmt: skip


def _exact(recorder: Recorder, weights: Weights, sink: Sink) -> dict[Names, Stored]:
    """The blocks' matrices in fp32 [outputs, inputs]: the decode graph's where it has them so."""
    found = {}
    for names in recorder.products.values():
        tensors = tuple(f"{name}.weight" for name in names)
        stored = weights.matrix(tensors).values
        if stored is None or stored.dtype != "float32":
            stored = _write(sink, f"{names[0]}.exact", np.concatenate(list(weights.slices(tensors))))
        found[names] = stored
    return found


def _write(sink: Sink, name: str, array: np.ndarray) -> Stored:
    sink.write(bytes(-sink.tell() % ALIGNMENT))
    start, array = sink.tell(), np.ascontiguousarray(array)
    sink.write(array)
    return Stored(name, array.dtype.name, array.shape, start, array.nbytes, layout.SECTION)


def _product(g: GraphBuilder, one: Product, fit: Fit, x, bias, backend: str):
    """x, rounded and clipped to 8 bits, times the matrix, and `bias` added.

    For the CPU in its own operator, whose output is in fp32. Others want to see QuantizeLinear and DequantizeLinear
    around MatMul; QNN's HTP takes the matrix with one scale only, so that the channels' shares of it are multiplied
    behind, and 16 bits where the product leaves the matrix unit.
    """
    scale = g.constant(np.float32(fit.scale), np.float32)
    zero = g.constant(np.uint8(128), np.uint8)
    codes = g.op("QuantizeLinear", x, scale, zero)
    matrix = g.external(one.matrix)
    if backend == "cpu":
        return g.op(
            "MatMulIntegerToFloat", codes, matrix, scale, g.external(one.scales), zero, None, bias,
            domain="com.microsoft",
        )  # fmt: skip
    x = g.op("DequantizeLinear", codes, scale, zero)
    top, none = g.constant(np.float32(one.top), np.float32), g.constant(np.int8(0), np.int8)
    y = g.op("MatMul", x, g.op("DequantizeLinear", matrix, top, none))
    # Before the shares are multiplied, what is given may be larger
    step = g.constant(np.float32(fit.most / 32767), np.float32)
    middle = g.constant(np.uint16(32768), np.uint16)
    y = g.op("DequantizeLinear", g.op("QuantizeLinear", y, step, middle), step, middle)
    y = g.op("Mul", y, g.external(one.shares))
    return y if bias is None else g.op("Add", y, bias)
