"""llama.cpp's names, translated: GGUF metadata to a Hugging Face config, GGUF tensors to Hugging Face weights.

Sources: the key list of ggml's docs/gguf.md, llama.cpp's conversion scripts (what they rename, permute and add) and the
config classes of transformers. A new architecture is an entry in `MODEL_TYPES` and, where it differs, in `_SPECIAL`.
Knows nothing about bytes in a file.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from shoal.runtime.errors import SourceError

from .gguf_header import REQUIRED, Metadata, Tensor

Refuse = Callable[[str], SourceError]

MODEL_TYPES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3": "gemma3_text",
    "qwen2moe": "qwen2_moe",
    "qwen3moe": "qwen3_moe",
    "olmoe": "olmoe",
    "smallthinker": "smallthinker",
}

_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.*.gate_proj",
    "ffn_up_exps": "mlp.experts.*.up_proj",
    "ffn_down_exps": "mlp.experts.*.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_SPECIAL = {
    "gemma3": {
        "ffn_norm": "pre_feedforward_layernorm",
        "post_attention_norm": "post_attention_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
    "llama": {  # Mixtral, which llama.cpp keeps under this name
        "ffn_gate_inp": "block_sparse_moe.gate",
        "ffn_gate_exps": "block_sparse_moe.experts.*.w1",
        "ffn_up_exps": "block_sparse_moe.experts.*.w3",
        "ffn_down_exps": "block_sparse_moe.experts.*.w2",
    },
    "smallthinker": {
        "ffn_gate_inp": "block_sparse_moe.primary_router",
        "ffn_gate_exps": "block_sparse_moe.experts.*.gate",
        "ffn_up_exps": "block_sparse_moe.experts.*.up",
        "ffn_down_exps": "block_sparse_moe.experts.*.down",
    },
}
_SQUEEZED = "ffn_gate_inp_shexp"  # a matrix of one row, which llama.cpp's conversion made a vector
_NAME = re.compile(r"(?:blk\.(0|[1-9]\d{0,3})\.)?([a-z_]+)\.(weight|bias)", re.ASCII)
_MOST_EXPERTS, _MOST_NAMES = 1 << 12, 1 << 20

ROPE_FACTORS = "rope_freqs.weight"

# Tokens that end an answer whatever the metadata says: files without eot_token_id are common. llama.cpp knows more, of
# models that cannot be converted here.
_ENDS = frozenset(
    ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<EOT>")
)
_CONTROL = 3
_SOFTMAX, _SIGMOID = 1, 2  # llama.cpp's gating functions


@dataclass(frozen=True)
class Weight:
    """Where a Hugging Face tensor lies: in `tensor`, or in its `expert`-th slice, or as a vector that is the only `row`
    of a matrix. With `heads`, the rows of each head are interleaved; `offset` was added to every value."""

    tensor: Tensor
    expert: int | None = None
    heads: int = 0
    offset: float = 0.0
    row: bool = False


def weights(
    architecture: str, tensors: dict[str, Tensor], heads: int, kv_heads: int, refuse: Refuse
) -> dict[str, Weight]:
    """Hugging Face names to where their values are. A tensor that no table knows keeps its name.

    llama.cpp changes two things that are undone when reading: it interleaves the two halves of each head of Q and K
    for the architecture llama (its rotary kernel turns neighbouring pairs), and adds 1 to the norms of Gemma.
    """
    found: dict[str, Weight] = {}

    def add(name: str, weight: Weight) -> None:
        if name in found or len(found) == _MOST_NAMES:
            raise refuse(f"Two tensors are {name!r:.80}, or there are more than {_MOST_NAMES}.")
        found[name] = weight

    block = _BLOCK | _SPECIAL.get(architecture, {})
    for name, tensor in tensors.items():
        if name == ROPE_FACTORS:
            continue
        match = _NAME.fullmatch(name) if architecture in MODEL_TYPES else None
        translated = (block if match[1] else _OUTER).get(match[2]) if match else None
        if not match or not translated:
            add(name, Weight(tensor))
            continue
        target = f"{f'model.layers.{match[1]}.' if match[1] else ''}{translated}.{match[3]}"
        if "*" in target:
            if len(tensor.shape) < 2 or tensor.shape[0] > _MOST_EXPERTS:
                raise refuse(f"{name!r} of shape {tensor.shape} does not hold experts.")
            for expert in range(tensor.shape[0]):
                add(target.replace("*", str(expert)), Weight(tensor, expert))
        elif architecture == "llama" and match[2] in ("attn_q", "attn_k"):
            add(target, Weight(tensor, heads=heads if match[2] == "attn_q" else kv_heads))
        elif match[2] == _SQUEEZED and len(tensor.shape) == 1:
            add(target, Weight(tensor, row=True))
        else:
            add(target, Weight(tensor, offset=1.0 if architecture == "gemma3" and "norm" in match[2] else 0.0))
    return found


def interleaved(start: int, stop: int, rows: int, heads: int) -> np.ndarray:
    """The rows of a GGUF tensor that hold rows [start:stop] of the Hugging Face one.

    With d rows a head, row i of a head's first half went to 2i and row i of its second half to 2i + 1 (`permute` in
    llama.cpp's conversion). `heads` divides `rows` evenly, and so does 2 each head.
    """
    row = np.arange(start, stop)
    size = rows // heads
    head, within = row // size, row % size
    return head * size + within % (size // 2) * 2 + within // (size // 2)


def config(architecture: str, metadata: Metadata, tensors: dict[str, Tensor], refuse: Refuse) -> dict:
    """The Hugging Face config of a GGUF file. A value that is absent has llama.cpp's default, or no key at all; of an
    architecture that no table knows there is only its name."""
    if architecture not in MODEL_TYPES:
        return {"model_type": architecture}

    def integer(key: str, default: object = REQUIRED, low: int = 1, high: int = (1 << 31) - 1):
        return metadata.integer(f"{architecture}.{key}", default, low, high)

    def number(key: str, default: object = REQUIRED):
        return metadata.number(f"{architecture}.{key}", default)

    heads = integer("attention.head_count", high=1 << 12)
    hidden = integer("embedding_length")
    blocks = integer("block_count", high=1 << 12)
    head_dim = integer("attention.key_length", None)
    if head_dim is None:
        if hidden % heads:
            raise refuse(f"{architecture}.embedding_length is {hidden}, not a multiple of the {heads} heads.")
        head_dim = hidden // heads
    experts = integer("expert_count", 0, low=0, high=1 << 12)
    # llama.cpp keeps Mixtral under the name llama.
    model_type = "mixtral" if architecture == "llama" and experts else MODEL_TYPES[architecture]
    values = {
        "model_type": model_type,
        "name": metadata.text("general.name", None),
        "num_hidden_layers": blocks,
        "hidden_size": hidden,
        "intermediate_size": integer("feed_forward_length", None, low=0),
        "num_attention_heads": heads,
        "num_key_value_heads": integer("attention.head_count_kv", heads, high=1 << 12),
        "head_dim": head_dim,
        "max_position_embeddings": integer("context_length"),
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon"),
        "rope_theta": number("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(architecture, metadata, tensors, head_dim, refuse),
        "sliding_window": integer("attention.sliding_window", 0, low=0) or None,
        "attn_logit_softcapping": number("attn_logit_softcapping", None),
        "final_logit_softcapping": number("final_logit_softcapping", None),
        "hidden_act": "gelu_pytorch_tanh" if architecture == "gemma3" else "silu",
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    rotated = integer("rope.dimension_count", head_dim, high=head_dim)
    if rotated != head_dim:
        values["partial_rotary_factor"] = rotated / head_dim
    if integer("attention.value_length", head_dim) != head_dim:
        values["v_head_dim"] = integer("attention.value_length")
    if experts:
        values |= _experts(architecture, metadata, tensors, experts, blocks)
    if architecture == "smallthinker":
        values |= _smallthinker(metadata, blocks)
    if architecture == "gemma3":
        values |= _gemma3(metadata, blocks, hidden, heads, head_dim, refuse)
    values |= _vocabulary(architecture, metadata, tensors, refuse)
    return {key: value for key, value in values.items() if value is not None}


def _experts(
    architecture: str, metadata: Metadata, tensors: dict[str, Tensor], experts: int, blocks: int
) -> dict:  # fmt: skip
    """What a mixture of so many experts says of them. Files older than the keys leave the widths to the tensors, and
    all files which blocks have no experts."""

    def width(key: str, tensor: str) -> int | None:
        found = metadata.integer(f"{architecture}.{key}", 0, 0, 1 << 24)
        names = (name for name in tensors if re.fullmatch(rf"blk\.\d+\.{tensor}\.weight", name, re.ASCII))
        shape = tensors[name].shape if (name := next(names, None)) is not None and not found else (0, 0)
        return found or (shape[-2] if len(shape) > 1 else 0) or None

    chosen = metadata.integer(f"{architecture}.expert_used_count", REQUIRED, 1, experts)
    ffn = width("expert_feed_forward_length", "ffn_gate_exps")
    if architecture == "smallthinker":
        sigmoid = metadata.integer("smallthinker.expert_gating_func", _SOFTMAX, _SOFTMAX, _SIGMOID) == _SIGMOID
        return {
            "moe_num_primary_experts": experts, "moe_num_active_primary_experts": chosen, "moe_ffn_hidden_size": ffn,
            "moe_primary_router_apply_softmax": not sigmoid,
        }  # fmt: skip
    found = {
        "num_local_experts" if architecture == "llama" else "num_experts": experts, "num_experts_per_tok": chosen,
        "moe_intermediate_size": ffn,
        "shared_expert_intermediate_size": width("expert_shared_feed_forward_length", "ffn_gate_shexp"),
        "norm_topk_prob": architecture == "qwen3moe",  # not in the file: llama.cpp's graph says so
    }  # fmt: skip
    dense = [block for block in range(blocks) if f"blk.{block}.ffn_gate_inp.weight" not in tensors]
    if 0 < len(dense) < blocks:
        found["mlp_only_layers"] = dense
    if architecture in ("llama", "olmoe") and ffn is not None:
        found["intermediate_size"] = ffn
    return found


def _smallthinker(metadata: Metadata, blocks: int) -> dict:
    """What llama.cpp knows about SmallThinker: where there is a window, every fourth block from the first on sees
    everything and no positions, the others the window."""
    window = metadata.integer("smallthinker.attention.sliding_window", 0, low=0)
    period = metadata.integer("smallthinker.attention.sliding_window_pattern", 4, low=1)
    windowed = [int(bool(window) and block % period != 0) for block in range(blocks)]
    return {
        "sliding_window_layout": windowed, "sliding_window_size": window or None,
        "rope_layout": [int(not window or block % 4 != 0) for block in range(blocks)],
    }  # fmt: skip


def _gemma3(metadata: Metadata, blocks: int, hidden: int, heads: int, head_dim: int, refuse: Refuse) -> dict:
    """What llama.cpp knows about Gemma 3 without being told: every sixth block sees everything, the others a window
    with a rotary base of their own; only the 27B model (62 blocks) scales attention by the width of an even share."""
    key = "gemma3.attention.sliding_window_pattern"
    if metadata.is_array(key):
        sliding = [bool(value) for value in metadata.numbers(key)]
        if len(sliding) != blocks:
            raise refuse(f"{key} has {len(sliding)} values for {blocks} blocks.")
    else:
        every = metadata.integer(key, 6, low=1)
        sliding = [bool((index + 1) % every) for index in range(blocks)]
    return {
        "layer_types": ["sliding_attention" if local else "full_attention" for local in sliding],
        "rope_local_base_freq": metadata.number("gemma3.rope.freq_base_swa", 10000.0),
        "query_pre_attn_scalar": hidden / heads if blocks == 62 else head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
    }


def _rope_scaling(
    architecture: str, metadata: Metadata, tensors: dict[str, Tensor], head_dim: int, refuse: Refuse
) -> dict | None:
    prefix = f"{architecture}.rope.scaling."
    factors = tensors.get(ROPE_FACTORS)
    if factors is not None:  # Llama 3.1 and later: the formula's result, without its parameters
        if factors.type.name != "F32" or len(factors.shape) != 1 or factors.shape[0] > head_dim // 2:
            raise refuse(f"{ROPE_FACTORS} is not a row of at most {head_dim // 2} floats.")
        values = np.frombuffer(factors.data, "<f4", factors.shape[0], factors.offset)
        if not (np.isfinite(values).all() and (values > 0).all()):
            raise refuse(f"{ROPE_FACTORS} has values that are not positive numbers.")
        return {"rope_type": "factors", "factors": values.tolist()}
    kind = metadata.text(prefix + "type", None)
    factor = metadata.number(prefix + "factor", None)
    if kind is None and factor is None:  # the older key
        factor = metadata.number(f"{architecture}.rope.scale_linear", None)
    if kind == "none" or factor is None or factor == 1.0:
        return None
    if factor <= 0:
        raise refuse(f"{prefix}factor is {factor}.")
    scaling: dict = {"rope_type": kind or "linear", "factor": factor}
    original = metadata.integer(prefix + "original_context_length", None, low=1)
    if original is not None:
        scaling["original_max_position_embeddings"] = original
    if kind == "yarn":
        for name in ("beta_fast", "beta_slow"):
            value = metadata.number(f"{prefix}yarn_{name}", None)
            if value is not None:
                scaling[name] = value
        share = metadata.number(prefix + "attn_factor", None)
        if share is not None:  # llama.cpp multiplies the paper's scale with it, transformers replaces the scale
            scaling["attention_factor"] = share * (1 + 0.1 * math.log(max(factor, 1.0)))
    return scaling


def _vocabulary(architecture: str, metadata: Metadata, tensors: dict[str, Tensor], refuse: Refuse) -> dict:
    """Sizes and ids. As in llama.cpp, an id beyond the vocabulary counts as absent, and SentencePiece has defaults."""
    tokens = metadata.count("tokenizer.ggml.tokens")
    default = {"bos": 1, "eos": 2, "unknown": 0} if metadata.text("tokenizer.ggml.model", "") == "llama" else {}
    embedding = tensors.get("token_embd.weight")
    size = embedding.shape[0] if embedding else metadata.integer(f"{architecture}.vocab_size", tokens or None, low=1)
    if size is not None and tokens > size:
        raise refuse(f"It has {tokens} tokens, but {size} rows of embeddings.")

    def token(name: str) -> int | None:
        value = metadata.integer(f"tokenizer.ggml.{name}_token_id", default.get(name), low=-1, high=(1 << 32) - 1)
        return value if value is not None and 0 <= value < tokens else None

    ends = [token("eos"), token("eot"), token("eom")]
    kinds = metadata.numbers("tokenizer.ggml.token_type", None)
    if kinds is not None and tokens:
        texts = metadata.strings("tokenizer.ggml.tokens")
        ends += [int(index) for index in np.flatnonzero(kinds[:tokens] == _CONTROL) if texts[index] in _ENDS]
    eos = list(dict.fromkeys(end for end in ends if end is not None))
    return {
        "vocab_size": size,
        "bos_token_id": token("bos"),
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": token("padding"),
        "unk_token_id": token("unknown"),
        "add_bos_token": adds_bos(metadata),
        "add_eos_token": metadata.flag("tokenizer.ggml.add_eos_token", False),
    }


def adds_bos(metadata: Metadata) -> bool:
    """Whether encoding begins with the beginning-of-text token; where the file is silent, llama.cpp's default."""
    model = metadata.text("tokenizer.ggml.model", "")
    before = metadata.text("tokenizer.ggml.pre", "")
    silent = model == "llama" or before in ("llama-bpe", "llama3", "llama-v3", "falcon3", "tekken")
    known = model == "llama" or "tokenizer.ggml.bos_token_id" in metadata
    return metadata.flag("tokenizer.ggml.add_bos_token", silent and known)
