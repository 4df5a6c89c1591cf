"""Llama and its kin: SmolLM2, TinyLlama, Llama 2 and 3. Pre-norm blocks, rotary attention, SiLU-gated feed-forward
(Touvron et al. 2023)."""

from shoal.runtime.card import Card

from ..graph import GraphBuilder
from . import decoder

MODEL_TYPES = ("llama",)


def card(config, source: str) -> Card:
    if config.flag("attention_bias"):
        config.refuse("attention_bias is not supported for llama")
    return decoder.decoder_card(config, source)


def tensors(card: Card) -> dict[str, tuple[int, ...]]:
    return decoder.decoder_tensors(card, norms=("input_layernorm", "post_attention_layernorm"))


def build(g: GraphBuilder, card: Card, blocks: range) -> None:
    step = decoder.begin(g, card, blocks, "model.embed_tokens.weight")
    for block in blocks:
        prefix = f"model.layers.{block}"
        g.scope(f"{block}/attention")
        step.x = decoder.attention(step, f"{prefix}.self_attn", block, f"{prefix}.input_layernorm", residual=step.x)
        g.scope(f"{block}/mlp")
        step.x = decoder.feed_forward(step, f"{prefix}.mlp", f"{prefix}.post_attention_layernorm", residual=step.x)
    decoder.end(step, blocks, "model.norm", "model.embed_tokens.weight" if card.tied else "lm_head.weight")
