"""A mixture of experts in the place of a block's feed-forward, as operators (Shazeer et al. 2017).

A router gives each expert a logit; the best of them see the token and are added up by weights that the logits make.
Experts in integers are one operator over the store of records; in fp32 they are ordinary matrices and the graph says
the same in standard operators, which is what everything else is compared with. Experts that shared input, zero, copy or
constant (Jin et al. 2024, MoE++) are ordinary operators either way. It knows nothing about families or files.
"""

import onnx_ir as ir

from shoal.runtime.card import Card
from shoal.runtime.kernels import DOMAIN as KERNELS

from ..graph import ACTIVATIONS, GraphBuilder
from .names import Names


def route(
    g: GraphBuilder, card: Card, block: int, names: Names, x: ir.Value, before: ir.Value | None = None
) -> ir.Value:
    """The router's logits fp32 [.., total] of x [.., hidden]; `before` are those of the router before, which a gating
    residual adds a product of."""
    prefix = f"model.layers.{block}"
    residual = None
    if before is not None:
        residual = g.linear(f"{prefix}.{names.residual}", before, role="router")
    return g.linear(f"{prefix}.{names.router}", x, role="router", residual=residual)


def start_reads(g: GraphBuilder, card: Card, block: int, names: Names, x: ir.Value, logits: ir.Value) -> ir.Value:
    """x, unchanged: whatever depends on it comes after the store was told which experts the block is going to need."""
    if not _stored(g, names, block):
        return x
    return g.op(
        "RouteExperts", x, logits, g.handle("experts"), domain=KERNELS, layer=card.routed_blocks.index(block),
        experts=card.experts, total=card.total_experts, top_k=card.top_k, sigmoid=int(card.routing == "sigmoid"),
    )  # fmt: skip


def mixture(
    g: GraphBuilder, card: Card, block: int, names: Names, x: ir.Value, logits: ir.Value, residual: ir.Value
) -> ir.Value:
    """What all that see a token give, for x [.., hidden], which is normed, and the router's logits [.., total];
    `residual` is added to it."""
    if card.shared_ffn:
        residual = g.op("Add", residual, _shared(g, card, block, names, x))
    make = _from_store if _stored(g, names, block) else _in_standard_operators
    y, gates = make(g, card, block, names, x, logits, residual)
    g.keep("inputs", x, card.hidden)
    g.keep("gates", gates, card.total_experts)
    return _special(g, card, block, names, x, gates, y)


def _stored(g: GraphBuilder, names: Names, block: int) -> bool:
    """Whether the experts lie in the store of records."""
    return g.weights.recipe.format(f"{names.expert(block, 0)[0]}.weight", "experts").bits < 32


def _from_store(g, card: Card, block: int, names: Names, x, logits, residual) -> tuple[ir.Value, ir.Value]:
    y, gates = g.op(
        "Experts", x, logits, g.handle("experts"), residual, count=2, domain=KERNELS,
        layer=card.routed_blocks.index(block), experts=card.experts, total=card.total_experts, top_k=card.top_k,
        normalised=int(card.normalised), sigmoid=int(card.routing == "sigmoid"), equal=int(card.routing == "equal"),
        scale=float(card.routed_scale),
        activation=ACTIVATIONS[card.expert_activation], hidden=card.hidden, ffn=card.expert_ffn,
    )  # fmt: skip
    return y, gates


def _in_standard_operators(g, card: Card, block: int, names: Names, x, logits, residual) -> tuple[ir.Value, ir.Value]:
    """An expert takes the rows that chose it, weighs what it gives, and adds it where they were."""
    gates = _gates(g, card, logits)
    rows, flat = (g.op("Reshape", value, g.constant([-1, width]))
                  for value, width in ((x, card.hidden), (gates, card.total_experts)))  # fmt: skip
    y = g.op("Reshape", residual, g.constant([-1, card.hidden]))
    for expert in range(card.experts):
        gate, up, down = names.expert(block, expert)
        weight = g.op("Gather", flat, g.constant([expert]), axis=1)  # [rows, 1]
        which = g.op("Gather", g.op("NonZero", weight), g.constant([0]), axis=0)  # [1, chosen]
        which = g.op("Transpose", which, perm=[1, 0])
        seen = g.op("GatherND", rows, which)
        given = g.gated((gate, up), seen, card.expert_activation, "", None, role="experts")
        given = g.op("Mul", g.linear(down, given, role="experts"), g.op("GatherND", weight, which))
        y = g.op("ScatterND", y, which, given, reduction="add")
    return g.op("Reshape", y, g.op("Shape", x)), gates


def _gates(g: GraphBuilder, card: Card, logits: ir.Value) -> ir.Value:
    """The weight fp32 [.., total] that each expert gets, 0 where it was not chosen. Of equals the first is chosen."""
    scores = g.op("Sigmoid", logits) if card.routing == "sigmoid" else g.op("Softmax", logits, axis=-1)
    best, ids = g.op("TopK", scores, g.constant([card.top_k]), count=2, axis=-1, largest=1, sorted=1)
    if card.routing == "equal":
        best = g.op("Expand", g.constant(1, "float32"), g.op("Shape", best))
    elif card.normalised:
        best = g.op("Div", best, g.op("ReduceSum", best, g.constant([-1]), keepdims=1))
    if card.routed_scale != 1.0:
        best = g.op("Mul", best, g.constant(card.routed_scale, "float32"))
    none = g.op("Expand", g.constant(0, "float32"), g.op("Shape", logits))
    return g.op("ScatterElements", none, ids, best, axis=-1)


def _shared(g: GraphBuilder, card: Card, block: int, names: Names, x: ir.Value) -> ir.Value:
    """What the expert that sees every token gives."""
    prefix = f"model.layers.{block}.{names.shared}"
    # The norm before it is the router's too, so that no factor may move into these columns
    y = g.gated((f"{prefix}.gate_proj", f"{prefix}.up_proj"), x, card.expert_activation, "", None)
    y = g.linear(f"{prefix}.down_proj", y, after=f"{prefix}.up_proj")
    if not card.shared_gate:
        return y
    return g.op("Mul", y, g.op("Sigmoid", g.linear(f"model.layers.{block}.{names.shared_gate}", x, role="router")))


def _special(g: GraphBuilder, card: Card, block: int, names: Names, x, gates, y: ir.Value) -> ir.Value:
    """y and what the experts that have no matrices give: those of zeros nothing."""
    first = card.experts + card.zero_experts
    if card.copy_experts:
        ids = g.constant(list(range(first, first + card.copy_experts)))
        share = g.op("ReduceSum", g.op("Gather", gates, ids, axis=-1), g.constant([-1]), keepdims=1)
        y = g.op("Add", y, g.op("Mul", x, share))
    for index in range(card.constant_experts):
        name = f"model.layers.{block}.{names.constant.format(index)}"
        mix = g.op("Softmax", g.linear(name, x, role="router"), axis=-1)
        share = g.op("Mul", mix, g.op("Gather", gates, g.constant([first + card.copy_experts + index]), axis=-1))
        own, value = g.op("Split", share, count=2, axis=-1, num_outputs=2)
        y = g.op("Add", y, g.op("Mul", x, own))
        y = g.op("Add", y, g.op("Mul", g.plain(f"{name}.value"), value))
    return y
