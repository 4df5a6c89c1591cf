"""A dense model becomes a mixture of experts: python samples/mixture.py MODEL OUT [--experts 24] [--top 8]

Each block's feed-forward is cut into experts by which of its channels work together (balanced k-means of the gate's
rows), and a router is trained to tell, from the input alone, which of them give most: least squares on what they gave
for shoal's calibration text. The chosen weigh 1 each, so that with all of them on the model is the dense one (Zhang et
al. 2022, MoEfication). MODEL is a Llama or Qwen2 checkpoint with silu gates; OUT a folder for `shoal convert`.
"""

import argparse
import dataclasses
import json
import struct
import tempfile
from pathlib import Path

import numpy as np

from shoal.converters import architectures
from shoal.converters.calibrate import calibration_rows
from shoal.converters.recipe import NAMED, Calibration
from shoal.converters.sources import open_source
from shoal.converters.walk import Scratch, Walk
from shoal.runtime.language.tokens import Tokenizer

_ROUNDS = 10  # of k-means
_RIDGE = 1e-2  # of the mean square of an input


def clusters(rows: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """Which of `count` equal groups each of `rows` fp32 [n, width] belongs to, int [n]; n is a multiple of count."""
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    room = len(rows) // count
    centres = rows[np.random.default_rng(seed).choice(len(rows), count, replace=False)]
    found = np.zeros(len(rows), int)
    for _ in range(_ROUNDS):
        alike = rows @ centres.T
        left = np.full(count, room)
        # Who gains most from its first choice over its second chooses first
        best = np.sort(alike, 1)
        for row in np.argsort(best[:, -2] - best[:, -1]):
            found[row] = next(group for group in np.argsort(-alike[row]) if left[group])
            left[found[row]] -= 1
        centres = np.stack([rows[found == group].mean(0) for group in range(count)])
        centres /= np.maximum(np.linalg.norm(centres, axis=1, keepdims=True), 1e-12)
    return found


def router(x: np.ndarray, given: np.ndarray) -> np.ndarray:
    """fp32 [experts, hidden] whose product with x [tokens, hidden] is nearest to `given` [tokens, experts], what each
    expert gave beside the mean of all."""
    moments = x.T @ x
    moments[np.diag_indices(len(moments))] += _RIDGE * np.trace(moments) / len(moments)
    wanted = given - given.mean(1, keepdims=True)
    return np.linalg.solve(moments, x.T @ (wanted / wanted.std())).T.astype(np.float32)


def split(source, prefix: str, x: np.ndarray, experts: int) -> tuple[dict[str, np.ndarray], float]:
    """The tensors of a block's mixture by name, and of what experts give the share that the router puts into its first
    third; x fp32 [tokens, hidden] are the feed-forward's inputs."""
    gate, up, down = (source.read(f"{prefix}.mlp.{part}_proj.weight") for part in ("gate", "up", "down"))
    groups = clusters(gate, experts)
    z = x @ gate.T
    work = np.abs(z / (1 + np.exp(-np.clip(z, -80, 80))) * (x @ up.T)) * np.linalg.norm(down, axis=0)
    given = np.stack([np.sqrt(np.square(work[:, groups == group]).sum(1)) for group in range(experts)], 1)
    weights = router(x, given)
    found = {f"{prefix}.mlp.gate.weight": weights}
    for group in range(experts):
        those = groups == group
        for name, part in (("gate", gate[those]), ("up", up[those]), ("down", down[:, those])):
            found[f"{prefix}.mlp.experts.{group}.{name}_proj.weight"] = np.ascontiguousarray(part)
    chosen = np.argsort(-(x @ weights.T), 1)[:, : -(-experts // 3)]
    return found, float(np.take_along_axis(given, chosen, 1).sum() / given.sum())


def write(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """A safetensors file."""
    header, at = {}, 0
    for name, array in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for array in tensors.values():
            file.write(np.ascontiguousarray(array, np.float32))


def make(model: str, out: Path, experts: int, top: int, tokens: int = 4096) -> list[float]:
    """Writes the folder; returns for each block what the router's first third of the experts gives of all."""
    with open_source(model) as source, tempfile.TemporaryDirectory() as scratch:
        architecture, card = architectures.find(source)
        if card.model_type not in ("llama", "qwen2") or card.activation != "silu" or card.ffn % experts:
            raise SystemExit(
                f"It takes a Llama or Qwen2 with silu gates, and as many experts as divide its {card.ffn} channels."
            )
        tokenizer = source.tokenizer()
        recipe = dataclasses.replace(NAMED["int4-gptq"], calibration=Calibration(tokens=tokens))
        walk = Walk(architecture, card, calibration_rows(recipe, card, Tokenizer.from_json(tokenizer)))
        tensors = {name: source.read(name) for name in source.tensors() if ".mlp." not in name}
        shares = []
        for block in range(card.blocks):
            one = range(block, block + 1)
            with Scratch(source, Path(scratch)) as exact:
                wanted = f"model.layers.{block}.mlp.gate_proj"
                x = np.concatenate([
                    seen for inputs in walk.inputs(one, exact) for names, seen in inputs.items() if names[0] == wanted
                ])  # fmt: skip
                found, share = split(source, f"model.layers.{block}", x, experts)
                walk.advance(one, exact)
            tensors |= found
            shares.append(share)
            print(f"block {block}: the first third of the experts gives {share:.0%}")
        out.mkdir(parents=True, exist_ok=True)
        write(out / "model.safetensors", tensors)
        (out / "tokenizer.json").write_bytes(tokenizer)
        if template := source.chat_template():
            (out / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
        config = {
            "model_type": "shoal_moe", "hidden_size": card.hidden, "num_hidden_layers": card.blocks,
            "num_attention_heads": card.heads, "num_key_value_heads": card.kv_heads, "head_dim": card.head_dim,
            "intermediate_size": card.ffn, "moe_intermediate_size": card.ffn // experts, "num_experts": experts,
            "num_experts_per_tok": top, "routing": "equal", "norm_topk_prob": False, "vocab_size": card.vocab,
            "max_position_embeddings": card.max_context, "rms_norm_eps": card.norm_eps, "hidden_act": "silu",
            "rope_theta": (1 / card.ropes[0].inverse_frequencies[1]) ** (card.head_dim / 2),
            "attention_bias": card.attention_bias, "tie_word_embeddings": card.tied, "bos_token_id": card.bos,
            "eos_token_id": list(card.eos), "add_bos_token": card.add_bos,
        }  # fmt: skip
        (out / "config.json").write_text(json.dumps(config, indent=1))
        return shares


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--experts", type=int, default=24)
    parser.add_argument("--top", type=int, default=8)
    arguments = parser.parse_args()
    make(arguments.model, arguments.out, arguments.experts, arguments.top)
