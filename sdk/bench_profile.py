"""Where the time of a step goes: each operator with its time, the bytes of weights or cache it reads and the
multiply-adds it does, against what this machine can: a stream read of the same weights, and int8 products in the first
cache. The engine's own timings; they cost a few per cent, so the sum is a little more than a step takes.
"""

import json
import os
import re
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shoal.runtime import kernels, onnx_wire
from shoal.runtime.bitstack.layout import entry_bytes
from shoal.runtime.errors import UsageError
from shoal.runtime.model import load

from . import bench_machine as machine

_WARM = 3  # steps before those that count
_BLOCK = re.compile(r"^\d+/")


@dataclass
class Line:
    """One operator, all blocks together, of one step: `count` nodes, milliseconds, bytes read, multiply-adds."""

    name: str
    count: int = 0
    ms: float = 0.0
    bytes: int = 0
    products: int = 0


def profile(bundle: str, *, prompt: int, depth: int, steps: int = 16, threads: int = 0, **loading) -> dict:
    """Profiles a decode step at `depth` and a prefill step of `prompt` tokens behind it: {"decode": table, "prefill":
    table, "stream_read_gb_per_s", "peak_gmac_per_s"}; a table is a list of dicts. Raises UsageError for an encoder."""
    threads = threads or machine.threads()
    found: dict = {"threads": threads, "depth": depth, "prompt": prompt}
    with tempfile.TemporaryDirectory() as folder:
        for stage, count, repeat in (("decode", 1, steps), ("prefill", prompt, 3)):
            prefix = str(Path(folder, stage))
            with load(
                bundle, context=depth + max(prompt, steps + _WARM) + 1, chunk=prompt, threads=threads, profile=prefix,
                **loading,
            ) as model:  # fmt: skip
                if model.card.task != "generate":
                    why = "It has no decode step."
                    raise UsageError("An encoder cannot be profiled.", why, "Name a language model.")
                decoder, ids = model.scheduler.decoder, np.random.default_rng(7).integers(0, model.card.vocab, prompt)
                for start in range(0, depth, prompt):
                    part = np.resize(ids, min(prompt, depth - start))
                    decoder.forward(0, part[None], [start], [len(part) - 1])
                done = -(-depth // prompt)
                for index in range(_WARM + repeat):
                    start = depth + (index if count == 1 else 0)
                    decoder.forward(0, ids[None, :count], [start], [count - 1])
                nodes = {node.name: node for node in model.parts.nodes}
                card, kv, weights = model.card, model.plan.kv, model.plan.rows[0].bytes
                held = _held(model)
                path = model.bundle.path
            (log,) = Path(folder).glob(f"{stage}*")
            lines = _lines(json.loads(log.read_text()), nodes, held, card, kv, count, depth, done + _WARM)
            found[stage] = [vars(line) for line in lines]
        size = min(weights, os.path.getsize(path))
        stream = machine.Stream([(str(path), 0, size)], threads)
        found["stream_read_gb_per_s"] = max(stream.run() for _ in range(5)) / 1e9
        stream.close()
    found["peak_gmac_per_s"] = kernels.peak(threads) / 1e9 if kernels.available() else None
    return found


def _lines(
    events: list[dict], nodes: dict, held: list[int], card, kv: str, count: int, depth: int, skipped: int
) -> list[Line]:
    """The mean step after the first `skipped` ones."""
    runs = sorted((e for e in events if e.get("name") == "model_run"), key=lambda event: event["ts"])[skipped:]
    begin, steps = runs[0]["ts"], len(runs)
    lines: dict[str, Line] = defaultdict(lambda: Line(""))
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time") or event["ts"] < begin:
            continue
        name = event["name"].removesuffix("_kernel_time")
        line = lines[_BLOCK.sub("", name)]
        line.name = _BLOCK.sub("", name)
        line.count += 1
        line.ms += event["dur"] / 1e3
        if name in nodes:
            read, products = _work(nodes[name], held, card, kv, count, depth)
            line.bytes += read
            line.products += products
    for line in lines.values():
        line.count, line.ms = round(line.count / steps), line.ms / steps
        line.bytes, line.products = line.bytes // steps, line.products // steps
    return sorted(lines.values(), key=lambda line: -line.ms)


def _held(model) -> list[int]:
    """Bytes of what is resident of each matrix of the stack."""
    stack = model.stack
    if stack is None:
        return []
    counts = stack.index.counts(stack.entries)
    return [
        sum(entry_bytes(one.steps[at]) for at in one.live(count))
        for one, count in zip(stack.index.matrices, counts, strict=True)
    ]


def _work(node: onnx_wire.Node, held: list[int], card, kv: str, count: int, depth: int) -> tuple[int, int]:
    """Bytes of weights or cache that a node reads, and its multiply-adds, in a step of `count` tokens after `depth`;
    `held` are the bytes of each stacked matrix. Of a stack the multiply-adds are those of the matrix it adds up to."""
    if node.op == "StackedLinear":
        rows = 1 if node.name.startswith("head") else count
        return held[node.integers["matrix"]], rows * node.integers["inputs"] * node.integers["outputs"]
    if node.op == "QuantizedLinear":
        names = ("inputs", "outputs", "bits", "group", "span", "rotated")
        format = kernels.LinearFormat(**{name: node.integers[name] for name in names})
        rows = 1 if node.name.startswith("head") else count
        return format.bytes, rows * format.inputs * format.outputs
    if node.op == "MatMulNBits":
        rows = 1 if node.name.startswith("head") else count
        size = node.integers["K"] * node.integers["N"]
        return size * node.integers["bits"] // 8, rows * size
    if node.op in ("CachedAttention", "GroupQueryAttention"):
        seen = sum(range(depth + 1, depth + count + 1))
        width = {"fp32": 4, "fp16": 2, "int8": 1}[kv]
        return 2 * (depth + count) * card.kv_heads * card.head_dim * width, 2 * seen * card.heads * card.head_dim
    return 0, 0


def render(found: dict) -> str:
    """The profile as Markdown."""
    stream, peak, text = found["stream_read_gb_per_s"], found["peak_gmac_per_s"], []
    titles = {
        "decode": f"decode, one token at depth {found['depth']}",
        "prefill": f"prefill, {found['prompt']} tokens at depth {found['depth']}",
    }
    for stage, title in titles.items():
        total = sum(line["ms"] for line in found[stage])
        text += [f"### {title}, {found['threads']} threads", "",
                 "| operator | nodes | ms | share | MB | GB/s | of stream read | GMAC | GMAC/s | of peak |",
                 "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
        for line in found[stage]:
            if line["ms"] < 0.002 * total:
                continue
            seconds = line["ms"] / 1e3
            rate, speed = line["bytes"] / seconds / 1e9, line["products"] / seconds / 1e9
            cells = [line["name"], str(line["count"]), f"{line['ms']:.2f}", f"{line['ms'] / total:.0%}"]
            read = [f"{line['bytes'] / 1e6:.1f}", f"{rate:.1f}", f"{rate / stream:.0%}"]
            cells += read if line["bytes"] else [""] * 3
            of_peak = f"{speed / peak:.0%}" if peak else ""
            cells += [f"{line['products'] / 1e9:.2f}", f"{speed:.0f}", of_peak] if line["products"] else [""] * 3
            text.append("| " + " | ".join(cells) + " |")
        text += [f"| sum | | {total:.2f} | | | | | | | |", ""]
    text.append(f"- stream read of the weights: {stream:.1f} GB/s")
    if peak:
        text.append(f"- int8 products in the first cache ({kernels.isa()}): {peak:.0f} GMAC/s")
    return "\n".join(text) + "\n"
