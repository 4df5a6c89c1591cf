"""Mixtral: llama's block with experts, of which the chosen ones' weights sum to one (Jiang et al. 2024)."""

from shoal.runtime.card import Card

from ..experts.names import NORM, Names
from ..graph import GraphBuilder
from . import decoder

MODEL_TYPES = ("mixtral",)
_MOE = "block_sparse_moe"
EXPERTS = Names(f"{_MOE}.gate", f"{_MOE}.experts.{{}}.w1", f"{_MOE}.experts.{{}}.w3", f"{_MOE}.experts.{{}}.w2")


def card(config, source: str) -> Card:
    if config.flag("attention_bias"):
        config.refuse("attention_bias is not supported for mixtral")
    blocks = config.integer("num_hidden_layers", high=1024)
    window = config.integer("sliding_window", 0, low=0, high=1 << 28)
    experts = decoder.experts_card(config, experts="num_local_experts", ffn="intermediate_size", normalised=True)
    return decoder.decoder_card(config, source, windows=(window,) * blocks, **experts)


def tensors(card: Card) -> dict[str, tuple[int, ...]]:
    return decoder.decoder_tensors(card, norms=("input_layernorm", NORM), experts=EXPERTS)


def build(g: GraphBuilder, card: Card, blocks: range) -> None:
    decoder.build_routed(g, card, blocks, EXPERTS)
