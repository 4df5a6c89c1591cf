"""Qwen3: llama's block with an RMS norm on each head of Q and K before they are rotated (Yang et al. 2025)."""

from shoal.runtime.card import Card

from ..graph import GraphBuilder
from . import decoder

MODEL_TYPES = ("qwen3",)


def card(config, source: str) -> Card:
    if config.flag("use_sliding_window"):
        config.refuse("use_sliding_window is not supported")
    return decoder.decoder_card(config, source, attention_bias=config.flag("attention_bias"), qk_norm=True)


def tensors(card: Card) -> dict[str, tuple[int, ...]]:
    norms = ("input_layernorm", "post_attention_layernorm")
    return decoder.decoder_tensors(card, norms=norms, attention_norms=True)


def build(g: GraphBuilder, card: Card, blocks: range) -> None:
    step = decoder.begin(g, card, blocks, "model.embed_tokens.weight")
    for block in blocks:
        prefix = f"model.layers.{block}"
        g.scope(f"{block}/attention")
        norms = (step.weight(f"{prefix}.self_attn.q_norm"), step.weight(f"{prefix}.self_attn.k_norm"))
        step.x = decoder.attention(step, f"{prefix}.self_attn", block, f"{prefix}.input_layernorm", norms, step.x)
        g.scope(f"{block}/mlp")
        step.x = decoder.feed_forward(step, f"{prefix}.mlp", f"{prefix}.post_attention_layernorm", residual=step.x)
    decoder.end(step, blocks, "model.norm", "model.embed_tokens.weight" if card.tied else "lm_head.weight")
