"""A mixture's speed with some of its experts in memory, against what storage allows and what a simpler store does.

In one run, in turn: everything resident; then for each share of the experts the store as it is set up, the same without
guesses, and experts read on demand with hardly more slots than a token needs. Beside each speed is its bound, a token's
time being the longer of computing with everything resident and reading what was missed at the measured bandwidth, and
the misses of the best possible eviction of the same routing in as many slots (Belady 1966).
"""

import contextlib
import mmap
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from shoal.runtime.errors import UsageError
from shoal.runtime.events import Progress, silent
from shoal.runtime.experts.policies import simulate
from shoal.runtime.experts.store import Counters, Options, Store
from shoal.runtime.model import load

from . import bench
from . import bench_machine as machine
from .bench_arms import Run, ShoalArm, Test

_PROBE_S = 1.0  # for which storage is read


class _Arm(ShoalArm):
    """A model with a share of its experts, which notes what its store did in each run and, once, where tokens went."""

    def __init__(self, model, name: str, share: float):
        super().__init__(model, name)
        self.share, self.counted = share, list[Counters]()
        self.ids: np.ndarray | None = None

    def run(self, test: Test, ids: list[int]) -> Run:
        store = self.model.experts
        self._answer(ids, 1)  # the prompt's own reads are not an answer's
        before = store.counters()
        if self.ids is None:
            store.record_routing(test.tokens + 1)
        found = super().run(test, ids)
        if self.ids is None:
            self.ids = store.routing(self.model.card.top_k, self.model.card.hidden)["ids"]
            store.record_routing(0)
        self.counted.append(store.counters().since(before))
        return found


def measure(
    bundle: str, *, shares: Sequence[float] = (1.0, 0.5, 0.25, 0.125), tokens: int = 64, repetitions: int = 5,
    options: Options = Options(), threads: int = 0, progress: Progress = silent, **loading,  # noqa: B008 (frozen)
) -> dict:  # fmt: skip
    """Answers of `tokens` tokens with each of `shares` (0 to 1) of the experts resident: {"bundle", "bandwidth",
    "storage", "record", "threads", "rows"}; bandwidth in bytes a second is measured as the store reads, `options`' rate
    and direct reads included. A row has `share`, `slots`, `arm`, `mean`, `deviation` (tokens/s), for each token `hits`,
    `misses`, `missed_bytes`, `read_bytes`, `waited_s`, and `bound` and `of_bound`, `of_resident`, `belady` (misses).
    Raises UsageError where there are no experts, and what loading raises."""
    if not shares or not all(0 < share <= 1 for share in shares) or tokens < 2 or repetitions < 1:
        raise UsageError("Nothing would be measured.", "No share, token or repetition is left.", "Ask for 0 to 100 %.")
    threads = threads or machine.threads()
    card, _ = bench.describe(bundle)
    test = Test("tg", tokens)
    loading |= {"context": min(max(256, test.context), card.max_context), "threads": threads}
    if not card.experts:
        raise UsageError(f"{bundle} has no experts.", "It is no mixture.", "Name a bundle of one.")
    total = card.experts * len(card.routed_blocks)
    with contextlib.ExitStack() as opened:

        def arm(name: str, share: float, slots: int, chosen: Options) -> _Arm:
            model = opened.enter_context(load(bundle, experts=chosen, progress=progress, **loading))
            model.set_entries(slots)
            return _Arm(model, name, share)

        resident = arm("resident", 1.0, total, options)
        arms = [resident]
        for share in (share for share in shares if share < 1):
            slots = max(card.top_k, round(share * total))
            arms.append(arm("store", share, slots, options))
            arms.append(
                arm("lru, no guesses", share, slots, replace(options, policy="lru", parameters=(), guess=False))
            )
        if any(share < 1 for share in shares):
            demand = replace(options, policy="lru", parameters=(), guess=False)
            arms.append(arm("on demand", card.top_k / total, card.top_k, demand))
        speed = bandwidth(resident.model.experts, resident.model.bundle, options)
        # So many tokens that whoever is going to be used is there before anything is measured
        bench.run([resident], [Test("pp", 248)], 4, vocab=card.vocab, stage="warm up", seed=9, progress=progress)
        resident.counted, resident.ids = [], None
        results, _ = bench.run(arms, [test], repetitions, vocab=card.vocab, stage="answers", progress=progress)
        record = resident.model.experts.record
        compute = 1 / results[0].mean
        rows = [_row(one, result, tokens, record, compute, speed) for one, result in zip(arms, results, strict=True)]
    return {"bundle": Path(bundle).name, "bandwidth": speed, "record": record, "experts": total, "top_k": card.top_k,
            "threads": threads, "rows": rows}  # fmt: skip


def bandwidth(store: Store, bundle, options: Options) -> float:
    """Bytes a second that records are read with, by as many threads, past the page cache if the store does so."""
    section, record = bundle.section("experts", "records"), store.record
    count = section.length // record
    flags = os.O_RDONLY | (os.O_DIRECT if options.direct else 0)
    total, until = [0] * options.threads, time.perf_counter() + _PROBE_S

    def read(own: int) -> None:
        draw = np.random.default_rng(own)
        file = os.open(bundle.path, flags)
        try:
            with mmap.mmap(-1, record) as buffer:  # whole pages, which a direct read wants
                while time.perf_counter() < until:
                    total[own] += os.preadv(file, [buffer], section.offset + int(draw.integers(count)) * record)
        finally:
            os.close(file)

    readers = [threading.Thread(target=read, args=(own,)) for own in range(options.threads)]
    started = time.perf_counter()
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    found = sum(total) / (time.perf_counter() - started)
    return min(found, options.rate) if options.rate else found


def _row(arm: _Arm, result, tokens: int, record: int, compute: float, speed: float) -> dict:
    card, slots = arm.model.card, arm.model.experts.entries
    # Every run is of one prompt's token and `tokens` answers
    steps = tokens * len(arm.counted)
    counted = [sum(getattr(one, name) for one in arm.counted) / steps
               for name in ("hits", "misses", "late", "read_bytes", "waited_ns")]  # fmt: skip
    hits, misses, late, read, waited = counted
    missed = misses + late
    bound = 1 / max(compute, missed * record / speed)
    assert arm.ids is not None
    belady = simulate(arm.ids, card.experts, slots, "belady").misses.sum() / len(arm.ids)
    lru = simulate(arm.ids, card.experts, slots, "lru").misses.sum() / len(arm.ids)
    return {
        "share": arm.share, "slots": slots, "arm": arm.name, "mean": result.mean, "deviation": result.deviation,
        "hits": hits, "misses": misses, "late": late, "missed_bytes": missed * record, "read_bytes": read,
        "waited_s": waited / 1e9, "bound": bound, "of_bound": result.mean / bound,
        "of_resident": result.mean * compute, "belady": belady, "lru": lru,
    }  # fmt: skip


def render(found: dict) -> str:
    """The rows as Markdown."""
    header = ["experts", "slots", "store", "tokens/s", "of resident", "misses a token", "read, MiB", "waited, ms",
              "bound, tokens/s", "of bound", "from empty: Belady's, LRU's misses"]  # fmt: skip
    lines = [header, ["---:", "---:", "---", *["---:"] * (len(header) - 3)]]
    for row in found["rows"]:
        lines.append([
            f"{row['share']:.3g}" if row["share"] < 0.01 else f"{row['share']:.1%}", str(row["slots"]), row["arm"],
            f"{row['mean']:.1f} ± {row['deviation']:.1f}", f"{row['of_resident']:.0%}",
            f"{row['misses']:.2f} + {row['late']:.2f} late", f"{row['read_bytes'] / 2**20:.2f}",
            f"{row['waited_s'] * 1e3:.2f}", f"{row['bound']:.1f}", f"{row['of_bound']:.0%}",
            f"{row['belady']:.2f}, {row['lru']:.2f}",
        ])  # fmt: skip
    facts = [
        f"- {found['bundle']}: {found['experts']} experts of {found['record'] / 2**20:.2f} MiB, "
        f"{found['top_k']} a token and layer, {found['threads']} threads",
        f"- storage: {found['bandwidth'] / 1e9:.2f} GB/s as records are read",
    ]
    return "\n".join(["| " + " | ".join(line) + " |" for line in lines] + ["", *facts]) + "\n"
