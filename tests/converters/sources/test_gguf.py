"""A GGUF file as a Hugging Face model: names, config, layout and values."""

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from shoal.converters.sources import gguf_config, open_source
from shoal.runtime.errors import UsageError

LLAMA = {
    "block_count": 2, "context_length": 128, "embedding_length": 64, "feed_forward_length": 96,
    "attention.head_count": 4, "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-5,
}  # fmt: skip


def keys(architecture: str, **more) -> dict:
    return {f"{architecture}.{key}": value for key, value in (LLAMA | more).items()}


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's conversion does to Q and K, as its script words it."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


@pytest.fixture
def random():
    return np.random.default_rng(5)


def test_llama_weights_are_in_hugging_face_layout(tmp_path, write_gguf, random):
    q, k = random.normal(size=(64, 64)).astype("f4"), random.normal(size=(32, 64)).astype("f4")
    bias = random.normal(size=64).astype("f4")
    embedding = random.normal(size=(10, 64)).astype("f4")
    tensors = {
        "token_embd.weight": embedding, "blk.1.attn_q.weight": permuted(q, 4), "blk.1.attn_k.weight": permuted(k, 2),
        "blk.1.attn_v.weight": k, "blk.1.attn_q.bias": permuted(bias, 4), "blk.1.attn_norm.weight": bias,
        "blk.1.ffn_norm.weight": bias, "something.else": bias,
    }  # fmt: skip
    with open_source(write_gguf(tmp_path / "x.gguf", "llama", keys("llama"), tensors)) as source:
        prefix = "model.layers.1."
        names = {
            "model.embed_tokens.weight": embedding, prefix + "self_attn.q_proj.weight": q,
            prefix + "self_attn.k_proj.weight": k, prefix + "self_attn.v_proj.weight": k,
            prefix + "self_attn.q_proj.bias": bias, prefix + "input_layernorm.weight": bias,
            prefix + "post_attention_layernorm.weight": bias, "something.else": bias,
        }  # fmt: skip
        assert set(source.tensors()) == set(names)
        for name, value in names.items():
            assert source.tensors()[name].shape == value.shape
            assert np.array_equal(source.read(name), value), name
            assert np.array_equal(source.read(name, 3, 9), value[3:9]), name
            assert source.read(name, 4, 4).shape == (0, *value.shape[1:])
        for start, stop in ((0, 11), (-1, 2), (3, 2)):
            with pytest.raises(UsageError):
                source.read("model.embed_tokens.weight", start, stop)


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_qwen_rows_stay_where_they_are(architecture, tmp_path, write_gguf, random):
    q = random.normal(size=(64, 64)).astype("f4")
    path = write_gguf(tmp_path / "x.gguf", architecture, keys(architecture), {"blk.0.attn_q.weight": q})
    with open_source(path) as source:
        assert np.array_equal(source.read("model.layers.0.self_attn.q_proj.weight"), q)
        assert source.config()["model_type"] == architecture


def test_interleaved_is_the_inverse_of_permuted():
    for heads, rows in ((1, 2), (3, 12), (4, 64), (9, 576)):
        row = np.arange(rows)
        assert np.array_equal(permuted(row, heads)[gguf_config.interleaved(0, rows, rows, heads)], row)


def test_heads_that_do_not_fit_are_refused(tmp_path, write_gguf, refused):
    path = write_gguf(tmp_path / "x.gguf", "llama", keys("llama"), {"blk.0.attn_q.weight": np.ones((60, 64))})
    with open_source(path) as source, refused():
        source.read("model.layers.0.self_attn.q_proj.weight")


SUPPORTED = sorted(gguf.quants._type_traits) + [Kind.F32, Kind.F16]


@pytest.mark.parametrize("kind", SUPPORTED, ids=lambda kind: kind.name)
def test_rows_of_every_format(kind, tmp_path, gguf_bytes, random):
    """A range of rows equals the same rows of the whole, as the gguf package dequantises it: bits of all kinds."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    width, rows = 3 * block if block > 1 else 5, 40
    raw = random.integers(0, 256, (rows, width // block * size), dtype=np.uint8)
    header = [("general.architecture", 8, "mystery")]
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf_bytes(header, [("t", (width, rows), int(kind), 0)], raw.tobytes()))
    with np.errstate(all="ignore"):
        whole = gguf.quants.dequantize(raw, kind).reshape(rows, width)
    with open_source(path) as source:
        info = source.tensors()["t"]
        assert (info.shape, info.dtype, info.bytes) == ((rows, width), kind.name, raw.size)
        for start, stop in ((0, rows), (0, 1), (7, 23), (39, 40)):
            part = source.read("t", start, stop)
            assert part.dtype == np.float32 and np.array_equal(part, whole[start:stop], equal_nan=True)


@pytest.mark.parametrize(
    "kind", [Kind.Q8_0, Kind.Q5_1, Kind.Q4_0, Kind.BF16, Kind.TQ2_0, Kind.MXFP4], ids=lambda k: k.name
)
def test_round_trip(kind, tmp_path, write_gguf, random):
    value = random.normal(size=(16, 512)).astype("f4")
    write_gguf(tmp_path / "x.gguf", "llama", keys("llama"), {"blk.0.ffn_up.weight": (value, kind)})
    with open_source(tmp_path / "x.gguf") as source:
        read = source.read("model.layers.0.mlp.up_proj.weight")
    assert np.array_equal(read, gguf.quants.dequantize(gguf.quants.quantize(value, kind), kind))
    assert np.abs(read - value).mean() < {Kind.TQ2_0: 1.0, Kind.MXFP4: 0.3}.get(kind, 0.1)


def test_integers_are_no_weights(tmp_path, gguf_bytes, refused):
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf_bytes([("general.architecture", 8, "mystery")], [("t", (8,), int(Kind.I32), 0)], bytes(32)))
    with open_source(path) as source:
        assert source.config() == {"model_type": "mystery"}
        with refused() as failure:
            source.read("t")
        assert "I32" in failure.value.why
        with refused():
            source.read("absent")


def test_config_of_a_llama(tmp_path, write_gguf):
    vocabulary = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.tokens": ["<s>", "<|eot_id|>", "<|eom_id|>", "a", "b", "ab", "<|end|>"],
        "tokenizer.ggml.token_type": [3, 3, 3, 1, 1, 1, 1], "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.padding_token_id": 4_000_000_000, "general.name": "L",
    }  # fmt: skip
    more = {"rope.freq_base": 5e5, "attention.key_length": 32, "rope.dimension_count": 16}
    factors = np.array([1, 1, 2.5, 8], "f4")
    tensors = {"token_embd.weight": np.zeros((7, 64)), "rope_freqs.weight": factors, "output.weight": np.zeros((7, 64))}
    path = write_gguf(tmp_path / "x.gguf", "llama", keys("llama", **more) | vocabulary, tensors)
    with open_source(path) as source:
        config = source.config()
        assert "rope_freqs.weight" not in source.tensors()
    assert config | {
        "model_type": "llama", "name": "L", "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 7, "rope_theta": 5e5,
        "max_position_embeddings": 128, "partial_rotary_factor": 0.5, "tie_word_embeddings": False,
        "hidden_act": "silu", "attention_bias": False, "bos_token_id": 0, "eos_token_id": [2, 1], "add_bos_token": True,
        "rope_scaling": {"rope_type": "factors", "factors": [1.0, 1.0, 2.5, 8.0]},
    } == config  # fmt: skip
    assert config["rms_norm_eps"] == pytest.approx(1e-5)
    assert "pad_token_id" not in config and None not in config.values()


@pytest.mark.parametrize(
    "more, expected",
    [
        ({}, None),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
        ({"rope.scale_linear": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}, {"rope_type": "linear", "factor": 8.0}),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        ),
    ],
)
def test_rope_scaling(more, expected, tmp_path, write_gguf):
    with open_source(write_gguf(tmp_path / "x.gguf", "qwen2", keys("qwen2", **more), {})) as source:
        assert source.config().get("rope_scaling") == expected


@pytest.mark.parametrize("factors", [[1, 0], [1, -1], [1, np.inf], [1] * 9])
def test_rope_factors_are_checked(factors, tmp_path, write_gguf, refused):
    path = write_gguf(tmp_path / "x.gguf", "llama", keys("llama"), {"rope_freqs.weight": np.array(factors)})
    with refused():
        open_source(path)


def test_gemma3(tmp_path, write_gguf, random):
    norm = random.normal(size=64).astype("f4")
    names = ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")
    tensors = {f"blk.0.{name}.weight": norm + index + 1 for index, name in enumerate(names)}
    tensors["blk.0.attn_q_norm.weight"] = norm[:16] + 1
    tensors["blk.0.attn_q.weight"] = q = random.normal(size=(64, 64)).astype("f4")
    more = {"block_count": 7, "attention.sliding_window": 32, "rope.freq_base": 1e6, "attention.key_length": 16}
    path = write_gguf(tmp_path / "x.gguf", "gemma3", keys("gemma3", **more), tensors)
    with open_source(path) as source:
        config = source.config()
        read = [
            source.read(f"model.layers.0.{name}_layernorm.weight")
            for name in ("input", "post_attention", "pre_feedforward", "post_feedforward")
        ]
        assert np.allclose(source.read("model.layers.0.self_attn.q_norm.weight"), norm[:16], atol=1e-6)
        assert np.array_equal(source.read("model.layers.0.self_attn.q_proj.weight"), q)
    assert all(np.allclose(value, norm + index, atol=1e-6) for index, value in enumerate(read))
    assert config["model_type"] == "gemma3_text" and config["tie_word_embeddings"]
    assert config["layer_types"] == ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"]
    assert (config["sliding_window"], config["rope_theta"], config["rope_local_base_freq"]) == (32, 1e6, 1e4)
    assert config["query_pre_attn_scalar"] == 16 and config["hidden_act"] == "gelu_pytorch_tanh"


def test_experts_are_tensors_of_their_own(tmp_path, write_gguf, random):
    up = random.normal(size=(4, 96, 64)).astype("f4")
    more = {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 96}
    tensors = {"blk.0.ffn_up_exps.weight": (up, Kind.Q8_0), "blk.0.ffn_gate_inp.weight": up[0, :4]}
    with open_source(write_gguf(tmp_path / "x.gguf", "qwen3moe", keys("qwen3moe", **more), tensors)) as source:
        config = source.config()
        assert (config["model_type"], config["num_experts"], config["num_experts_per_tok"]) == ("qwen3_moe", 4, 2)
        names = [f"model.layers.0.mlp.experts.{expert}.up_proj.weight" for expert in range(4)]
        assert list(source.tensors()) == [*names, "model.layers.0.mlp.gate.weight"]
        whole = gguf.quants.dequantize(gguf.quants.quantize(up, Kind.Q8_0), Kind.Q8_0)
        for expert, name in enumerate(names):
            assert np.array_equal(source.read(name, 5, 50), whole[expert, 5:50])
            assert source.tensors()[name].shape == (96, 64)


def test_parts_of_a_split_file(tmp_path, write_gguf, refused):
    parts = {"token_embd.weight": np.ones((4, 64))}, {"output.weight": np.full((4, 64), 2)}
    paths = [tmp_path / f"m-{number:05}-of-00002.gguf" for number in (1, 2)]
    for number, (path, tensors) in enumerate(zip(paths, parts, strict=True)):
        split = {"split.no": number, "split.count": 2, "split.tensors.count": 2}
        write_gguf(path, "llama", split | (keys("llama") if number == 0 else {}), tensors)
    for path in paths:
        with open_source(path) as source:
            assert list(source.tensors()) == ["model.embed_tokens.weight", "lm_head.weight"]
            assert source.read("lm_head.weight")[0, 0] == 2
    (tmp_path / "renamed.gguf").write_bytes(paths[0].read_bytes())
    with refused():
        open_source(tmp_path / "renamed.gguf")
    paths[1].write_bytes(paths[0].read_bytes())
    with refused():
        open_source(paths[0])
    paths[1].unlink()
    with refused() as failure:
        open_source(paths[0])
    assert paths[1].name in failure.value.what


def agree(path) -> None:
    reader = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}

    def expected(name: str) -> np.ndarray:
        return gguf.quants.dequantize(reader[name].data, reader[name].tensor_type)

    with open_source(path) as source:
        assert len(source.tensors()) == len(reader)
        assert np.array_equal(source.read("model.embed_tokens.weight", 3, 11), expected("token_embd.weight")[3:11])
        down = source.read("model.layers.1.mlp.down_proj.weight")
        assert np.array_equal(down, expected("blk.1.ffn_down.weight"))
        key = source.read("model.layers.1.self_attn.k_proj.weight")
        assert np.array_equal(permuted(key, source.config()["num_key_value_heads"]), expected("blk.1.attn_k.weight"))


def test_a_real_file_agrees_with_the_gguf_package(tiny_gguf):
    agree(tiny_gguf)


@pytest.mark.deep
def test_smollm2_agrees_with_the_gguf_package(smollm2_gguf):
    agree(smollm2_gguf)
