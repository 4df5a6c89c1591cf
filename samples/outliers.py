"""What 8 bits do to a language model's activations: python samples/outliers.py CHECKPOINT [--tokens 4096] [--json FILE]

Of a decoder whose matrices are rounded to int8, a scale an output channel, it measures perplexity of held-out text and
how often the most likely token is that of the checkpoint in float, with inputs of products in float, in int8 with one
static scale a tensor, with what clipping takes away restored (the shadow of llm.npu, Xu et al., ASPLOS 2025) for all
products or for the most important, with outliers spread by a Hadamard rotation of 64 channels instead, and with the
rows behind gates as large as they are. Rounding is done in a float graph, with the very numbers that `shoal convert
--recipe npu` writes.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from shoal.converters import architectures, parity
from shoal.converters.calibrate import calibration_rows, smooth
from shoal.converters.graph import GraphBuilder
from shoal.converters.recipe import NAMED
from shoal.converters.sources import open_source
from shoal.converters.static import graphs
from shoal.converters.static.scales import Seen, even, largest, round_weights, with_shadow, without_shadow
from shoal.converters.text import HELDOUT
from shoal.converters.walk import Scratch, Walk, opened
from shoal.converters.weights import Factors, Stored
from shoal.runtime.kernels.layout import rotate
from shoal.runtime.language.tokens import Tokenizer

SHARES = (1.0, 0.5, 0.25, 0.15, 0.05, 0.0)
FINE, FREE = 1e-6, 1e30  # a scale that rounds nothing away, a limit that clips nothing
MORE = (0.02, 0.04)  # of channels beyond the clip in a chunk: smaller scales, more work beside the device
ROWS = 8  # of calibration text, as convert has it


class Simulated(GraphBuilder):
    """A decoder whose matrices are rounded and whose products round their inputs as `scales`, `low` and `high` say,
    fp32 [products]; behind a gate rows are made even before, with `evens`."""

    def __init__(self, weights, products: int, turn: bool, evens: bool, exact: bool):
        super().__init__("simulated", weights)
        self.turn, self.evens, self.exact, self.at = turn, evens, exact, 0
        self.gates = set()
        if not exact:
            self.controls = [
                self.op("Split", self.input(name, "float32", [products]), count=products, axis=0, num_outputs=products)
                for name in ("scales", "low", "high")
            ]

    def linear(self, names, x, bias=False, role="linear", after="", norm=None, residual=None, mixes=""):
        names = (names,) if isinstance(names, str) else names
        rows = np.concatenate(list(self.weights.slices(tuple(f"{name}.weight" for name in names))))
        if not self.exact:
            codes, scales = round_weights(rotate(rows) if self.turn else rows)
            rows = codes * scales[:, None]
        x = self.rms(x, norm) if norm else x
        size = None
        if not self.exact:
            if self.evens and x in self.gates:
                x, size = graphs.even(self, x)
            if self.turn:
                blocks = self.op("Reshape", x, self.constant([0, 0, -1, 64]))
                turned = self.op("MatMul", blocks, self.constant(rotate(np.eye(64, dtype=np.float32)), np.float32))
                x = self.op("Reshape", turned, self.constant([0, 0, -1]))
            scale, low, high = (control[self.at] for control in self.controls)
            self.at += 1
            q = self.op("Round", self.op("Div", x, scale))
            x = self.op("Mul", self.op("Min", self.op("Max", q, low), high), scale)
        sink = self.weights.sink
        start = sink.tell()
        sink.write(np.ascontiguousarray(rows, np.float32))
        stored = Stored(f"{names[0]}.simulated", "float32", rows.shape, start, rows.nbytes)
        y = self.op("FusedMatMul", x, self.external(stored), domain="com.microsoft", transB=1)
        y = y if size is None else self.op("Mul", y, size)
        if bias:
            y = self.op("Add", y, self.external(self.weights.stacked(tuple(f"{name}.bias" for name in names))))
        return y if residual is None else self.op("Add", y, residual)

    def gated(self, names, x, activation, after, norm, role="linear"):
        gated = self.gate(self.linear(names, x, norm=norm), activation)
        self.gates.add(gated)
        return gated


class Model:
    """A checkpoint, and where scratch files go."""

    def __init__(self, source, folder: Path):
        self.source, self.folder = source, folder
        self.architecture, self.card = architectures.find(source)
        self.tokenizer = Tokenizer.from_json(source.tokenizer())
        rows = calibration_rows(NAMED["npu"], self.card, self.tokenizer)
        self.rows, self.all_rows = rows[:: -(-len(rows) // ROWS)], rows

    def factors(self) -> Factors:
        with Scratch(self.source, self.folder) as scratch:
            return smooth(self.architecture, self.card, scratch.weights, self.all_rows, self.folder, peaks=True)

    def fits(self, factors: Factors | None, turn: bool, evens: bool) -> list[dict]:
        """Of each product, in the graph's order: its scales with and without a shadow, and of its largest value."""
        walk, found = Walk(self.architecture, self.card, self.rows), []
        for block in range(self.card.blocks):
            one, seen = range(block, block + 1), {}
            with Scratch(self.source, self.folder, factors=factors) as scratch:
                for inputs in walk.inputs(one, scratch):
                    for names, x in inputs.items():
                        x = even(x) if evens and names[0].endswith(".down_proj") else x
                        x = rotate(x) if turn else x
                        seen.setdefault(names, Seen()).add(x, len(self.rows))
                walk.advance(one, scratch)
                for names in seen:
                    rows = np.concatenate(list(scratch.weights.slices(tuple(f"{name}.weight" for name in names))))
                    codes, scales = round_weights(rotate(rows) if turn else rows)
                    given = seen[names], codes * scales[:, None], scales / scales.max()
                    shadow, alone = with_shadow(*given), without_shadow(*given)
                    more = {f"{beyond:.0%}": with_shadow(*given, beyond).scale for beyond in MORE}
                    found.append({
                        **more,
                        "names": names, "shadow": shadow.scale, "alone": alone.scale, "largest": largest(seen[names]),
                        "beyond": shadow.beyond * x.shape[1],
                        "hot": len(shadow.hot), "inputs": x.shape[1], "errors": (shadow.error, alone.error),
                        "importance": alone.error - shadow.error,
                    })  # fmt: skip
        return found

    def figures(
        self, texts, factors, turn, evens, controls: dict[str, dict | None], best: list | None
    ) -> Iterator:  # fmt: skip
        """(name, perplexity, top-1 agreement, what is most likely) for each way to round; `best` has what is to agree
        with."""
        exact = None in controls.values()
        count = 0 if exact else len(next(iter(controls.values()))["scales"])
        with Scratch(self.source, self.folder, factors=factors) as scratch:
            g = Simulated(scratch.weights, count, turn, evens, exact)
            self.architecture.build(g, self.card, range(self.card.blocks))
            walk = Walk(self.architecture, self.card, texts)
            with opened(g.serialize(), scratch.places, False) as session:
                for name, control in controls.items():
                    loss = predicted = agreed = 0
                    chosen = []
                    for index, tokens in enumerate(texts):
                        feeds = walk.feeds(tokens[None], range(self.card.blocks)) | {"rows": np.arange(len(tokens))}
                        logits = session.run(feeds | (control or {}), ["logits"])["logits"]
                        chosen.append(logits.argmax(-1))
                        agreed += int((chosen[-1] == (best[index] if best else chosen[-1])).sum())
                        at = np.arange(len(tokens) - 1)
                        most = logits.max(-1)
                        total = np.log(np.exp(logits - most[:, None]).sum(-1)) + most
                        loss += float((total[:-1] - logits[at, tokens[1:]]).sum(dtype=np.float64))
                        predicted += len(at)
                    yield name, float(np.exp(min(loss / predicted, 700))), agreed / sum(map(len, texts)), chosen


def controls(fits: list[dict], share: float | None, alone: str = "alone") -> dict[str, np.ndarray]:
    """How products round: `share` of them, the most important, with a shadow; None: in float."""
    ranked = sorted(range(len(fits)), key=lambda at: -fits[at]["importance"])
    kept = set(range(len(fits)) if share is None else ranked[: round(share * len(fits))])
    scales = [FINE if share is None else fit["shadow" if at in kept else alone] for at, fit in enumerate(fits)]
    free = [FREE if at in kept else 1 for at in range(len(fits))]
    return {
        "scales": np.array(scales, np.float32), "low": np.array([-128 * f for f in free], np.float32),
        "high": np.array([127 * f for f in free], np.float32),
    }  # fmt: skip


def measure(checkpoint: Path, tokens: int) -> dict:
    with open_source(checkpoint) as source, tempfile.TemporaryDirectory(prefix="shoal-") as folder:
        model = Model(source, Path(folder))
        texts = parity.stretches(model.tokenizer, model.card, HELDOUT, tokens)
        found: dict = {"checkpoint": checkpoint.name, "tokens": sum(map(len, texts)), "figures": {}}
        best = None

        def take(factors, turn, evens, wanted, prefix=""):
            nonlocal best
            for name, perplexity, agreed, chosen in model.figures(texts, factors, turn, evens, wanted, best):
                best = best or chosen
                found["figures"][prefix + name] = (perplexity, agreed)
                print(f"{prefix + name:40} perplexity {perplexity:10.3f}   top-1 {agreed:6.1%}", flush=True)

        take(None, False, False, {"float": None})
        factors = model.factors()
        fits = model.fits(factors, False, True)
        sixteen = controls(fits, 0.0, "largest")
        wanted = {"int8 weights, float inputs": controls(fits, None)}
        for beyond in [f"{share:.0%}" for share in MORE]:
            wanted[f"shadow 100%, {beyond} of channels"] = controls(
                [{**fit, "shadow": fit[beyond]} for fit in fits], 1.0
            )
        wanted |= {f"shadow {share:.0%}": controls(fits, share) for share in SHARES}
        wanted["no shadow, absmax"] = controls(fits, 0.0, "largest")
        wanted["16 bits, absmax"] = {
            "scales": sixteen["scales"] / 256,
            "low": sixteen["low"] * 256,
            "high": sixteen["high"] * 256,
        }
        take(factors, False, True, wanted)
        inputs = sum(fit["inputs"] for fit in fits)
        found["beyond"], found["hot"] = (sum(fit[key] for fit in fits) / inputs for key in ("beyond", "hot"))
        found["products"] = [{**fit, "names": list(fit["names"])} for fit in fits]
        print(f"channels beyond the clip {found['beyond']:.2%} in a chunk, hot {found['hot']:.2%}", flush=True)
        turns = all(fit["inputs"] % 64 == 0 for fit in fits)
        for prefix, used, turn, evens in (
            ("rotated, ", factors, True, True), ("not even, ", factors, False, False),
            ("rotated, not even, ", factors, True, False), ("not smoothed, ", None, False, True),
        ):  # fmt: skip
            if turn and not turns:
                continue
            fits = model.fits(used, turn, evens)
            wanted = {
                "int8 weights, float inputs": controls(fits, None), "shadow 100%": controls(fits, 1.0),
                "shadow 0%": controls(fits, 0.0), "no shadow, absmax": controls(fits, 0.0, "largest"),
            }  # fmt: skip
            take(used, turn, evens, wanted, prefix)
        return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = measure(arguments.checkpoint, arguments.tokens)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))
