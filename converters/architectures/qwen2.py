"""Qwen2 and Qwen2.5: llama's block with a bias on Q, K and V (Yang et al. 2024)."""

from shoal.runtime.card import Card

from . import decoder, llama

MODEL_TYPES = ("qwen2",)
tensors, build = llama.tensors, llama.build


def card(config, source: str) -> Card:
    if config.flag("use_sliding_window"):
        config.refuse("use_sliding_window is not supported")
    return decoder.decoder_card(config, source, attention_bias=True)
