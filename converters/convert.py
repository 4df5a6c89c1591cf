"""A checkpoint becomes a bundle: a straight line from source to report.

Weights stream through once, slice by slice; what cannot be converted is refused before anything is written, and a
conversion that fails or is interrupted leaves nothing behind. The same source, recipe and version give the same bytes.
"""

import dataclasses
import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from shoal.runtime import session
from shoal.runtime.bundle import Graph, create
from shoal.runtime.card import Card
from shoal.runtime.errors import SourceError
from shoal.runtime.events import Event, Progress, silent
from shoal.runtime.language.tokens import Tokenizer
from shoal.runtime.measure import PeakAnonymous

from . import architectures, parity
from . import recipe as recipes
from .caches import cache_scales
from .calibrate import calibrate
from .graph import GraphBuilder
from .recipe import Recipe
from .report import Report
from .sources import open_source
from .text import CALIBRATION, HELDOUT
from .weights import Weights


def convert(
    source: str | Path, out: str | Path, recipe: str | Path | Recipe = "int4", *, overwrite: bool = False,
    check_parity: bool = True, calibration_text: str | Path | None = None, progress: Progress = silent,
) -> Report:  # fmt: skip
    """Converts the checkpoint `source` (GGUF file or Hugging Face folder) to the bundle `out`.

    With `check_parity` the bundle is compared with its source in fp32 and the figures are stored in it. Raises
    SourceError, ConvertError, UsageError, StorageError; `out` then is as it was.
    """
    chosen = recipes.load(recipe)
    if calibration_text is not None:
        chosen = dataclasses.replace(
            chosen, calibration=dataclasses.replace(chosen.calibration, text=str(calibration_text))
        )
    seconds: dict[str, float] = {}
    with open_source(source) as checkpoint, PeakAnonymous() as peak, create(out, overwrite=overwrite) as writer:
        architecture, card = architectures.find(checkpoint)
        tokenizer_json = checkpoint.tokenizer()
        tokenizer = Tokenizer.from_json(tokenizer_json)
        card = dataclasses.replace(card, tokenizer_bytes=tokenizer.nbytes)
        with writer.section("weights", "weights", alignment=4096, required=True) as section:
            weights = Weights(checkpoint, chosen, section, progress)
            if chosen.method != "rtn" and card.task == "generate":
                with timed(seconds, "calibrate"):
                    calibrate(
                        architecture, card, checkpoint, weights, calibration_rows(chosen, card, tokenizer), progress
                    )
            with timed(seconds, "convert"):
                graph = build(architecture, card, weights)
        stored = writer.sections[-1]
        places = {"weights": session.Place(str(writer.path), stored.offset, stored.length)}
        with timed(seconds, "graphs"):
            graphs = {"decode" if card.task == "generate" else "embed": graph}
            if card.task == "generate":
                scales = cache_scales(graph, places, card, tokenizer.encode(HELDOUT[:2000])[:256])
                graphs["decode.int8"] = build(architecture, card, weights, cache_scales=scales)
        for name, data in graphs.items():
            writer.add("graph", name, data, required=True)
            role = name.split(".")[0]
            writer.graph(Graph(name, role, "cpu", 0, 0, card.blocks, name))
        writer.add("card", "", card.to_json(), required=True)
        writer.add("recipe", "", chosen.to_json())
        writer.add("tokenizer", "", tokenizer_json, required=True)
        if template := checkpoint.chat_template():
            writer.add("chat_template", "", template.encode())
        compared = baseline = None
        if check_parity:
            with timed(seconds, "parity"):
                compared = parity.compare(
                    checkpoint, architecture, card, weights, graph, places, tokenizer, HELDOUT, progress
                )
                if chosen.method != "rtn":
                    baseline = _rounded_to_nearest(checkpoint, architecture, card, chosen, tokenizer, progress)
            figures = {"parity": compared.to_dict(), "baseline": baseline and baseline.to_dict()}
            writer.add("parity", "", parity.to_json(figures))
        with timed(seconds, "write"):
            progress(Event("write", detail=str(out)))
            writer.commit()
        parts = {part.name: part.length for matrix in weights.matrices.values() for part in matrix.parts()}
        counted = sum(matrix.outputs * matrix.inputs for matrix in weights.matrices.values())
        return Report(
            bundle=str(out), source=checkpoint.describe(), model_type=card.model_type, recipe=chosen.name,
            source_bytes=sum(info.bytes for info in checkpoint.tensors().values()), bundle_bytes=Path(out).stat().st_size,
            bits_per_weight=8 * sum(parts.values()) / max(counted, 1), seconds=seconds, peak_bytes=peak.bytes,
            parity=compared and compared.to_dict(), baseline=baseline and baseline.to_dict(),
        )  # fmt: skip


def build(architecture, card: Card, weights: Weights, blocks: range | None = None, **options) -> bytes:
    """The ONNX graph of `blocks` (all of them by default) over `weights`, which are stored on the way."""
    builder = GraphBuilder(card.name, weights, **options)
    architecture.build(builder, card, blocks or range(card.blocks))
    return builder.serialize()


def calibration_rows(recipe: Recipe, card: Card, tokenizer: Tokenizer) -> np.ndarray:
    """Token ids int64 [rows, length] of the calibration text, spread over all of it."""
    wanted = recipe.calibration
    text = CALIBRATION
    if wanted.text:
        try:
            text = Path(wanted.text).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SourceError(
                f"The calibration text {wanted.text} cannot be read.", str(error), "Give a UTF-8 file."
            ) from None
    length = min(wanted.length, card.max_context)
    rows = max(1, wanted.tokens // length)
    # A generous cut: no tokenizer here makes more than one token a byte
    ids = tokenizer.encode(text[: rows * length * 16], special=False)
    if len(ids) < length:
        raise SourceError(
            "The calibration text is too short.",
            f"It has {len(ids)} tokens, a row needs {length}.",
            "Give a longer text.",
        )
    starts = np.linspace(0, len(ids) - length, min(rows, math.ceil(len(ids) / length))).astype(int)
    return np.array([ids[start : start + length] for start in starts], np.int64)


def _rounded_to_nearest(checkpoint, architecture, card, recipe, tokenizer, progress):
    """Parity of the same formats without the method, in a scratch file."""
    with tempfile.NamedTemporaryFile(prefix="shoal-") as scratch:
        weights = Weights(checkpoint, dataclasses.replace(recipe, method="rtn"), scratch)
        graph = build(architecture, card, weights)
        scratch.flush()
        places = {"weights": session.Place(scratch.name, 0, scratch.tell())}
        return parity.compare(checkpoint, architecture, card, weights, graph, places, tokenizer, HELDOUT, progress)


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - started
