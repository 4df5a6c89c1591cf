"""A small mixture of experts, trained from nothing: python samples/train_mixture.py OUT [--steps 400] [--seed 1]

OUT becomes a folder for `shoal convert`: a SmallThinker (Song et al. 2025) over bytes, whose routers read what enters a
block and whose experts have ReLU gates, trained in plain torch on shoal's calibration text with a loss that balances
its experts (Fedus et al. 2022, Switch Transformers). OUT/figures.json says how it was made and, of the held-out text,
which it never saw: its bits per byte beside those of models that count, how its experts are used, and how many of
their neurons are 0. The same seed and threads give the same bytes on the same machine. It needs torch (shoal[train]).
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import tokenizers
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from shoal.converters.text import CALIBRATION, HELDOUT

SPECIAL = ["<pad>", "<s>", "</s>", "<|user|>"]
CONFIG = {
    "model_type": "smallthinker", "vocab_size": len(SPECIAL) + 256, "hidden_size": 128, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 128,
    "moe_num_primary_experts": 32, "moe_num_active_primary_experts": 4, "moe_ffn_hidden_size": 32,
    "moe_primary_router_apply_softmax": False, "rope_theta": 10000.0, "rope_layout": [1, 1, 1, 0],
    "sliding_window_layout": [1, 1, 1, 0], "sliding_window_size": 64, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
HIDDEN, LENGTH = CONFIG["hidden_size"], CONFIG["max_position_embeddings"]
EXPERTS, TOP, WIDTH = (CONFIG[f"moe_{key}"] for key in
                       ("num_primary_experts", "num_active_primary_experts", "ffn_hidden_size"))  # fmt: skip
BATCH = 32  # rows of LENGTH bytes
RATE, MOMENTUM, BALANCE = 5e-3, 0.95, 0.01


def linear(inputs: int, outputs: int) -> nn.Linear:
    made = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(made.weight, 0, inputs**-0.5)
    return made


class Attention(nn.Module):
    """Causal, of grouped queries; over a window and with rotated positions, or over everything and without."""

    def __init__(self, block: int):
        super().__init__()
        self.size, heads, pairs = CONFIG["head_dim"], CONFIG["num_attention_heads"], CONFIG["num_key_value_heads"]
        self.q_proj = linear(HIDDEN, heads * self.size)
        self.k_proj, self.v_proj = (linear(HIDDEN, pairs * self.size) for _ in range(2))
        self.o_proj = linear(heads * self.size, HIDDEN)
        positions = torch.arange(LENGTH)
        frequencies = CONFIG["rope_theta"] ** (-torch.arange(self.size // 2) / (self.size // 2))
        angles = positions[:, None] * frequencies * CONFIG["rope_layout"][block]
        self.cosines, self.sines = angles.cos(), angles.sin()
        ago = positions[:, None] - positions
        window = CONFIG["sliding_window_size"] if CONFIG["sliding_window_layout"][block] else LENGTH
        self.seen = (ago >= 0) & (ago < window)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[1]
        q, k, v = (made(x).unflatten(-1, (-1, self.size)).transpose(1, 2)
                   for made in (self.q_proj, self.k_proj, self.v_proj))  # fmt: skip
        seen = self.seen[:length, :length]
        y = functional.scaled_dot_product_attention(self.rotated(q), self.rotated(k), v, seen, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def rotated(self, x: torch.Tensor) -> torch.Tensor:
        (a, b), cosines, sines = x.chunk(2, -1), self.cosines[: x.shape[2]], self.sines[: x.shape[2]]
        return torch.cat([a * cosines - b * sines, b * cosines + a * sines], -1)


class Mixture(nn.Module):
    """Each token through the experts that its router scores highest. Keeps what it did with the last text: `scores`
    [rows, length, experts], the chosen `ids` [rows, length, top] and the share of the chosen's neurons that were 0."""

    def __init__(self):
        super().__init__()
        self.primary_router = linear(HIDDEN, EXPERTS)
        self.gate_up = nn.Parameter(torch.randn(EXPERTS, HIDDEN, 2 * WIDTH) * HIDDEN**-0.5)
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN) * WIDTH**-0.5)

    def forward(self, entering: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        self.scores = torch.sigmoid(self.primary_router(entering))
        best, self.ids = self.scores.topk(TOP)
        shares = best / best.sum(-1, keepdim=True)
        order = self.ids.flatten().argsort(stable=True)  # an expert's tokens are one product
        tokens, counts = order // TOP, self.ids.flatten().bincount(minlength=EXPERTS).tolist()
        given, zeros = [], 0
        parts = x.flatten(0, 1).index_select(0, tokens).split(counts)
        for part, gate_up, down in zip(parts, self.gate_up, self.down, strict=True):
            gate, up = (part @ gate_up).chunk(2, -1)
            given.append((torch.relu(gate) * up) @ down)
            zeros += (gate <= 0).sum().item()
        self.zeros = zeros / (len(order) * WIDTH)
        weighed = torch.cat(given) * shares.flatten()[order][:, None]
        return torch.zeros_like(x).flatten(0, 1).index_add(0, tokens, weighed).view_as(x)

    def balance(self) -> torch.Tensor:
        """1 where all experts are chosen alike often, more where not."""
        chosen = self.ids.flatten().bincount(minlength=EXPERTS) / self.ids.numel()
        return EXPERTS * (chosen * functional.normalize(self.scores, 1, -1).mean((0, 1))).sum()


class Block(nn.Module):
    def __init__(self, block: int):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = (nn.RMSNorm(HIDDEN, 1e-5) for _ in range(2))
        self.self_attn, self.block_sparse_moe = Attention(block), Mixture()

    def forward(self, entering: torch.Tensor) -> torch.Tensor:
        x = entering + self.self_attn(self.input_layernorm(entering))
        return x + self.block_sparse_moe(entering, self.post_attention_layernorm(x))


class Model(nn.Module):
    """Token ids [rows, length] -> logits [rows, length, vocabulary]."""

    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(CONFIG["vocab_size"], HIDDEN)
        nn.init.normal_(self.embed_tokens.weight, 0, HIDDEN**-0.5)
        self.layers = nn.ModuleList(Block(block) for block in range(CONFIG["num_hidden_layers"]))
        self.norm = nn.RMSNorm(HIDDEN, 1e-5)

    @property
    def mixtures(self) -> list[Mixture]:
        return [layer.block_sparse_moe for layer in self.layers]

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return functional.linear(self.norm(x), self.embed_tokens.weight)


def tokenizer() -> tokenizers.Tokenizer:
    """Special tokens, then one token a byte."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(SPECIAL + alphabet)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(SPECIAL)
    return made


def encode(text: str) -> torch.Tensor:
    """Token ids [bytes]."""
    return torch.tensor(tokenizer().encode(text).ids)


def loss(model: Model, rows: torch.Tensor) -> torch.Tensor:
    """Nats a byte, of all bytes of `rows` [count, length] but each one's first."""
    return functional.cross_entropy(model(rows)[:, :-1].flatten(0, 1), rows[:, 1:].flatten())


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """Of each [..., rows, columns] the nearest matrix whose singular values are about 1, times what makes its values
    as large as AdamW's steps (Jordan et al. 2024, Muon; Liu et al. 2025)."""
    x = matrices if matrices.shape[-2] <= matrices.shape[-1] else matrices.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (2.0315 * square @ square - 4.775 * square) @ x
    x = x if matrices.shape[-2] <= matrices.shape[-1] else x.mT
    return 0.2 * max(x.shape[-2:]) ** 0.5 * x


def train(text: torch.Tensor, steps: int, seed: int) -> Model:
    """A model that saw `steps` batches of stretches of `text`, token ids. Attention and experts learn by Muon, the
    others by AdamW."""
    torch.manual_seed(seed)
    model, began, mean = Model(), time.monotonic(), 0.0
    matrices = [value for name, value in model.named_parameters() if value.ndim == 3 or ".self_attn." in name]
    velocities = [torch.zeros_like(value) for value in matrices]
    known = set(map(id, matrices))
    others = torch.optim.AdamW([value for value in model.parameters() if id(value) not in known], betas=(0.9, 0.95))
    for step in range(1, steps + 1):
        starts = torch.randint(len(text) - LENGTH + 1, (BATCH, 1))
        found = loss(model, text[starts + torch.arange(LENGTH)])
        balance = torch.stack([mixture.balance() for mixture in model.mixtures]).mean()
        model.zero_grad()
        (found + BALANCE * balance).backward()
        rate = RATE * min(20 * step / steps, 1 - (step - 1) / steps)
        others.param_groups[0]["lr"] = rate
        others.step()
        with torch.no_grad():
            for value, velocity in zip(matrices, velocities, strict=True):
                velocity.lerp_(value.grad, 1 - MOMENTUM)
                value -= rate * orthogonal(velocity.lerp(value.grad, 1 - MOMENTUM))
        mean += (found.item() / math.log(2) - mean) / min(step, 10)
        if step % 10 == 0 or step == steps:
            print(f"step {step} of {steps}: {mean:.3f} bits per byte, {time.monotonic() - began:.0f} s", flush=True)
    return model.eval()


def counted() -> list[float]:
    """Bits per byte of the held-out text by models that count, in the calibration text, what follows no byte, one and
    two (Witten and Bell 1991)."""
    seen, asked = (np.frombuffer(text.encode(), np.uint8).astype(np.int64) for text in (CALIBRATION, HELDOUT))
    chance, found = np.full(len(asked) - 2, 1 / 256), []
    for order in (1, 2, 3):
        codes, these = (sum(text[2 - back : len(text) - back] << 8 * back for back in range(order))
                        for text in (seen, asked))  # fmt: skip
        counts = np.bincount(codes, minlength=256**order).reshape(-1, 256)
        rows, kinds = counts.sum(1)[these >> 8], np.count_nonzero(counts, 1)[these >> 8]
        better = (counts.ravel()[these] + kinds * chance) / np.maximum(rows + kinds, 1)
        chance = np.where(kinds > 0, better, chance)
        found.append(float(-np.log2(chance).mean()))
    return found


@torch.no_grad()
def measure(model: Model) -> dict:
    """Figures of the held-out text, in rows of LENGTH bytes: bits per byte, of all and of every 16th row (for who has
    less time), and of each layer the share of all uses that its least and its most used expert have, how many of a
    token's experts the token before used as well and how many that would be by chance, and how many of the chosen
    experts' neurons are 0."""
    rows = encode(HELDOUT)
    rows = rows[: len(rows) // LENGTH * LENGTH].view(-1, LENGTH)
    nats, layers = 0.0, [{"ids": [], "zeros": 0.0} for _ in model.mixtures]
    for part in rows.split(BATCH):
        nats += loss(model, part).item() * len(part) / len(rows)
        for layer, mixture in zip(layers, model.mixtures, strict=True):
            layer["ids"].append(mixture.ids)
            layer["zeros"] += mixture.zeros * len(part) / len(rows)
    found = []
    for layer in layers:
        ids = torch.cat(layer["ids"])
        uses = ids.flatten().bincount(minlength=EXPERTS) / ids.numel()
        again = (ids[:, 1:, :, None] == ids[:, :-1, None]).any(-1).float().mean()
        found.append({
            "least_used": uses.min().item(), "most_used": uses.max().item(), "used_again": again.item(),
            "by_chance": TOP * uses.square().sum().item(), "zero_neurons": layer["zeros"],
        })  # fmt: skip
    some = loss(model, rows[::16]).item()
    return {"bits_per_byte": nats / math.log(2), "every_16th_row": some / math.log(2), "layers": found}


def write(model: Model, out: Path) -> None:
    """What `shoal convert` reads, in fp16."""
    tensors = {}
    for name, value in model.state_dict().items():
        if value.ndim < 3:
            tensors[f"model.{name}"] = value.half()
            continue
        parent, part = name.rsplit(".", 1)
        for expert, matrix in enumerate(value):
            for kind, one in zip(part.split("_"), matrix.chunk(2, -1) if "_" in part else [matrix], strict=True):
                tensors[f"model.{parent}.experts.{expert}.{kind}.weight"] = one.T.half().contiguous()
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(CONFIG, indent=1) + "\n")
    tokenizer().save(str(out / "tokenizer.json"))


def make(out: Path, steps: int, seed: int) -> dict:
    """Writes the folder; returns its figures."""
    model = train(encode(CALIBRATION), steps, seed)
    for value in model.parameters():
        value.data = value.data.half().float()  # measured is what is written
    write(model, out)
    names = ("one_byte", "two_bytes", "three_bytes")
    made = {"steps": steps, "seed": seed, "torch": torch.__version__, "threads": torch.get_num_threads()}
    figures = made | measure(model) | {"counted": dict(zip(names, counted(), strict=True))}
    (out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    found = make(arguments.out, arguments.steps, arguments.seed)
    counts = ", ".join(f"{value:.3f}" for value in found["counted"].values())
    print(f"held out: {found['bits_per_byte']:.3f} bits per byte; by counting one, two and three bytes {counts}")
    for number, layer in enumerate(found["layers"]):
        print(
            f"layer {number}: an expert has {layer['least_used']:.1%} to {layer['most_used']:.1%} of the uses, "
            f"{layer['used_again']:.0%} are the last byte's experts (by chance {layer['by_chance']:.0%}), "
            f"{layer['zero_neurons']:.0%} of the neurons are 0"
        )
