"""Memory is a promise: what `plan` said before loading is what the kernel counts afterwards, row by row, and neither
opening, the first time or later, nor the longest prompt takes a process over its budget. Each cell is a process of its
own, since memory that another test left in the heap would hide in a row."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import shoal
from shoal.runtime import budget, kernels
from shoal.runtime.budget import MIB
from shoal.runtime.errors import BudgetError
from shoal.runtime.model import plan

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
TINY = Path(__file__).parents[1] / "data" / "tiny"

CELL = """
import json, random, sys, threading
import numpy, onnxruntime, shoal
from shoal.runtime import measure, model

path, options = sys.argv[1], json.loads(sys.argv[2])
start, before, peaks, over = measure.resident_bytes(), measure.anonymous_bytes(), {}, threading.Event()

def sample(stage=[""]):
    while not over.wait(0.002):
        peaks["serve" if made else "load"] = max(peaks.get("serve" if made else "load", 0), measure.resident_bytes())

made = []
threading.Thread(target=sample, daemon=True).start()
with shoal.load(path, **options) as loaded:
    made.append(loaded)
    draw, longest = random.Random(0), loaded.plan.context - 20
    lengths = [longest] + [longest // 2 + 7 * slot for slot in range(1, loaded.plan.slots)]
    prompts = [[draw.randrange(loaded.card.vocab) for _ in range(length)] for length in lengths]  # of rows far apart
    for generation in loaded.generate_batch(prompts, max_tokens=16, ignore_end=True):
        assert generation.stats.generated_tokens == 16
    print(json.dumps({
        "plan": loaded.plan.to_dict(), "rows": loaded.measure(), "peaks": {k: v - start for k, v in peaks.items()},
        "resident": measure.resident_bytes() - start, "anonymous": measure.anonymous_bytes() - before,
    }))
    over.set()
"""

HEAP = ("tokenizer", "engine", "activations")  # share pages of one heap: what one leaves free another takes


def measured(bundle, **options) -> dict:
    command = [sys.executable, "-c", CELL, str(bundle), json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def holds(bundle, memory: int, **options) -> None:
    """Whether one cell keeps every part of the promise."""
    said = plan(bundle, memory, **options)
    found = measured(bundle, memory=memory, **options)
    assert found["plan"] == said.to_dict(), "what was planned before loading is what is loaded"
    rows, differs = {row.name: row.bytes for row in said.rows}, []
    heap = sum(rows[name] for name in HEAP)
    for row in said.rows:
        have = found["rows"][row.name]
        if have is None:  # what comes and goes: only the peaks below show it
            continue
        base, least = (heap, 3 * MIB) if row.name in HEAP else (row.bytes, MIB)
        if abs(have - row.bytes) > max(base / 10, least):
            differs.append(f"{row.name}: planned {row.bytes / MIB:.2f} MiB, holds {have / MIB:.2f}")
    assert not differs, differs
    held = sum(found["rows"][name] for name in HEAP)
    assert "private weights" in rows or abs(held - heap) <= max(heap / 10, 3 * MIB), (heap, held)
    assert said.total <= memory and sum(filter(None, found["rows"].values())) <= memory
    assert found["resident"] <= memory and max(found["peaks"].values()) <= memory, (said.total, found)
    allowed = rows["key-value cache"] + rows["activations"] + rows["tokenizer"] + 64 * MIB
    assert "private weights" in rows or found["anonymous"] <= allowed


CELLS = [
    {"memory": 175_000_000},  # the context that fits
    {"memory": 320_000_000, "context": 1024, "slots": 3},
    {"memory": 180_000_000, "context": 700, "kv": "int8", "slots": 2},
]


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_rows_hold_what_was_planned(smollm2_bundle, cell):
    holds(smollm2_bundle, **cell)


def test_so_they_do_with_other_kernels_the_first_time_and_where_nothing_is_prepared(
    smollm2_bundle, tmp_path, monkeypatch
):
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path))
    options = {"context": 512, "kernels": "ort"}
    for made in (0, 2):  # weights in their layout, and repacked
        assert len(list(tmp_path.glob("*.cache"))) == made
        holds(smollm2_bundle, 216_000_000, **options)
    for prepare in (True, False):
        with pytest.raises(BudgetError, match="while it is opened"):  # its originals are read beside the copies
            plan(smollm2_bundle, 200_000_000, **options, prepare=prepare)
    found = measured(smollm2_bundle, memory=250_000_000, **options, prepare=False)
    assert max(found["resident"], *found["peaks"].values()) <= 250_000_000


def mixture(folder: Path) -> Path:
    """A Hugging Face folder of 4 layers of 32 experts with random weights, 0.4 MiB each in four bits."""
    shutil.copytree(TINY / "qwen3_moe", folder)
    config = json.loads((folder / "config.json").read_text()) | {
        "hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64,
        "moe_intermediate_size": 512, "num_experts": 32, "num_experts_per_tok": 4, "max_position_embeddings": 1024,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    experts = [f"mlp.experts.{e}.{part}_proj" for e in range(32) for part in ("gate", "up", "down")]
    shapes = dict.fromkeys(["self_attn.q_proj", "self_attn.o_proj", *experts], (512, 512)) | {
        "self_attn.k_proj": (128, 512), "self_attn.v_proj": (128, 512), "mlp.gate": (32, 512),
        "self_attn.q_norm": (64,), "self_attn.k_norm": (64,),
        "input_layernorm": (512,), "post_attention_layernorm": (512,),
    }  # fmt: skip
    whole = {
        "model.norm": (512,),
        "model.embed_tokens": (config["vocab_size"], 512),
        "lm_head": (config["vocab_size"], 512),
    }
    whole |= {f"model.layers.{layer}.{name}": shape for layer in range(4) for name, shape in shapes.items()}
    random = np.random.default_rng(0)
    tensors = {f"{name}.weight": random.standard_normal(shape, np.float32) / 20 for name, shape in whole.items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.skipif(not kernels.available(), reason=f"no kernels: {kernels.missing()}")
def test_experts_hold_what_was_planned(tmp_path):
    """Whatever the share of slots, a prompt that goes to all experts stays within the budget."""
    bundle = tmp_path / "m.shoal"
    shoal.convert(mixture(tmp_path / "mixture"), bundle, "int4", check_parity=False)
    whole = plan(bundle, context=700)
    of_experts = next(row.bytes for row in whole.rows if row.name == "experts")
    assert of_experts > 50 * MIB
    for share in (1, 0.5, 0.125):
        memory = whole.total - int(of_experts * (1 - share))
        found = measured(bundle, memory=memory, context=700)
        planned = next(row["bytes"] for row in found["plan"]["rows"] if row["name"] == "experts")
        assert abs(planned - of_experts * share) <= MIB and abs(found["rows"]["experts"] - planned) <= MIB
        assert max(found["resident"], found["anonymous"], *found["peaks"].values()) <= memory


@pytest.mark.deep
@pytest.mark.parametrize("name", ["qwen", "gemma"])
def test_larger_models_hold_too(request, name, tmp_path):
    bundle = tmp_path / "m.shoal"
    shoal.convert(request.getfixturevalue(f"{name}_gguf"), bundle, "int4", check_parity=False)
    least = plan(bundle, context=256).total
    for options in ({"context": 512}, {"context": 1024, "slots": 2}, {"context": 2048, "kv": "int8"}):
        holds(bundle, plan(bundle, **options).total, **options)
    assert least < plan(bundle, context=2048).total


def test_a_refusal_names_two_ways_out_and_both_work(smollm2_bundle):
    memory = plan(smollm2_bundle, context=448, chunk=32).total  # of int8 not 2048 tokens either, for its rotary tables
    with pytest.raises(BudgetError) as refused:
        shoal.load(smollm2_bundle, memory=memory, context=2048)
    assert refused.value.plan.table() in refused.value.why
    shorter = int(refused.value.fix.split("context of ")[1].split()[0])
    with shoal.load(smollm2_bundle, memory=memory, context=shorter) as model:
        assert model.plan.total <= memory < plan(smollm2_bundle, context=shorter + 64, chunk=model.plan.chunk).total
        assert model.generate([5] * (shorter - 4), max_tokens=2).finish() is not None
        # While it serves only what is elastic can change, and only that is offered
        with pytest.raises(BudgetError) as live:
            model.set_memory(memory // 2)
        least = int(live.value.fix.split("llow ")[1].split()[0]) * MIB
        assert "int8" not in live.value.fix
        assert model.set_memory(least).total <= least and model.plan.context >= budget.SHORTEST_CONTEXT
        with pytest.raises(BudgetError):
            model.set_context(shorter)  # the budget is the latest one
        assert model.set_memory(memory).total <= memory
        assert model.generate([5] * 40, max_tokens=2).finish() is not None
    allowed = int(refused.value.fix.split("llow ")[1].split()[0]) * MIB
    with shoal.load(smollm2_bundle, memory=allowed, context=2048) as model:
        assert model.plan.total <= allowed
    with pytest.raises(BudgetError) as refused:
        plan(smollm2_bundle, memory, context=700)
    assert "int8" in refused.value.fix and plan(smollm2_bundle, memory, context=700, kv="int8").total <= memory
