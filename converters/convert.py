"""A checkpoint becomes a bundle: a straight line from source to report.

Weights stream through once, slice by slice; what cannot be converted is refused before anything is written, and a
conversion that fails or is interrupted leaves nothing behind, but for the matrices of a stack that are done: a second
try goes on from these. The same source, recipe and version give the same bytes.
"""

import dataclasses
import hashlib
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path

import numpy as np

from shoal.runtime import session
from shoal.runtime.bitstack.layout import Index
from shoal.runtime.bundle import Graph, create
from shoal.runtime.bundle.write import Writer
from shoal.runtime.card import Card
from shoal.runtime.errors import UsageError
from shoal.runtime.events import Event, Progress, silent
from shoal.runtime.language.tokens import Tokenizer
from shoal.runtime.measure import PeakAnonymous

from . import architectures, auto, contexts, parity, parts
from . import recipe as recipes
from .bitstack.measure import Meter
from .bitstack.sort import drop_rivals, orders
from .bitstack.stacks import Stacks
from .bitstack.work import Work
from .caches import cache_scales
from .calibrate import calibrate, calibration_rows, smooth, stack, unseen_rows
from .experts import records
from .experts.names import all_experts
from .graph import GraphBuilder
from .recipe import Recipe
from .report import Parity, Report, parity_to_json
from .sources import open_source
from .static import write as static
from .text import CALIBRATION, HELDOUT
from .walk import Scratch, stream
from .weights import Weights

STATIC_ROWS = 8  # of calibration text that say how large activations get
PIECES, SHORT, LONG = 4, 128, 4  # proxy orders of a stack, tokens of each; calibration rows for the others
JUDGED = 8  # rows that say which proxy order is best
CURVE_TOKENS, CURVE_POINTS = 1024, 9


def convert(
    source: str | Path, out: str | Path, recipe: str | Path | Recipe = "int4", *, overwrite: bool = False,
    check_parity: bool = True, calibration_text: str | Path | None = None, blocks: str | range | None = None,
    memory: int | None = None, npu: Iterable[str] = (), progress: Progress = silent,
) -> Report:  # fmt: skip
    """Converts the checkpoint `source` (GGUF file or Hugging Face folder) to the bundle `out`.

    The recipe "auto" is whichever predicts held-out text best within `memory` bytes (see auto.py).
    `blocks` (a range, or "8:30") makes a part of a language model: those blocks, with the embedding before the first
    and the head after the last, bit for bit as the whole bundle has them. For the processors in `npu` (qnn:sm8650) the
    static graphs are compiled ahead, which needs onnxruntime-qnn. With `check_parity` the bundle is compared with its
    source in fp32 and the figures are stored in it. Raises SourceError, ConvertError, UsageError, StorageError,
    MissingPackageError, BackendError; `out` then is as it was.
    """
    if recipe == "auto":
        if blocks is not None or calibration_text is not None or tuple(npu):
            raise UsageError(
                "The recipe 'auto' takes neither blocks nor a calibration text nor an npu.",
                "It tries several recipes.", "Name one of them.",
            )  # fmt: skip
        return auto.best(
            source, out, memory, convert, overwrite=overwrite, check_parity=check_parity, progress=progress
        )
    if memory is not None:
        raise UsageError("A memory was given.", "Only the recipe 'auto' asks for one.", "Leave it out, or name auto.")
    chosen = recipes.load(recipe)
    if calibration_text is not None:
        if not chosen.reads_text:
            raise UsageError(
                f"The recipe {chosen.name!r} takes no calibration text.", "It rounds to nearest.",
                "Leave the text out, or name a recipe with method = \"gptq\" or smooth = true.",
            )  # fmt: skip
        chosen = dataclasses.replace(
            chosen, calibration=dataclasses.replace(chosen.calibration, text=str(calibration_text))
        )
    compiler, socs = contexts.compiler(npu)
    if socs and (chosen.static is None or chosen.static.backend != "npu"):
        raise UsageError(
            f"Nothing of the recipe {chosen.name!r} can be compiled for an npu.", "It makes no static graphs for one.",
            "Name the recipe npu, or leave --npu out.",
        )  # fmt: skip
    seconds: dict[str, float] = {}
    with (
        open_source(source) as checkpoint, PeakAnonymous() as peak, create(out, overwrite=overwrite) as writer,
        ExitStack() as undo,
    ):  # fmt: skip
        _refuse_its_own_source(Path(source), Path(out))
        architecture, card = architectures.find(checkpoint)
        tokenizer_json = checkpoint.tokenizer()
        tokenizer = Tokenizer.from_json(tokenizer_json)
        card = dataclasses.replace(card, tokenizer_bytes=tokenizer.nbytes)
        # Of a calibration text its name alone: where it lay is nobody's business and would change the bytes
        calibration = dataclasses.replace(chosen.calibration, text=Path(chosen.calibration.text).name)
        named = dataclasses.replace(chosen, calibration=calibration)
        if blocks is not None:
            card = parts.part(card, parts.parse(blocks), named, checkpoint)
        if chosen.static is not None:
            static.refuse(card, chosen)
        experts = records.stored(chosen, card, architecture)
        stacks = _stacks(Path(source), Path(out), chosen, named, card, undo) if chosen.ladder is not None else None
        compared: Parity | None = None
        baseline: Parity | None = None
        kept: records.Records | None = None
        with writer.scratch() as folder, ExitStack() as within:
            if experts is not None:
                kept = records.Records(checkpoint, chosen, card, experts, folder, progress)
                within.callback(kept.close)
                if chosen.method != "gptq":
                    with timed(seconds, "experts"):
                        for block in card.routed_blocks:
                            kept.add(block)
            with writer.section("weights", "weights", alignment=4096, required=True) as section:

                def places() -> dict[str, session.Place]:
                    return {"weights": session.Place(str(writer.path), section.offset, section.tell())}

                weights = Weights(checkpoint, chosen, section, progress, stacks=stacks)
                if experts is not None:
                    weights.records = kept
                    weights.elsewhere(chain.from_iterable(all_experts(card, experts)))
                if chosen.reads_text:
                    with timed(seconds, "calibrate"):
                        rows = calibration_rows(chosen, card, tokenizer)
                        if chosen.smooth:
                            peaks = chosen.static is not None and chosen.static.bits == 8
                            weights.factors = smooth(architecture, card, weights, rows, folder, progress, peaks)
                        if chosen.method == "gptq":
                            calibrate(architecture, card, weights, places, rows, folder, progress)
                        if stacks is not None:
                            stack(architecture, card, weights, places, rows, folder, progress)
                with timed(seconds, "convert"):
                    graph = build(architecture, card, weights)
            if kept is not None:
                _add_experts(writer, kept, weights)
            with timed(seconds, "graphs"):
                kind = "embed" if card.task == "embed" else "part" if card.is_part else "decode"
                graphs = {kind: graph}
                if card.task == "generate":
                    ids = tokenizer.encode(CALIBRATION[:2000])[:256]
                    x = stream(architecture, card, weights, ids, folder)
                    with parity.whole(graph, weights, places(), folder) as opened:
                        scales = cache_scales(opened, card, x, weights.handles)
                    graphs[f"{kind}.fp16"] = build(architecture, card, weights, cache="float16")
                    graphs[f"{kind}.int8"] = build(architecture, card, weights, cache_scales=scales)
            if chosen.static is not None:
                with timed(seconds, "static"):
                    some = (
                        rows[:: -(-len(rows) // STATIC_ROWS)] if chosen.static.bits == 8 else np.zeros((0, 0), np.int64)
                    )
                    static.add(writer, architecture, card, weights, chosen.static, some, scales, folder, progress)
            if compiler is not None:
                with timed(seconds, "compile"):
                    contexts.add(writer, compiler, socs, folder, progress)
            if stacks is not None:
                with timed(seconds, "sort"), parity.whole(graph, weights, places(), folder) as opened:
                    index = _sorted(opened, card, stacks, chosen, tokenizer, rows, check_parity, progress)
                with writer.section("stack", "blocks", alignment=4096, required=True) as sink:
                    stacks.write(sink, index)
                writer.add("stack", "index", index.to_json(), required=True)
            for name, data in graphs.items():
                writer.add("graph", name, data, required=True)
                role = name.split(".")[0]
                writer.graph(Graph(name, role, "cpu", 0, card.span.start, card.span.stop, name))
            writer.add("card", "", card.to_json(), required=True)
            writer.add("recipe", "", named.to_json())
            if card.span.start == 0:  # a later part sees no text
                writer.add("tokenizer", "", tokenizer_json, required=True)
                if template := checkpoint.chat_template():
                    writer.add("chat_template", "", template.encode())
            if check_parity:
                with timed(seconds, "parity"):
                    compared = parity.compare(
                        checkpoint, architecture, card, weights, graph, places(), tokenizer, HELDOUT, folder, progress
                    )
                    if chosen.calibrated and stacks is None:
                        baseline = _rounded_to_nearest(
                            checkpoint, architecture, card, chosen, tokenizer, folder, progress
                        )
                writer.add("parity", "", parity_to_json({"parity": compared, "baseline": baseline}))
        with timed(seconds, "write"):
            progress(Event("write", detail=str(out)))
            writer.commit()
        stored = sum(matrix.values.length for matrix in weights.matrices.values() if matrix.values is not None)
        if stacks is not None:
            stored += index.sizes()[-1]
            stacks.work.remove()
        counted = sum(matrix.outputs * matrix.inputs for matrix in weights.matrices.values())
        if kept is not None:
            stored, counted = stored + kept.bytes, counted + kept.numbers
        return Report(
            bundle=str(out), source=checkpoint.describe(), model_type=card.model_type, recipe=chosen.name,
            source_bytes=sum(info.bytes for info in checkpoint.tensors().values()),
            bundle_bytes=Path(out).stat().st_size,
            bits_per_weight=8 * stored / max(counted, 1), seconds=seconds, peak_bytes=peak.bytes or 0,
            parity=compared.to_dict() if compared else None, baseline=baseline.to_dict() if baseline else None,
        )  # fmt: skip


def _stacks(source: Path, out: Path, recipe: Recipe, named: Recipe, card: Card, undo: ExitStack) -> Stacks:
    """Where the stacked matrices go, with those that an earlier try has made. Raises UsageError for a model that cannot
    be stacked."""
    assert recipe.ladder is not None
    if card.task != "generate" or card.is_part:
        what = "a part of a model" if card.is_part else f"a model that does not generate ({card.model_type})"
        raise UsageError(
            f"The recipe {recipe.name!r} cannot be used.", f"It stacks language models, and this is {what}.",
            "Name another recipe.",
        )  # fmt: skip
    files = sorted(path for path in source.iterdir() if path.is_file()) if source.is_dir() else [source]
    key = {
        "source": [(path.name, (info := path.stat()).st_size, info.st_mtime_ns) for path in files],
        "recipe": dataclasses.asdict(named), "card": dataclasses.asdict(card),
        "text": _digest(recipe.calibration.text),
    }  # fmt: skip
    work = Work(out, key)
    undo.callback(work.close)
    stacks = Stacks(recipe.ladder, work)
    undo.callback(stacks.close)
    return stacks


def _sorted(
    opened, card: Card, stacks: Stacks, recipe: Recipe, tokenizer: Tokenizer, rows, curve: bool, progress
) -> Index:
    """The index of a stack in its recipe's order, beside which it has the others that are known. With `curve` it has
    perplexities of held-out text as well."""
    assert recipe.ladder is not None
    chosen = recipe.ladder.sort
    measured = ("average", "greedy") if chosen in ("average", "greedy") else ()
    pieces = rows[:: -(-len(rows) // PIECES)]
    short = (Meter(opened, card, stacks, [row[:SHORT]]) for row in pieces)  # one at a time: each holds logits
    unseen = unseen_rows(recipe, card, tokenizer, JUDGED)
    judge = Meter(opened, card, stacks, unseen, stride=2) if unseen else None
    drop_rivals(stacks, judge or Meter(opened, card, stacks, list(pieces)), progress)
    long = Meter(opened, card, stacks, list(rows[:: -(-len(rows) // LONG)]), stride=2)
    found = orders(stacks, {chosen, "proxy", "random", *measured}, short, long, judge, progress)
    first = stacks.floors
    others = {name: tuple(order) for name, order in found.items() if name != chosen}
    index = Index(tuple(stacks.matrices), tuple(found[chosen]), sum(first), chosen, orders=others)
    if not curve:
        return index
    texts = parity.stretches(tokenizer, card, HELDOUT, CURVE_TOKENS)
    held = Meter(opened, card, stacks, texts)
    points = sorted({round(at) for at in np.linspace(index.floor, len(index.order), CURVE_POINTS)})
    measured_at = []
    for at, entries in enumerate(points):
        progress(Event("curve", at, len(points), f"{entries} entries", "points"))
        perplexity = held.perplexity(index.counts(entries))
        measured_at += [(entries, perplexity)] if math.isfinite(perplexity) else []
    progress(Event("curve", len(points), len(points), "", "points"))
    stacks.set([len(one.steps) for one in stacks.matrices])  # for what is measured after this
    return dataclasses.replace(index, curve=tuple(measured_at))


def _digest(path: str) -> str:
    """Of a calibration text; a missing one is reported where it is read."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else ""
    except OSError:
        return ""


def build(architecture, card: Card, weights: Weights, **options) -> bytes:
    """The ONNX graph of a card's blocks over `weights`, which are stored on the way."""
    builder = GraphBuilder(card.name, weights, **options)
    architecture.build(builder, card, card.span)
    return builder.serialize()


def _add_experts(writer: Writer, kept: records.Records, weights: Weights) -> None:
    """The sections of a mixture whose experts are rounded: their records in each precision, the index of them, and what
    predicts a router from the one before."""
    for at, precision in enumerate(kept.precisions):
        with writer.section("experts", precision.section, alignment=4096, required=at == 0) as sink:
            kept.copy(at, sink)
    writer.add("experts", "index", kept.index.to_json(), required=True)
    if (found := records.predictor(weights, kept.card, kept.names)) is not None:
        writer.add("experts", "predictor", found)


def _rounded_to_nearest(checkpoint, architecture, card, recipe, tokenizer, folder, progress) -> Parity:
    """Parity of the same formats without calibration, in scratch files."""
    plain = dataclasses.replace(recipe, method="rtn", smooth=False, low=None)
    with Scratch(checkpoint, folder, plain) as scratch, ExitStack() as undo:
        if (experts := records.stored(plain, card, architecture)) is not None:
            scratch.weights.records = kept = records.Records(checkpoint, plain, card, experts, folder)
            undo.callback(kept.close)
            for block in card.routed_blocks:
                kept.add(block)
        graph = build(architecture, card, scratch.weights)
        return parity.compare(
            checkpoint, architecture, card, scratch.weights, graph, scratch.places, tokenizer, HELDOUT, folder, progress
        )


def _refuse_its_own_source(source: Path, out: Path) -> None:
    """The checkpoint that is being read is never replaced, asked for or not. Its folder may hold bundles."""
    if out.exists() and (out.samefile(source) or (out.parent.samefile(source) and out.suffix != ".shoal")):
        raise UsageError(
            f"The bundle {out} was not written.", "It would replace the checkpoint or a part of it.",
            "Choose another name.",
        )  # fmt: skip


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - started
