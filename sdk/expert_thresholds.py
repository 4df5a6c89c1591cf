"""Which misses of a mixture's experts may come in low precision or not at all, for a budget of bytes; and the price.

Thresholds are found on calibration text and judged on other text. Both are read as answers are made: stretches begin
with a prompt, after which one token at a time goes through the model, since only there thresholds act. Bytes are what
the store counts of the model as an app opens it, so every pair that is tried is a run from empty slots.
"""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from shoal.converters.parity import stretches
from shoal.converters.quality import begin, predict
from shoal.converters.text import CALIBRATION, HELDOUT
from shoal.runtime.bundle import Bundle
from shoal.runtime.card import Card
from shoal.runtime.errors import UsageError
from shoal.runtime.events import Event, Progress, silent
from shoal.runtime.experts.store import Counters, Options, read_index
from shoal.runtime.experts.thresholds import least, pair
from shoal.runtime.model import load

from .show import size

TOKENS = 1024
LENGTH = 256  # tokens of a stretch, of which
PROMPT = 32  # come at once: they bring experts into the slots, and nothing of them is counted


@dataclass
class Figures:
    """What was seen of a model's answers, added up: `read` bytes, `uses` of experts and how many of these were asked
    for in `low` precision or `skipped`, and, beside the same model without thresholds, nats and first choices."""

    steps: int = 0
    read: int = 0
    uses: int = 0
    low: int = 0
    skipped: int = 0
    loss: float = 0.0
    divergence: float = 0.0
    agreed: int = 0

    def add(self, counted: Counters, targets: np.ndarray, found: np.ndarray, exact: np.ndarray) -> None:
        """The answer to one stretch: the tokens that came, int64 [steps], and log-probabilities fp32 [steps, vocab]."""
        self.steps += len(targets)
        self.read += counted.read_bytes
        self.uses += counted.hits + counted.late + counted.misses + counted.skipped
        self.low, self.skipped = self.low + counted.low, self.skipped + counted.skipped
        self.loss -= float(found[np.arange(len(targets)), targets].sum(dtype=np.float64))
        self.divergence += sum(float(np.exp(p) @ (p - q)) for p, q in zip(exact, found, strict=True))
        self.agreed += int((found.argmax(-1) == exact.argmax(-1)).sum())

    def to_json(self) -> dict[str, float]:
        uses = max(self.uses, 1)
        return {
            "read_bytes": self.read / self.steps, "perplexity": float(np.exp(min(self.loss / self.steps, 700))),
            "kl": max(0.0, self.divergence / self.steps), "top1_agreement": self.agreed / self.steps,
            "low_share": self.low / uses, "skipped_share": self.skipped / uses,
        }  # fmt: skip


def calibrate(
    bundle: str | Path, budget: int, *, memory: int | str | None = None, slots: int | None = None, tokens: int = TOKENS,
    text: str | None = None, options: Options = Options(), progress: Progress = silent, **loading,  # noqa: B008 (frozen)
) -> dict:  # fmt: skip
    """The least thresholds with which answers read at most `budget` bytes of experts a token, and what they cost.

    The model has `memory`, or slots for `slots` experts (neither: for all), and `options` but for their thresholds;
    `loading` are other keywords of `load`. About `tokens` tokens of `text` (None: the converters' calibration text) are
    read for each pair that is tried, and in the end as many of their held-out text, by two models open at once.

    {"bundle", "budget", "slots", "experts", "low", "skip", "runs", "exact", "found"}. A run is {"low", "skip",
    "read_bytes"}, a token's. `exact` and `found` are figures on held-out text, without and with the thresholds, None
    where the budget is kept without: "read_bytes", "perplexity", "kl" (nats, from exact's distributions of the next
    token to found's), "top1_agreement", and "low_share" and "skipped_share" of the experts that tokens chose.
    Raises UsageError where there are no experts or the budget cannot be reached, and what loading raises."""
    if type(budget) is not int or budget < 1:
        raise UsageError(f"The budget is {budget!r:.40}.", "It must be at least a byte a token.", "Correct it.")
    if type(tokens) is not int or not 2 * PROMPT <= tokens < 1 << 24:
        raise UsageError(f"tokens is {tokens!r:.40}.", f"It must be at least {2 * PROMPT}.", "Correct it.")
    if memory is not None and slots is not None:
        raise UsageError("Memory and slots were both given.", "Memory decides how many slots there are.", "Give one.")
    has_low = _has_low(bundle)
    runs: dict[float, dict] = {}
    entries = total = 0

    @contextlib.contextmanager
    def opened(low: float, skip: float):
        with load(bundle, memory, experts=replace(options, low=low, skip=skip), progress=progress, **loading) as model:
            if slots is not None:
                model.set_entries(slots)
            yield model

    def measure(thrift: float) -> float:
        nonlocal entries, total
        low, skip = pair(thrift, has_low)
        read = steps = 0
        with opened(low, skip) as model:
            entries, total = model.experts.entries, model.experts.index.layers * model.experts.index.experts
            rows = _rows(model, CALIBRATION if text is None else text, tokens)
            for done, row in enumerate(rows):
                progress(Event("calibrating", done, len(rows), f"low {low:g}, skip {skip:g}", "stretches"))
                logs, counted = _answer(model, row)
                read, steps = read + counted.read_bytes, steps + len(logs)
        runs[thrift] = {"low": low, "skip": skip, "read_bytes": read / steps}
        return read / steps

    thrift = least(measure, budget)
    if thrift is None:
        low, skip, fewest = (runs[1.0][name] for name in ("low", "skip", "read_bytes"))
        without = runs[0.0]["read_bytes"]
        raise UsageError(
            f"Answers cannot read as little as {size(budget)} a token.",
            f"With low {low:g} and skip {skip:g} it still is {size(fewest)}, without them {size(without)}.",
            f"Allow {math.ceil(fewest / 1024)}KiB, or give more memory or slots.",
        )
    low, skip = pair(thrift, has_low)
    exact = found = None
    if thrift:
        with opened(1.0, 1.0) as precise, opened(low, skip) as thrifty:
            exact, found = _compare(precise, thrifty, _rows(precise, HELDOUT, tokens), progress)
    return {
        "bundle": Path(bundle).name, "budget": budget, "slots": entries, "experts": total, "low": low, "skip": skip,
        "runs": [runs[thrift] for thrift in sorted(runs)], "exact": exact, "found": found,
    }  # fmt: skip


def _compare(precise, thrifty, rows: Sequence[np.ndarray], progress: Progress) -> tuple[dict, dict]:
    """The figures of both models on `rows`, one row at a time: its logits are held."""
    figures = Figures(), Figures()
    for done, row in enumerate(rows):
        progress(Event("comparing", done, len(rows), "on held-out text", "stretches"))
        exact, counted = _answer(precise, row)
        figures[0].add(counted, row[PROMPT + 1 :], exact, exact)
        found, counted = _answer(thrifty, row)
        figures[1].add(counted, row[PROMPT + 1 :], found, exact)
    progress(Event("comparing", len(rows), len(rows), "", "stretches"))
    return figures[0].to_json(), figures[1].to_json()


def _answer(model, row: np.ndarray) -> tuple[np.ndarray, Counters]:
    """Log-probabilities, fp32 [steps, vocab], of the tokens of `row` that come after the one behind its prompt, and
    what the store did for these steps."""
    scheduler, store = model.scheduler, model.experts

    def work():
        begin(scheduler)
        store.restart()
        predict(scheduler, row[:PROMPT], 0)
        before = store.counters()
        logs = np.empty((len(row) - PROMPT - 1, model.card.vocab), np.float32)
        for step, at in enumerate(range(PROMPT, len(row) - 1)):
            logs[step] = predict(scheduler, row[at : at + 1], at)[0]
        return logs, store.counters().since(before)

    return scheduler.exclusively(work)


def _rows(model, text: str, tokens: int) -> list[np.ndarray]:
    """Stretches of `text`, int64 token ids. Raises UsageError where it is too short for a prompt and an answer."""
    rows = stretches(model.tokenizer, model.card, text, tokens, min(LENGTH, model.plan.context))
    if min(map(len, rows)) < PROMPT + 2:
        why = f"A stretch of it has less than {PROMPT + 2} tokens."
        raise UsageError("The text is too short.", why, "Give a longer one, or ask for fewer tokens.")
    return rows


def _has_low(bundle: str | Path) -> bool:
    """Whether its experts have a low precision too. Raises UsageError where there are none."""
    with Bundle.open(bundle) as opened:
        card = Card.from_json(opened.bytes(opened.section("card")))
        if card.task != "generate" or not card.experts:
            raise UsageError(f"{bundle} has no experts.", "It is no mixture.", "Name a bundle of one.")
        return len(read_index(opened).precisions) > 1
