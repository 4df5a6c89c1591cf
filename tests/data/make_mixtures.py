"""Makes the mixtures of experts in tests/data/tiny as make_tiny.py makes the other models: run by hand, in the same
environment. What transformers has, it computes; SmallThinker and our own type are computed here, from their papers, in
plain torch and token by token.

Shapes are awkward where that is possible: an expert's width is no multiple of 64, some blocks have no experts.
"""

import json
import math

import numpy as np
import torch
import transformers
from make_tiny import HERE, LENGTH, byte_tokenizer, randomise, save
from safetensors.torch import save_file

COMMON = dict(
    vocab_size=260, hidden_size=64, intermediate_size=72, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2,
    pad_token_id=0,
)  # fmt: skip
EXPERTS = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32)

FAMILIES = {
    "qwen2_moe": transformers.Qwen2MoeConfig(
        **COMMON, **EXPERTS, shared_expert_intermediate_size=48, mlp_only_layers=[1], tie_word_embeddings=True
    ),
    "qwen3_moe": transformers.Qwen3MoeConfig(**COMMON, **EXPERTS, head_dim=32, norm_topk_prob=True),
    "olmoe": transformers.OlmoeConfig(**(COMMON | {"intermediate_size": 48}), num_experts=8, num_experts_per_tok=3),
    "mixtral": transformers.MixtralConfig(
        **(COMMON | {"intermediate_size": 48}), num_local_experts=4, num_experts_per_tok=2, sliding_window=7
    ),
}  # fmt: skip

SMALLTHINKER = {key: value for key, value in COMMON.items() if key != "intermediate_size"} | dict(
    model_type="smallthinker", head_dim=16, moe_ffn_hidden_size=32, moe_num_primary_experts=8,
    moe_num_active_primary_experts=2, moe_primary_router_apply_softmax=False, rope_layout=[0, 1, 1], rope_theta=1e4,
    sliding_window_layout=[0, 1, 1], sliding_window_size=7, tie_word_embeddings=True,
)  # fmt: skip
SHOAL = COMMON | dict(
    model_type="shoal_moe", **EXPERTS, zero_experts=1, copy_experts=2, constant_experts=2, gating_residual=True,
    norm_topk_prob=False, routing="softmax", rope_theta=1e4, tie_word_embeddings=True, hidden_act="silu",
) | {"num_experts": 6, "num_experts_per_tok": 4}  # fmt: skip


def with_transformers() -> None:
    for seed, (name, config) in enumerate(FAMILIES.items()):
        config._attn_implementation = "eager"
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        randomise(model, 200 + seed, torch.bfloat16)
        torch.manual_seed(300 + seed)
        with torch.no_grad():
            for value in model.parameters():
                if value.ndim == 3:  # all experts of a block
                    value.normal_(0, value.shape[2] ** -0.5).copy_(value.to(torch.bfloat16).float())
        tokens = torch.randint(4, 260, (1, LENGTH), generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            found = model(tokens, output_hidden_states=True)
        reference = dict(tokens=tokens[0].numpy(), logits=found.logits[0].numpy(),
                         first_block=found.hidden_states[1][0].numpy())  # fmt: skip
        save(model, HERE / name, torch.bfloat16, reference)
        finish(name)


def by_hand() -> None:
    for seed, (name, config) in enumerate((("smallthinker", SMALLTHINKER), ("shoal_moe", SHOAL))):
        random = torch.Generator().manual_seed(400 + seed)
        weights = {key: tensor(key, shape, random) for key, shape in shapes(config).items()}
        tokens = torch.randint(4, 260, (LENGTH,), generator=random)
        logits, first = Reference(config, weights)(tokens)
        folder = HERE / name
        folder.mkdir(exist_ok=True)
        save_file({key: value.to(torch.bfloat16) for key, value in weights.items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True))
        arrays = dict(tokens=tokens.numpy(), logits=logits.numpy(), first_block=first.numpy())
        np.savez(folder / "reference.npz", **arrays)
        finish(name)


def finish(name: str) -> None:
    byte_tokenizer().save(str(HERE / name / "tokenizer.json"))
    settings = dict(bos_token="<s>", eos_token="</s>", pad_token="<pad>", add_bos_token=True)
    (HERE / name / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


def tensor(name: str, shape: tuple[int, ...], random: torch.Generator) -> torch.Tensor:
    mean, spread = (1.0, 0.2) if "norm" in name else (0.0, 1.0 if "embed" in name else shape[-1] ** -0.5)
    return torch.normal(mean, spread, shape, generator=random).to(torch.bfloat16).float()


def shapes(config: dict) -> dict[str, tuple[int, ...]]:
    hidden, thinker = config["hidden_size"], config["model_type"] == "smallthinker"
    dim = hidden // config["num_attention_heads"]
    found = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    if thinker:
        experts, total, width = config["moe_num_primary_experts"], config["moe_num_primary_experts"], 32
    else:
        experts, width = config["num_experts"], config["moe_intermediate_size"]
        total = experts + config["zero_experts"] + config["copy_experts"] + config["constant_experts"]
    for block in range(config["num_hidden_layers"]):
        at = f"model.layers.{block}."
        found |= {at + f"{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
        for part, heads in (("q", 4), ("k", 2), ("v", 2)):
            found[at + f"self_attn.{part}_proj.weight"] = (heads * dim, hidden)
        found[at + "self_attn.o_proj.weight"] = (hidden, 4 * dim)
        found[at + ("block_sparse_moe.primary_router.weight" if thinker else "mlp.gate.weight")] = (total, hidden)
        for expert in range(experts):
            for part in ("gate", "up", "down"):
                name = f"block_sparse_moe.experts.{expert}.{part}" if thinker else f"mlp.experts.{expert}.{part}_proj"
                found[at + name + ".weight"] = (hidden, width) if part == "down" else (width, hidden)
        for index in range(config.get("constant_experts", 0)):
            found[at + f"mlp.constant.{index}.weight"] = (2, hidden)
            found[at + f"mlp.constant.{index}.value"] = (hidden,)
        if config.get("gating_residual") and block:
            found[at + "mlp.gate_residual.weight"] = (total, total)
    return found


class Reference:
    """Both models, as their papers have them."""

    def __init__(self, config: dict, weights: dict[str, torch.Tensor]):
        self.config, self.weights, self.before = config, weights, None

    def __call__(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits, and the stream after the first block."""
        x = self.weights["model.embed_tokens.weight"][tokens]
        x = first = self.block(0, x)
        for block in range(1, self.config["num_hidden_layers"]):
            x = self.block(block, x)
        return self.norm("model.norm", x) @ self.weights["model.embed_tokens.weight"].T, first

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weights[f"{name}.weight"]

    def block(self, block: int, x: torch.Tensor) -> torch.Tensor:
        at, thinker = f"model.layers.{block}.", self.config["model_type"] == "smallthinker"
        entering = x
        x = x + self.attention(block, self.norm(at + "input_layernorm", x))
        normed = self.norm(at + "post_attention_layernorm", x)
        if thinker:
            logits = entering @ self.weights[at + "block_sparse_moe.primary_router.weight"].T
            return x + torch.stack([self.thinker(at, logits[i], normed[i]) for i in range(len(x))])
        logits = normed @ self.weights[at + "mlp.gate.weight"].T
        if self.config["gating_residual"] and self.before is not None:
            logits = logits + self.before @ self.weights[at + "mlp.gate_residual.weight"].T
        self.before = logits
        return x + torch.stack([self.mixed(at, logits[i], normed[i]) for i in range(len(x))])

    def thinker(self, at: str, logits: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        best, ids = logits.topk(self.config["moe_num_active_primary_experts"])
        shares = torch.sigmoid(best) / torch.sigmoid(best).sum()
        y = torch.zeros_like(x)
        for share, expert in zip(shares, ids.tolist(), strict=True):
            gate, up, down = (self.weights[at + f"block_sparse_moe.experts.{expert}.{part}.weight"]
                              for part in ("gate", "up", "down"))  # fmt: skip
            y = y + share * (down @ (torch.relu(gate @ x) * (up @ x)))
        return y

    def mixed(self, at: str, logits: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        config = self.config
        shares, ids = torch.softmax(logits, -1).topk(config["num_experts_per_tok"])
        y = torch.zeros_like(x)
        for share, expert in zip(shares, ids.tolist(), strict=True):
            special = expert - config["num_experts"]
            constant = special - config["zero_experts"] - config["copy_experts"]
            if special < 0:
                gate, up, down = (self.weights[at + f"mlp.experts.{expert}.{part}_proj.weight"]
                                  for part in ("gate", "up", "down"))  # fmt: skip
                given = down @ (torch.nn.functional.silu(gate @ x) * (up @ x))
            elif special < config["zero_experts"]:
                continue
            elif constant < 0:
                given = x
            else:
                mix = torch.softmax(self.weights[at + f"mlp.constant.{constant}.weight"] @ x, -1)
                given = mix[0] * x + mix[1] * self.weights[at + f"mlp.constant.{constant}.value"]
            y = y + share * given
        return y

    def attention(self, block: int, x: torch.Tensor) -> torch.Tensor:
        at, config, length = f"model.layers.{block}.self_attn.", self.config, len(x)
        q, k, v = ((x @ self.weights[at + f"{part}_proj.weight"].T).view(length, -1, 16).transpose(0, 1)
                   for part in "qkv")  # fmt: skip
        if config.get("rope_layout", [1, 1, 1])[block]:
            q, k = self.rotated(q), self.rotated(k)
        k, v = k.repeat_interleave(2, 0), v.repeat_interleave(2, 0)
        ago = torch.arange(length)[:, None] - torch.arange(length)[None]
        window = config["sliding_window_size"] if config.get("sliding_window_layout", [0, 0, 0])[block] else length
        scores = (q @ k.transpose(1, 2) / math.sqrt(16)).masked_fill((ago < 0) | (ago >= window), -math.inf)
        y = (torch.softmax(scores, -1) @ v).transpose(0, 1).reshape(length, -1)
        return y @ self.weights[at + "o_proj.weight"].T

    def rotated(self, x: torch.Tensor) -> torch.Tensor:
        frequencies = 1e4 ** (-torch.arange(8) / 8)
        angles = torch.arange(x.shape[1])[:, None] * frequencies
        a, b = x.chunk(2, -1)
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


if __name__ == "__main__":
    with_transformers()
    by_hand()
