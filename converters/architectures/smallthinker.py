"""SmallThinker: a router that reads the stream that enters a block, so that the experts it chooses can be read while
attention runs; ReLU-gated experts, and blocks that see a window or no positions (Song et al. 2025)."""

import dataclasses

from shoal.runtime.card import Card, Rope

from ..experts.names import NORM, Names
from ..graph import GraphBuilder
from . import decoder

MODEL_TYPES = ("smallthinker",)
_MOE = "block_sparse_moe"
EXPERTS = Names(
    f"{_MOE}.primary_router", f"{_MOE}.experts.{{}}.gate", f"{_MOE}.experts.{{}}.up", f"{_MOE}.experts.{{}}.down"
)


def card(config, source: str) -> Card:
    blocks = config.integer("num_hidden_layers", high=1024)
    rotated, windowed = _layout(config, "rope_layout", 1, blocks), _layout(config, "sliding_window_layout", 0, blocks)
    window = config.integer("sliding_window_size", 4096, high=1 << 28) if any(windowed) else 0
    _refuse_others(config, blocks)
    softmax = config.flag("moe_primary_router_apply_softmax")
    width = config.integer("moe_ffn_hidden_size", high=1 << 20)
    experts = decoder.experts_card(
        config, experts="moe_num_primary_experts", ffn="moe_ffn_hidden_size", expert_activation="relu", normalised=True,
        routing="softmax" if softmax else "sigmoid", early_routing=True,
        top_k=config.integer("moe_num_active_primary_experts", high=1024),
    )  # fmt: skip
    found = decoder.decoder_card(
        config, source, activation="silu", ffn=width, windows=tuple(window * seen for seen in windowed),
        rope_of=tuple(1 - turned for turned in rotated), **experts,
    )  # fmt: skip
    still = Rope((0.0,) * len(found.ropes[0].inverse_frequencies))  # turns nothing
    return dataclasses.replace(found, ropes=(*found.ropes, still))


def _layout(config, key: str, default: int, blocks: int) -> list[int]:
    """One 0 or 1 a block."""
    found = config.values.get(key, [default] * blocks)
    if not isinstance(found, list) or len(found) != blocks or any(value not in (0, 1) for value in found):
        config.refuse(f"{key} is {found!r:.60}, not one 0 or 1 for each of {blocks} blocks")
        return [default] * blocks
    return [int(value) for value in found]


def _refuse_others(config, blocks: int) -> None:
    """What the family's first configurations name and no published model has."""
    if not all(_layout(config, "moe_layer_layout", 1, blocks)):
        config.refuse("blocks without experts (moe_layer_layout) are not supported")
    if config.values.get("moe_enable_early_router") is False:
        config.refuse("a router after attention (moe_enable_early_router) is not supported")
    for key in ("use_qk_norm", "moe_shared_primary_experts", "moe_enable_secondary_experts"):
        if config.values.get(key):
            config.refuse(f"{key} is not supported")


def tensors(card: Card) -> dict[str, tuple[int, ...]]:
    return decoder.decoder_tensors(card, norms=("input_layernorm", NORM), experts=EXPERTS)


def build(g: GraphBuilder, card: Card, blocks: range) -> None:
    decoder.build_routed(g, card, blocks, EXPERTS)
