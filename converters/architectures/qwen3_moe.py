"""Qwen3's mixtures of experts: qwen3's block, its feed-forward one of many in most blocks (Yang et al. 2025)."""

from shoal.runtime.card import Card

from ..experts.names import NORM, Names
from ..graph import GraphBuilder
from . import decoder

MODEL_TYPES = ("qwen3_moe",)
EXPERTS = Names()


def card(config, source: str) -> Card:
    for flag in ("use_sliding_window", "attention_bias"):
        if config.flag(flag):
            config.refuse(f"{flag} is not supported for qwen3_moe")
    return decoder.decoder_card(config, source, qk_norm=True, **decoder.experts_card(config))


def tensors(card: Card) -> dict[str, tuple[int, ...]]:
    return decoder.decoder_tensors(card, norms=("input_layernorm", NORM), attention_norms=True, experts=EXPERTS)


def build(g: GraphBuilder, card: Card, blocks: range) -> None:
    decoder.build_routed(g, card, blocks, EXPERTS, head_norms=True)
