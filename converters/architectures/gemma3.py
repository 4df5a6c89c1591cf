"""Gemma 3 (text): norms around both halves of a block with an offset of one, a scaled embedding, GELU-gated
feed-forward, and local attention in all but every sixth block, each kind with rotary tables of its own
(Gemma Team 2025)."""

import numpy as np

from shoal.runtime.card import Card

from ..graph import GraphBuilder
from . import decoder

MODEL_TYPES = ("gemma3_text", "gemma3")
_NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")


def card(config, source: str) -> Card:
    blocks = config.integer("num_hidden_layers", high=1024)
    dims = config.integer("head_dim", 256, high=4096)
    window = config.integer("sliding_window", 512, high=1 << 28)
    if config.values.get("final_logit_softcapping") or config.values.get("attn_logit_softcapping"):
        config.refuse("logit soft-capping is not supported")
    for flag in ("attention_bias", "use_bidirectional_attention"):
        if config.flag(flag):
            config.refuse(f"{flag} is not supported")
    kinds = config.values.get("layer_types")
    if not isinstance(kinds, list) or len(kinds) != blocks:
        pattern = config.integer("sliding_window_pattern", 6)
        kinds = ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(blocks)]
    if any(kind not in ("sliding_attention", "full_attention") for kind in kinds):
        config.refuse(f"layer_types {kinds!r:.60} are not supported")
    local = [kind == "sliding_attention" for kind in kinds]
    # transformers 5 keeps one table of rotary parameters a kind of attention
    by_kind = config.table("rope_parameters")

    def table(kind: str, key: str, default: float, scaling: dict):
        found = by_kind.get(kind)
        if isinstance(found, dict):
            return decoder.rope(config, dims, found.get("rope_theta", default), found)
        return decoder.rope(config, dims, config.number(key, default), scaling)

    full = table("full_attention", "rope_theta", 1e6, config.table("rope_scaling") or {"rope_type": "default"})
    near = table("sliding_attention", "rope_local_base_freq", 1e4, {"rope_type": "default"})
    made = decoder.decoder_card(
        config, source, ropes=(full, near), rope_of=tuple(int(is_local) for is_local in local),
        windows=tuple(window if is_local else 0 for is_local in local), tied=True, qk_norm=True,
        attention_scale=config.number("query_pre_attn_scalar", dims) ** -0.5,
        embedding_scale=float(config.integer("hidden_size")) ** 0.5,
        activation=None if config.text("hidden_activation") or config.text("hidden_act") else "gelu_tanh",
    )  # fmt: skip
    return made


def tensors(card: Card) -> dict[str, tuple[int, ...]]:
    return decoder.decoder_tensors(card, norms=_NORMS, attention_norms=True)


def build(g: GraphBuilder, card: Card, blocks: range) -> None:
    # Gemma stores how far a norm's weight is from one
    step = decoder.begin(g, card, blocks, "model.embed_tokens.weight", lambda stored: stored + np.float32(1))
    for block in blocks:
        prefix = f"model.layers.{block}"
        g.scope(f"{block}/attention")
        norms = (step.weight(f"{prefix}.self_attn.q_norm"), step.weight(f"{prefix}.self_attn.k_norm"))
        y = decoder.attention(step, f"{prefix}.self_attn", block, f"{prefix}.input_layernorm", norms)
        step.x = g.op("Add", step.x, g.rms(y, step.norm(step.weight(f"{prefix}.post_attention_layernorm"))))
        g.scope(f"{block}/mlp")
        y = decoder.feed_forward(step, f"{prefix}.mlp", f"{prefix}.pre_feedforward_layernorm")
        step.x = g.op("Add", step.x, g.rms(y, step.norm(step.weight(f"{prefix}.post_feedforward_layernorm"))))
    decoder.end(step, blocks, "model.norm", "model.embed_tokens.weight")
