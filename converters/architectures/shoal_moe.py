"""Mixtures that samples/ trains: llama's block with experts of any of the kinds that shoal runs. Beside ordinary ones
there may be those of MoE++ (Jin et al. 2024), which give zeros, a copy of their input or a mix of it and a constant and
are never read, and its routers that depend on the router before; one that sees every token; and a router that reads the
stream before attention.

config.json is llama's and has `num_experts`, `num_experts_per_tok`, `moe_intermediate_size`, and what it wants of
`norm_topk_prob`, `routing` (softmax, sigmoid, or equal: each of the chosen weighs 1), `routed_scaling_factor`,
`zero_experts`, `copy_experts`, `constant_experts`, `gating_residual`, `early_routing`,
`shared_expert_intermediate_size`, `shared_expert_gate`, `decoder_sparse_step`, `mlp_only_layers` and `attention_bias`
(on Q, K and V). Tensors are called as in qwen3_moe, and `mlp.constant.N.weight` [2, hidden], `mlp.constant.N.value`
[hidden], `mlp.gate_residual.weight` [all experts, all experts].
"""

from shoal.runtime.card import Card

from ..experts.names import NORM, Names
from ..graph import GraphBuilder
from . import decoder

MODEL_TYPES = ("shoal_moe",)
EXPERTS = Names()


def card(config, source: str) -> Card:
    routing = config.text("routing", "softmax")
    if routing not in ("softmax", "sigmoid", "equal"):
        config.refuse(f"routing {routing!r:.40} is not softmax, sigmoid or equal")
        routing = "softmax"
    special = {f"{kind}_experts": config.integer(f"{kind}_experts", 0, low=0, high=1024)
               for kind in ("zero", "copy", "constant")}  # fmt: skip
    shared = config.integer("shared_expert_intermediate_size", 0, low=0, high=1 << 20)
    experts = decoder.experts_card(
        config, routing=routing, routed_scale=config.number("routed_scaling_factor", 1.0), shared_ffn=shared,
        shared_gate=bool(shared) and config.flag("shared_expert_gate"), early_routing=config.flag("early_routing"),
        gating_residual=config.flag("gating_residual"), **special,
    )  # fmt: skip
    activation = "silu" if experts["expert_activation"] == "relu" else None
    bias = config.flag("attention_bias")
    return decoder.decoder_card(config, source, activation=activation, attention_bias=bias, **experts)


def tensors(card: Card) -> dict[str, tuple[int, ...]]:
    return decoder.decoder_tensors(card, norms=("input_layernorm", NORM), experts=EXPERTS)


def build(g: GraphBuilder, card: Card, blocks: range) -> None:
    decoder.build_routed(g, card, blocks, EXPERTS)
