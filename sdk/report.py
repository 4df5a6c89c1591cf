"""Quality at a size: the perplexity of bundles against the bytes of weights that must be resident for it.

An ordinary bundle is a point. A stacked one is a curve, from its floor to all of its stack, and each order that its
entries may be sorted in is another. Curves are measured where they can be compared: at common sizes, among them those
of the points. Perplexity is what the converter's parity figures mean by it, through the model as an app loads it.
Results are values of JSON's types (report_forms.py shows them, docs/bitstack.md lists the keys).
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from shoal.converters.quality import STEP, perplexity
from shoal.runtime.bitstack.layout import Index
from shoal.runtime.bitstack.stack import read_index
from shoal.runtime.bundle import Bundle
from shoal.runtime.card import Card
from shoal.runtime.errors import BundleError, UsageError
from shoal.runtime.events import Progress, silent

TOKENS = 2048
ROW = 512  # tokens of a stretch of the text, as in converters/parity.py
POINTS = 9
SLACK = 1.001  # sizes this near are one: entries have headers, 64 bytes each, that integers do not
RANDOM = "random"
_SEED = 5
_MOST = 1 << 16  # points of a curve that is read from a file


@dataclass(frozen=True, eq=False)
class Subject:
    """A bundle as its sections tell it. `weights` are the bytes of its weights sections, all of which must be resident;
    `parameters` counts the elements of its matrices, of one that is embedding and head once."""

    path: str
    card: Card
    recipe: str
    digest: str
    tokenizer: str
    weights: int
    index: Index | None
    source_perplexity: float | None

    @property
    def parameters(self) -> int:
        card = self.card
        attention = card.hidden * card.head_dim * 2 * (card.heads + card.kv_heads)
        return card.blocks * (attention + 3 * card.hidden * card.ffn) + (2 - card.tied) * card.vocab * card.hidden

    @classmethod
    def open(cls, path: str | Path) -> "Subject":
        """Reads no weights. Raises BundleError, and UsageError for what generates no text or is a part."""
        with Bundle.open(path) as bundle:
            card = Card.from_json(bundle.bytes(bundle.section("card")))
            if card.task != "generate" or card.is_part:
                why = "It embeds texts." if card.task == "embed" else "It is a part of a model."
                raise UsageError(f"{path} has no perplexity.", why, "Name whole models that generate.")
            return cls(
                str(path), card, _recipe(bundle), bundle.digest, bundle.section("tokenizer").sha256.hex(),
                sum(section.length for section in bundle.sections if section.kind == "weights"),
                read_index(bundle) if bundle.find("stack", "index") else None, _source_perplexity(bundle),
            )  # fmt: skip


@dataclass(frozen=True)
class Order:
    """One way to give a subject memory: `matrices` are those of its stack's entries in the order in which they come, of
    which the first `floor` always are there."""

    subject: Subject
    label: str
    sort: str = ""
    matrices: tuple[int, ...] = ()
    floor: int = 0

    def sizes(self) -> list[int]:
        """Resident bytes with the first 0, 1, 2, ... entries."""
        index = self.subject.index
        return [self.subject.weights + held for held in (index.sizes(self.matrices) if index else [0])]

    def ends(self) -> tuple[int, int]:
        """The fewest and the most resident bytes."""
        sizes = self.sizes()
        return sizes[self.floor], sizes[-1]

    def entries(self, ladder: Iterable[int]) -> list[int]:
        """How many entries to measure with: the floor, all, and the most that each size of `ladder` has room for."""
        sizes = self.sizes()
        fitting = (bisect_right(sizes, size * SLACK) - 1 for size in ladder)
        return sorted({self.floor, len(self.matrices), *(count for count in fitting if count >= self.floor)})


@dataclass(frozen=True)
class Point:
    """`entries` is None where there is no stack."""

    entries: int | None
    bytes: int
    bits: float
    perplexity: float


@dataclass
class Curve:
    """What was measured of one order of one bundle; by growing size."""

    label: str
    model: str
    bundle: str
    recipe: str
    digest: str
    tokenizer: str
    sort: str
    parameters: int
    points: list[Point] = field(default_factory=list)

    def at(self, size: int) -> float | None:
        """The perplexity of the largest measured point that fits `size` bytes."""
        fitting = [point for point in self.points if point.bytes <= size * SLACK]
        return fitting[-1].perplexity if fitting else None


def measure(
    paths: Sequence[str | Path], *, text: str | Path | None = None, tokens: int = TOKENS, points: int = POINTS,
    sorts: Sequence[str] = (), step: int = STEP, threads: int = 0, progress: Progress = silent,
) -> dict:  # fmt: skip
    """The whole report on bundles, and on reports of earlier runs (.json), whose curves are taken as they are.

    `text` is a UTF-8 file (None: the converters' held-out text), of which about `tokens` tokens are predicted; each
    stack is measured at about `points` sizes. `sorts` names orders of stacks. `step` tokens are computed at once: with
    few, kernels round as they do while an answer is generated. Raises UsageError, BundleError and what loading raises.
    """
    for name, value, least, most in (
        ("tokens", tokens, 32, 1 << 24), ("points", points, 2, 1 << 10), ("step", step, 1, ROW)
    ):  # fmt: skip
        if type(value) is not int or not least <= value <= most:
            raise UsageError(f"{name} is {value!r:.40}.", f"It must be from {least} to {most}.", "Correct it.")
    words, name = _text(text)
    about = {"name": name, "sha256": hashlib.sha256(words.encode()).hexdigest(), "tokens": tokens, "step": step}
    earlier = [curve for path in paths if _is_report(path) for curve in read(path, about)]
    subjects = [Subject.open(path) for path in paths if not _is_report(path)]
    found = [order for subject, label in _named(subjects) for order in orders(subject, label, sorts)]
    if not found and not earlier:
        raise UsageError("There is nothing to measure.", "No bundle was named.", "Name one or more.")
    _comparable([*(subject.tokenizer for subject in subjects), *(curve.tokenizer for curve in earlier)])
    steps = ladder([*(order.ends() for order in found), *map(_ends, earlier)], points)
    curves = _measure(found, steps, words, tokens, step, threads, progress) + earlier
    sources = {subject.source_perplexity for subject in subjects} if text is None and tokens == TOKENS else set()
    return {
        "text": about, "source_perplexity": sources.pop() if len(sources) == 1 else None,
        "curves": [asdict(curve) for curve in curves], "sizes": sizes(curves, steps),
    }  # fmt: skip


def orders(subject: Subject, label: str, sorts: Sequence[str] = ()) -> list[Order]:
    """The orders of a bundle that `sorts` names, without names the one that it is stored in. Raises UsageError for one
    that it does not have; a random one is drawn if it has none."""
    index = subject.index
    if index is None:
        return [Order(subject, label)]
    kept = {**index.orders, index.sort or "stored": index.order}
    if not sorts:
        return [Order(subject, label, index.sort, index.order, index.floor)]
    if RANDOM in sorts and RANDOM not in kept:
        rest = np.random.default_rng(_SEED).permutation(index.order[index.floor :]).tolist()
        kept[RANDOM] = (*index.order[: index.floor], *rest)
    if unknown := [sort for sort in sorts if sort not in kept]:
        why = f"It has {', '.join(kept)}."
        raise UsageError(f"{subject.path} has no order {unknown[0]!r:.40}.", why, "Name one of these.")
    return [Order(subject, f"{label}, {sort}", sort, tuple(kept[sort]), index.floor) for sort in dict.fromkeys(sorts)]


def ladder(ends: Iterable[tuple[int, int]], points: int) -> list[int]:
    """The sizes at which curves are compared: those of single points, and `points` from the smallest floor to the
    largest stack, each larger than the one before by the same factor."""
    ends = list(ends)
    found = {high for low, high in ends if low == high}
    ranges = [(low, high) for low, high in ends if low < high]
    if ranges:
        low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
        factor = high / max(low, 1)
        found |= {round(low * factor ** (step / (points - 1))) for step in range(points - 1)} | {low, high}
    return sorted(found)


def sizes(curves: Sequence[Curve], steps: Iterable[int]) -> list[dict]:
    """For each size the perplexity of each curve, None where it does not fit, and which is best."""
    rows = []
    parameters = {curve.parameters for curve in curves}
    for size in steps:
        values = [curve.at(size) for curve in curves]
        fitting = [(value, index) for index, value in enumerate(values) if value is not None]
        rows.append({
            "bytes": size, "bits": 8 * size / max(parameters) if len(parameters) == 1 else None,
            "perplexities": values, "best": min(fitting)[1] if fitting else None,
        })  # fmt: skip
    return rows


def read(path: str | Path, about: dict) -> list[Curve]:
    """The curves of an earlier report in JSON, untrusted. Raises UsageError, also where it measured another text."""
    try:
        raw = json.loads(Path(path).read_bytes())
        curves = [_read_curve(curve) for curve in raw["curves"]]
        same = all(raw["text"][key] == about[key] for key in ("sha256", "tokens", "step"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read.", f"{error.strerror}.", "Check the path.") from None
    except (ValueError, TypeError, LookupError, RecursionError):
        raise UsageError(f"{path} is no report.", "Its JSON is not what report writes.", "Measure again.") from None
    if not same:
        why = "It has another text, another number of its tokens or other steps."
        raise UsageError(f"{path} cannot be compared with this.", why, "Give the same --text, --tokens and --step.")
    return curves


# Measuring ------------------------------------------------------------------------------------------------------------


def _measure(
    found: Sequence[Order], steps: list[int], text: str, tokens: int, step: int, threads: int, progress: Progress
) -> list[Curve]:
    """The curves of `found`; a bundle is loaded once for all of its orders."""
    from shoal.converters.parity import stretches
    from shoal.runtime.model import load

    wanted = [(order, order.entries(steps)) for order in found]
    done, curves = 0, []
    for subject in dict.fromkeys(order.subject for order in found):
        context = min(ROW, subject.card.max_context)
        with load(subject.path, context=context, chunk=min(step, context), threads=threads) as model:
            rows = stretches(model.tokenizer, subject.card, text, tokens)
            if min(map(len, rows)) < 2:
                why = "A stretch of it has less than two tokens."
                raise UsageError("The text is too short.", why, "Give a longer one.")
            total = len(rows) * sum(len(entries) for _, entries in wanted)
            for order, entries in wanted:
                if order.subject != subject:
                    continue
                curves.append(curve := _empty(order))
                held = order.sizes()
                for count in entries:
                    arrange(model, order, count)
                    value = perplexity(model, rows, step, progress, done, total)
                    done += len(rows)
                    stacked = count if subject.index else None
                    curve.points.append(Point(stacked, held[count], 8 * held[count] / subject.parameters, value))
    return curves


def arrange(model, order: Order, count: int) -> None:
    """Makes the first `count` entries of `order` what `model` computes with."""
    index = order.subject.index
    if index is None:
        return
    if order.matrices == index.order:
        model.set_entries(count)
    else:
        model.stack.set_counts(index.counts(count, order.matrices))


def _empty(order: Order) -> Curve:
    subject = order.subject
    return Curve(
        order.label, subject.card.name, Path(subject.path).name, subject.recipe, subject.digest, subject.tokenizer,
        order.sort, subject.parameters,
    )  # fmt: skip


# What is given --------------------------------------------------------------------------------------------------------


def _text(path: str | Path | None) -> tuple[str, str]:
    """The text and its name."""
    if path is None:
        from shoal.converters.text import HELDOUT

        return HELDOUT, "held-out text of the converters"
    try:
        return Path(path).read_text("utf-8"), Path(path).name
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"The text {path} cannot be read.", f"{error}.", "Give a file of UTF-8.") from None


def _named(subjects: Sequence[Subject]) -> list[tuple[Subject, str]]:
    """Each subject with its file's name without the suffix, or with its path where two have one name."""
    names = [Path(subject.path).name.removesuffix(".shoal") for subject in subjects]
    return [
        (subject, name if names.count(name) == 1 else subject.path)
        for subject, name in zip(subjects, names, strict=True)
    ]


def _comparable(tokenizers: Iterable[str]) -> None:
    if len(set(tokenizers)) > 1:
        raise UsageError(
            "These models cannot be compared.", "They have different tokenizers, so that a token is not a token.",
            "Report on each model by itself.",
        )  # fmt: skip


def _is_report(path: str | Path) -> bool:
    return str(path).endswith(".json")


def _ends(curve: Curve) -> tuple[int, int]:
    return curve.points[0].bytes, curve.points[-1].bytes


def _recipe(bundle: Bundle) -> str:
    try:
        return str(json.loads(bundle.bytes(bundle.section("recipe")))["name"])[:200]
    except (BundleError, ValueError, LookupError, TypeError, RecursionError):  # it is for people only
        return "unknown recipe"


def _source_perplexity(bundle: Bundle) -> float | None:
    from shoal.converters.report import parity_from_json

    section = bundle.find("parity")
    figures = parity_from_json(bundle.bytes(section)).get("parity") if section else None
    return figures.source_perplexity if figures else None


def _read_curve(raw: Any) -> Curve:
    """Raises ValueError, TypeError or LookupError for what is none."""
    texts = {key: raw[key] for key in ("label", "model", "bundle", "recipe", "digest", "tokenizer", "sort")}
    parameters, points = raw["parameters"], []
    short = all(isinstance(text, str) and len(text) <= 4096 for text in texts.values())
    if not short or not 0 < len(raw["points"]) <= _MOST:
        raise ValueError
    for one in raw["points"]:
        point = Point(one["entries"], one["bytes"], float(one["bits"]), float(one["perplexity"]))
        whole = type(point.bytes) is int and (point.entries is None or type(point.entries) is int)
        if not (whole and 0 < point.bytes < 1 << 62 and 0 < point.perplexity < 1e305 and 0 < point.bits < 1e9):
            raise ValueError
        points.append(point)
    if type(parameters) is not int or parameters < 1 or points != sorted(points, key=lambda point: point.bytes):
        raise ValueError
    return Curve(**texts, parameters=parameters, points=points)
