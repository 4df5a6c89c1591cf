"""Mixtures of experts in GGUF files: what is read of one is what the Hugging Face folder has that it was made of."""

import dataclasses

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from shoal.converters import architectures
from shoal.converters.sources import gguf, open_source

FAMILIES = {"qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "olmoe": "olmoe", "mixtral": "llama",
            "smallthinker": "smallthinker"}  # fmt: skip
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
BLOCK = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp.gate": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp", "block_sparse_moe.primary_router": "ffn_gate_inp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp", "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp", "mlp.shared_expert.down_proj": "ffn_down_shexp",
}  # fmt: skip
EXPERTS = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down",
           "gate": "gate", "up": "up", "down": "down"}  # fmt: skip


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    halves = weight.reshape(heads, 2, len(weight) // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def in_gguf(family: str, weights: dict[str, np.ndarray], config: dict) -> dict[str, np.ndarray]:
    """Tensors as llama.cpp's conversion makes them."""
    found: dict = {}
    for name, value in weights.items():
        stem, _, kind = name.rpartition(".")
        if stem in OUTER:
            found[f"{OUTER[stem]}.{kind}"] = value
            continue
        block, stem = stem.removeprefix("model.layers.").split(".", 1)
        if ".experts." in stem:
            _, _, expert, part = stem.split(".")
            found.setdefault(f"blk.{block}.ffn_{EXPERTS[part]}_exps.weight", {})[int(expert)] = value
            continue
        if family == "mixtral" and stem in ("self_attn.q_proj", "self_attn.k_proj"):
            value = interleaved(value, config["num_attention_heads" if "q_" in stem else "num_key_value_heads"])
        found[f"blk.{block}.{BLOCK[stem]}.{kind}"] = value.squeeze()
    return {
        name: np.stack([value[expert] for expert in range(len(value))]) if isinstance(value, dict) else value
        for name, value in found.items()
    }


def keys(family: str, config: dict, *, widths: bool = True) -> dict:
    architecture = FAMILIES[family]
    experts = next(config[key] for key in ("num_experts", "num_local_experts", "moe_num_primary_experts")
                   if key in config)  # fmt: skip
    chosen = config.get("num_experts_per_tok") or config["moe_num_active_primary_experts"]
    found = {
        "block_count": 3, "context_length": 256, "embedding_length": 64, "attention.head_count": 4,
        "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": float(config.get("rope_theta") or config["rope_parameters"]["rope_theta"]),
        "feed_forward_length": config.get("intermediate_size", 32), "expert_count": experts,
        "expert_used_count": chosen,
    }  # fmt: skip
    if "head_dim" in config and config["head_dim"]:
        found |= {f"attention.{part}_length": config["head_dim"] for part in ("key", "value")}
    if family in ("qwen2_moe", "qwen3_moe", "smallthinker") and widths:
        found["expert_feed_forward_length"] = config.get("moe_intermediate_size", 32)
    if family == "qwen2_moe" and widths:
        found["expert_shared_feed_forward_length"] = config["shared_expert_intermediate_size"]
    if family == "smallthinker":
        found |= {"attention.sliding_window": 7, "expert_gating_func": 2}
    return {f"{architecture}.{key}": value for key, value in found.items()}


def folder(family: str, tiny) -> tuple[dict, dict]:
    with open_source(tiny / family) as source:
        return source.config(), {name: source.read(name) for name in source.tensors()}


@pytest.mark.parametrize("widths", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_says_what_the_folder_says(family, widths, tiny, tmp_path, write_gguf):
    config, weights = folder(family, tiny)
    path = write_gguf(tmp_path / "x.gguf", FAMILIES[family], keys(family, config, widths=widths),
                      in_gguf(family, weights, config))  # fmt: skip
    with open_source(path) as source, open_source(tiny / family) as original:
        assert set(source.tensors()) == set(weights)
        for name, value in weights.items():
            assert source.tensors()[name].shape == value.shape, name
            assert np.array_equal(source.read(name), value), name
            assert np.array_equal(source.read(name, 1), value[1:]), name
        _, found = architectures.find(source)
        _, expected = architectures.find(original)
    same = ["name", "source", "bos", "eos", "pad", "add_bos", "norm_eps"]
    same += ["windows"] if family == "mixtral" else []  # of Mixtral's no file tells
    assert dataclasses.replace(found, **{field: getattr(expected, field) for field in same}) == expected
    assert found.norm_eps == np.float32(expected.norm_eps)


def test_softmax_of_smallthinker_and_no_window(tiny, tmp_path, write_gguf):
    config, weights = folder("smallthinker", tiny)
    said = keys("smallthinker", config) | {"smallthinker.expert_gating_func": 1}
    del said["smallthinker.attention.sliding_window"]
    path = write_gguf(tmp_path / "x.gguf", "smallthinker", said, in_gguf("smallthinker", weights, config))
    with open_source(path) as source:
        _, card = architectures.find(source)
    assert card.routing == "softmax" and card.normalised and card.windows == card.rope_of == (0, 0, 0)


def test_an_expert_is_read_alone(tiny, tmp_path, write_gguf, monkeypatch):
    config, weights = folder("qwen3_moe", tiny)
    tensors = in_gguf("qwen3_moe", weights, config)
    tensors = {name: (value, Kind.Q8_0) if value.ndim == 3 else value for name, value in tensors.items()}
    path = write_gguf(tmp_path / "x.gguf", "qwen3moe", keys("qwen3_moe", config), tensors)
    seen = []
    original = gguf.GGUFFile._dequantize
    monkeypatch.setattr(
        gguf.GGUFFile, "_dequantize",
        lambda self, raw, tensor, width: seen.append(raw.shape[0]) or original(self, raw, tensor, width),
    )  # fmt: skip
    with open_source(path) as source:
        for expert in (0, 7):
            name = f"model.layers.2.mlp.experts.{expert}.gate_proj.weight"
            assert np.abs(source.read(name) - weights[name]).max() < 0.01
            source.read(name, 16, 20)
    assert seen == [32, 4, 32, 4]
