"""OLMoE: llama's block with an RMS norm on all heads of Q and of K together, and experts (Muennighoff et al. 2024)."""

from shoal.runtime.card import Card

from ..experts.names import NORM, Names
from ..graph import GraphBuilder
from . import decoder

MODEL_TYPES = ("olmoe",)
EXPERTS = Names()


def card(config, source: str) -> Card:
    if config.flag("attention_bias"):
        config.refuse("attention_bias is not supported for olmoe")
    if config.values.get("clip_qkv") is not None:
        config.refuse("clip_qkv is not supported")
    return decoder.decoder_card(config, source, **decoder.experts_card(config, ffn="intermediate_size"))


def tensors(card: Card) -> dict[str, tuple[int, ...]]:
    found = decoder.decoder_tensors(card, norms=("input_layernorm", NORM), experts=EXPERTS)
    for block in range(card.blocks):
        for part, heads in (("q", card.heads), ("k", card.kv_heads)):
            found[f"model.layers.{block}.self_attn.{part}_norm.weight"] = (heads * card.head_dim,)
    return found


def build(g: GraphBuilder, card: Card, blocks: range) -> None:
    decoder.build_routed(g, card, blocks, EXPERTS, row_norms=True)
