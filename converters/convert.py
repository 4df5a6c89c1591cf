"""A checkpoint becomes a bundle: a straight line from source to report.

Weights stream through once, slice by slice; what cannot be converted is refused before anything is written, and a
conversion that fails or is interrupted leaves nothing behind. The same source, recipe and version give the same bytes.
"""

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shoal.runtime import session
from shoal.runtime.bundle import Graph, create
from shoal.runtime.card import Card
from shoal.runtime.errors import UsageError
from shoal.runtime.events import Event, Progress, silent
from shoal.runtime.language.tokens import Tokenizer
from shoal.runtime.measure import PeakAnonymous

from . import architectures, parity, parts
from . import recipe as recipes
from .caches import cache_scales
from .calibrate import calibrate, calibration_rows, smooth
from .graph import GraphBuilder
from .recipe import Recipe
from .report import Parity, Report, parity_to_json
from .sources import open_source
from .text import CALIBRATION, HELDOUT
from .walk import Scratch, stream
from .weights import Weights


def convert(
    source: str | Path, out: str | Path, recipe: str | Path | Recipe = "int4", *, overwrite: bool = False,
    check_parity: bool = True, calibration_text: str | Path | None = None, blocks: str | range | None = None,
    progress: Progress = silent,
) -> Report:  # fmt: skip
    """Converts the checkpoint `source` (GGUF file or Hugging Face folder) to the bundle `out`.

    `blocks` (a range, or "8:30") makes a part of a language model: those blocks, with the embedding before the first
    and the head after the last, bit for bit as the whole bundle has them. With `check_parity` the bundle is compared
    with its source in fp32 and the figures are stored in it. Raises SourceError, ConvertError, UsageError,
    StorageError; `out` then is as it was.
    """
    chosen = recipes.load(recipe)
    if calibration_text is not None:
        if not chosen.calibrated:
            raise UsageError(
                f"The recipe {chosen.name!r} takes no calibration text.", "It rounds to nearest.",
                "Leave the text out, or name a recipe with method = \"gptq\" or smooth = true.",
            )  # fmt: skip
        chosen = dataclasses.replace(
            chosen, calibration=dataclasses.replace(chosen.calibration, text=str(calibration_text))
        )
    seconds: dict[str, float] = {}
    with open_source(source) as checkpoint, PeakAnonymous() as peak, create(out, overwrite=overwrite) as writer:
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
        compared: Parity | None = None
        baseline: Parity | None = None
        with writer.scratch() as folder:
            with writer.section("weights", "weights", alignment=4096, required=True) as section:

                def places() -> dict[str, session.Place]:
                    return {"weights": session.Place(str(writer.path), section.offset, section.tell())}

                weights = Weights(checkpoint, chosen, section, progress)
                if chosen.calibrated:
                    with timed(seconds, "calibrate"):
                        rows = calibration_rows(chosen, card, tokenizer)
                        if chosen.smooth:
                            weights.factors = smooth(architecture, card, weights, rows, folder, progress)
                        if chosen.method == "gptq":
                            calibrate(architecture, card, weights, places, rows, folder, progress)
                with timed(seconds, "convert"):
                    graph = build(architecture, card, weights)
            with timed(seconds, "graphs"):
                kind = "embed" if card.task == "embed" else "part" if card.is_part else "decode"
                graphs = {kind: graph}
                if card.task == "generate":
                    ids = tokenizer.encode(CALIBRATION[:2000])[:256]
                    x = stream(architecture, card, weights, ids, folder)
                    with parity.whole(graph, weights, places(), folder) as opened:
                        scales = cache_scales(opened, card, x)
                    graphs[f"{kind}.fp16"] = build(architecture, card, weights, cache="float16")
                    graphs[f"{kind}.int8"] = build(architecture, card, weights, cache_scales=scales)
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
                    if chosen.calibrated:
                        baseline = _rounded_to_nearest(
                            checkpoint, architecture, card, chosen, tokenizer, folder, progress
                        )
                writer.add("parity", "", parity_to_json({"parity": compared, "baseline": baseline}))
        with timed(seconds, "write"):
            progress(Event("write", detail=str(out)))
            writer.commit()
        stored = sum(matrix.values.length for matrix in weights.matrices.values())
        counted = sum(matrix.outputs * matrix.inputs for matrix in weights.matrices.values())
        return Report(
            bundle=str(out), source=checkpoint.describe(), model_type=card.model_type, recipe=chosen.name,
            source_bytes=sum(info.bytes for info in checkpoint.tensors().values()),
            bundle_bytes=Path(out).stat().st_size,
            bits_per_weight=8 * stored / max(counted, 1), seconds=seconds, peak_bytes=peak.bytes or 0,
            parity=compared.to_dict() if compared else None, baseline=baseline.to_dict() if baseline else None,
        )  # fmt: skip


def build(architecture, card: Card, weights: Weights, **options) -> bytes:
    """The ONNX graph of a card's blocks over `weights`, which are stored on the way."""
    builder = GraphBuilder(card.name, weights, **options)
    architecture.build(builder, card, card.span)
    return builder.serialize()


def _rounded_to_nearest(checkpoint, architecture, card, recipe, tokenizer, folder, progress) -> Parity:
    """Parity of the same formats without calibration, in a scratch file."""
    with Scratch(checkpoint, folder, dataclasses.replace(recipe, method="rtn", smooth=False)) as scratch:
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
