"""Qwen1.5's and Qwen2's mixtures of experts: qwen2's block, and beside the experts that a router chooses one that sees
every token, behind a sigmoid gate (Yang et al. 2024)."""

from shoal.runtime.card import Card

from ..experts.names import NORM, Names
from ..graph import GraphBuilder
from . import decoder

MODEL_TYPES = ("qwen2_moe",)
EXPERTS = Names()


def card(config, source: str) -> Card:
    if config.flag("use_sliding_window"):
        config.refuse("use_sliding_window is not supported")
    shared = config.integer("shared_expert_intermediate_size", high=1 << 20)
    experts = decoder.experts_card(config, shared_ffn=shared, shared_gate=True)
    return decoder.decoder_card(config, source, attention_bias=config.flag("qkv_bias", True), **experts)


def tensors(card: Card) -> dict[str, tuple[int, ...]]:
    return decoder.decoder_tensors(card, norms=("input_layernorm", NORM), experts=EXPERTS)


def build(g: GraphBuilder, card: Card, blocks: range) -> None:
    decoder.build_routed(g, card, blocks, EXPERTS)
