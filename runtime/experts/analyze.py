"""What a recorded trace says about running its model with the experts on flash, before anybody believes it.

How alike the experts of neighbouring tokens are (segment routing best performance and segment cache best hit rate,
Liang et al. 2025), what each policy and predictor would have read at each number of slots, and what that allows at a
read bandwidth. Intervals are of 95 %, by resampling whole sequences. It knows nothing about files or how results are
shown.
"""

import concurrent.futures
import itertools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..events import Event, Progress, silent
from .policies import POLICIES, Counts, depths, simulate
from .predictors import REAL, guesses, possible, recall
from .split import Costs, assigned, split
from .trace import Trace

WINDOWS = (4, 16, 64, 256)
SHARES = (0.125, 0.25, 0.5, 0.75, 1.0)
TIMES = (1, 2, 4)  # the experts of a token
NONE, BOUND = "none", "belady"
_RESAMPLES = 1000
_GOOD, _BEARABLE = 0.8, 0.4  # of the speed with every expert resident
_BITES = 1 << 22  # values counted at a time


@dataclass(frozen=True)
class Hardware:
    """`bandwidth` of reads in bytes/s, `record` bytes of one expert, `seconds` that a token takes with every expert
    resident; 0: not known."""

    bandwidth: float = 0.0
    record: int = 0
    seconds: float = 0.0

    def reads(self, layers: int) -> float:
        """Records that can be read while one layer computes; -1, for all, where that is not known."""
        known = self.bandwidth and self.record and self.seconds
        return self.bandwidth * self.seconds / layers / self.record if known else -1.0

    def speed(self, reads: float, misses: float) -> tuple[float | None, float | None]:
        """Tokens/s at so many records a token: at most, where nothing ever waits, min(1 / seconds, bandwidth / bytes
        read); and where whatever is missing is waited for, and guesses are read meanwhile."""
        if not (self.bandwidth and self.record):
            return None, None
        reading, waiting = (count * self.record / self.bandwidth for count in (reads, misses))
        least, most = max(self.seconds, reading), max(self.seconds + waiting, reading)
        return 1 / least if least else math.inf, 1 / most if self.seconds and most else None


def srp(trace: Trace, window: int) -> dict[str, Any]:
    """How well one fixed choice of experts can serve `window` consecutive tokens: the best F1, over all thresholds p,
    of choosing in each window and layer the experts of at least p of its tokens. `slots`: how many that chooses, in
    units of top_k. The value is None where no sequence is so long."""
    counted = np.array([_windows(trace, part, window) for part in trace.sequences], float)
    value, slots = _best_f1(counted.sum(0), window)
    low, high = _interval([_best_f1(one, window)[0] for one in _resampled(counted)], value)
    return {"window": window, "value": value, "low": low, "high": high, "slots": slots}


def sch(trace: Trace, window: int) -> dict[str, Any]:
    """The hit rate of a cache that keeps the experts which the next `window` tokens use most: `value` [experts], by the
    slots of a layer from 1. First uses are left out of it, as hits wherever there is room; in `counted` they are
    misses."""
    experts, sums = trace.experts, np.zeros((len(trace.starts), 2, trace.experts))
    for at, part in enumerate(trace.sequences):
        for layer in range(trace.layers):
            found = depths(trace.ids[part, layer], experts, window).ravel()
            usual, first = (found > 0) & (found <= experts), found[found > experts] - experts
            hits = np.bincount(found[usual], minlength=experts + 1)[1:]
            sums[at, 1] += hits
            sums[at, 0] += hits + np.bincount(np.minimum(first, experts), minlength=experts + 1)[1:]
    uses = np.array([(trace.ids[part] >= 0).sum() for part in trace.sequences], float)
    rates = sums.cumsum(2)
    value, counted = rates.sum(0) / max(uses.sum(), 1)
    tried = _resampled(rates[:, 0]) / np.maximum(_resampled(uses), 1)[:, None]
    low, high = np.quantile(tried, (0.025, 0.975), axis=0).tolist() if len(tried) else (None, None)
    return {"window": window, "value": value.tolist(), "low": low, "high": high, "counted": counted.tolist()}


def sizes(trace: Trace) -> list[tuple[str, int]]:
    """(names, slots for all layers together) to try, fewest first: shares of all experts, multiples of a token's."""
    total, token = trace.layers * trace.experts, trace.layers * trace.top_k
    named: dict[int, list[str]] = {}
    for share in SHARES:
        named.setdefault(_slots(trace, share), []).append(_percent(share))
    for times in TIMES:
        if times * token <= total:
            named.setdefault(times * token, []).append("k" if times == 1 else f"{times}k")
    return [(", ".join(names), slots) for slots, names in sorted(named.items())]


def analyze(trace: Trace, hardware: Hardware | None = None, matrices: np.ndarray | None = None, *, width: int = 0,
            policies: Sequence[str] = POLICIES, predictors: Sequence[str] | None = None,
            progress: Progress = silent) -> dict[str, Any]:  # fmt: skip
    """Everything above, and a verdict, as plain values.

    `matrices` fp32 [layers - 1, experts, hidden] are the bundle's predictor; `width` guesses are made about a layer (by
    default top_k). What `hardware` leaves open is taken from the trace. Of `runs`, "misses", "late", "wasted" and
    "reads" are experts a token, and the same with "_bytes" where the size of an expert is known; "cold_recall" is the
    share of needed experts that were not there and were guessed.
    """
    given = hardware or Hardware()
    known = Hardware(given.bandwidth, given.record or trace.record, given.seconds or trace.seconds)
    can = possible(trace, matrices)
    names = [name for name in (can if predictors is None else predictors) if name != NONE]
    guessed = {name: guesses(trace, name, width, matrices) for name in names}
    wanted = [
        (name, policy, size)
        for name, policy, size in itertools.product((NONE, *names), policies, sizes(trace))
        if policy != BOUND or name == NONE  # who knows the future needs no guess
    ]
    per_layer = known.reads(trace.layers)
    ids = trace.ids.astype(np.int32)
    scores = None if trace.scores is None or "mrs" not in policies else trace.scores.astype(np.float32)

    def one(run: tuple[str, str, tuple[str, int]]) -> dict[str, Any]:
        name, policy, (label, slots) = run
        counts = simulate(
            ids, trace.experts, slots, policy, scores=scores if policy == "mrs" else None, reads=per_layer,
            predicted=guessed.get(name), starts=trace.starts,
        )  # fmt: skip
        return {"predictor": name, "policy": policy, "size": label, "slots": slots, **_row(trace, known, counts)}

    runs = []
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for row in pool.map(one, wanted):
            runs.append(row)
            detail = f"{row['policy']}, {row['predictor']}"
            progress(Event("simulating", len(runs), len(wanted), detail, "caches"))
    return {
        "model": trace.model, "tokens": trace.tokens, "sequences": len(trace.starts), "layers": trace.layers,
        "experts": trace.experts, "top_k": trace.top_k, "record_bytes": known.record or None,
        "bandwidth": known.bandwidth or None, "compute_seconds": known.seconds or None,
        "reads_per_layer": per_layer if per_layer >= 0 else None,
        "srp": [srp(trace, window) for window in WINDOWS],
        "sch": [sch(trace, window) for window in WINDOWS],
        "predictors": [{"name": name, "recall": recall(trace, guessed[name])} for name in names],
        "left_out": [name for name in (*REAL, "oracle") if name not in can],
        "runs": runs,
        "verdict": verdict(trace, known, runs),
    }  # fmt: skip


def second_backend(trace: Trace, costs: Costs) -> list[dict[str, Any]]:
    """What a token's experts of one layer would take beside an accelerator, mean seconds by `costs` and not measured:
    all on the CPU, all on the accelerator, and split; for each of `sizes`, with the experts resident that this trace
    uses most. These stay: an expert that is brought over is used once. `hit_rate` is the share of uses whose expert is
    resident."""
    used, at = trace.ids >= 0, np.arange(trace.layers)[:, None] * trace.experts + trace.ids
    ranked = np.argsort(-np.bincount(at[used], minlength=trace.layers * trace.experts), kind="stable")
    rows = []
    for label, slots in sizes(trace):
        there = (np.isin(at, ranked[:slots]) & used).sum(2)
        kinds, counts = np.unique(np.stack([used.sum(2), there], 2).reshape(-1, 2), axis=0, return_counts=True)
        total = np.zeros(3)
        for (needed, resident), count in zip(kinds.tolist(), counts.tolist(), strict=True):
            layer = ([1] * needed, [rank < resident for rank in range(needed)], costs)
            ways = (assigned(*layer, ()), assigned(*layer, range(needed)), split(*layer))
            total += count * np.array([way.seconds for way in ways])
        cpu, accelerator, both = (total / counts.sum()).tolist()
        rows.append({"size": label, "slots": slots, "hit_rate": float(there.sum() / max(used.sum(), 1)),
                     "cpu_seconds": cpu, "accelerator_seconds": accelerator, "split_seconds": both})  # fmt: skip
    return rows


def verdict(trace: Trace, hardware: Hardware, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Whether to have the experts on flash, from the best that could run at half and at a quarter of them: `suits` yes,
    barely or no, None where bandwidth, size or time are not known; `kept` of the speed at half; and why, in sentences.
    """
    total, token = trace.layers * trace.experts, trace.layers * trace.top_k
    fact = f"{trace.layers} layers of {trace.experts} experts, of which a token uses {trace.top_k} in each"
    sizes = f": {_amount(hardware, total)} in all, {_amount(hardware, token)} a token" if hardware.record else ""
    facts = [f"{fact}{sizes}."]
    best: dict[float, dict[str, Any]] = {}
    for share in (0.5, 0.25):
        here = [run for run in runs if run["slots"] == _slots(trace, share)]
        able = [run for run in here if run["policy"] != BOUND and run["predictor"] in (NONE, *REAL)]
        if able:
            best[share] = min(able, key=lambda run: (-(run["tokens_per_s"] or 0), run["reads"]))
            bound = [run["reads"] for run in here if run["policy"] == BOUND]
            facts.append(_told(hardware, share, best[share], bound))
    if 0.5 not in best or best[0.5]["tokens_per_s"] is None:
        facts.append("Whether that suffices needs a read bandwidth, an expert's bytes and the time that a token takes.")
        return {"suits": None, "kept": None, "sentences": facts}
    half = best[0.5]
    kept = half["tokens_per_s"] * hardware.seconds
    suits = "yes" if kept >= _GOOD else "barely" if kept >= _BEARABLE else "no"
    judged = {"yes": "suits", "barely": "is bearable for", "no": "does not suit"}[suits]
    fact = f"Offloading {judged} this model: with half of the experts resident it keeps {kept:.0%} of the speed"
    if suits != "yes":
        # misses / bandwidth may be so much of a token's time, and all reads must fit into the whole
        records = max(half["misses"] * _GOOD / (1 - _GOOD), half["reads"] * _GOOD)
        fact += f"; {_GOOD:.0%} would need {_bandwidth(records * hardware.record / hardware.seconds)}"
    return {"suits": suits, "kept": kept, "sentences": [*facts, f"{fact}."]}


def _told(hardware: Hardware, share: float, run: dict[str, Any], bound: list[float]) -> str:
    policy = run["policy"] + ("" if run["predictor"] == NONE else f" with {run['predictor']}")
    fact = f"With {_percent(share)} of the experts resident {policy} finds {run['hit_rate']:.1%} of uses there, reads "
    fact += f"{_amount(hardware, run['reads'])} a token"
    if bound:
        fact += f" (no policy less than {_amount(hardware, bound[0])})"
    if run["most_tokens_per_s"] is not None:
        fact += f"; {_bandwidth(hardware.bandwidth)} allow at most {run['most_tokens_per_s']:.1f} tokens/s"
    if run["tokens_per_s"] is not None:
        fact += f", {run['tokens_per_s']:.1f} are expected, {1 / hardware.seconds:.1f} with every expert resident"
    return f"{fact}."


def _row(trace: Trace, hardware: Hardware, counts: Counts) -> dict[str, Any]:
    tokens, uses = trace.tokens, counts.uses
    rate = counts.hits.sum() / max(uses.sum(), 1)
    low, high = _interval(_resampled(counts.hits) / np.maximum(_resampled(uses), 1), rate)
    total = {name: value / tokens for name, value in counts.total().items()}
    amounts = {"misses": total["misses"], "late": total["late"], "wasted": total["wasted"],
               "reads": total["misses"] + total["prefetched"]}  # fmt: skip
    most, expected = hardware.speed(amounts["reads"], amounts["misses"])
    again = (counts.misses - counts.compulsory).sum()
    return {
        "hit_rate": float(rate), "low": low, "high": high,
        "hit_rate_without_first_uses": float(counts.hits.sum() / max(counts.hits.sum() + again, 1)),
        "cold_recall": float(counts.foretold.sum() / counts.cold.sum()) if counts.cold.sum() else None,
        "on_time": float(counts.useful.sum() / counts.prefetched.sum()) if counts.prefetched.sum() else None,
        **amounts,
        **({f"{name}_bytes": value * hardware.record for name, value in amounts.items()} if hardware.record else {}),
        "most_tokens_per_s": most, "tokens_per_s": expected,
    }  # fmt: skip


def _windows(trace: Trace, part: slice, window: int) -> np.ndarray:
    """int64 [window + 1]: how many (window, layer, expert) have so many tokens of that expert."""
    found = np.zeros(window + 1, np.int64)
    tokens = part.stop - part.start
    if tokens < window:
        return found
    for layer in range(trace.layers):
        ids = trace.ids[part, layer]
        for first in range(0, trace.experts, step := max(_BITES // tokens, 1)):
            some = np.arange(first, min(first + step, trace.experts))
            uses = (ids[:, :, None] == some).any(1)
            sums = np.zeros((tokens + 1, len(some)), np.int32)
            np.cumsum(uses, 0, out=sums[1:])
            found += np.bincount((sums[window:] - sums[:-window]).ravel(), minlength=window + 1)
    return found


def _best_f1(counted: np.ndarray, window: int) -> tuple[float | None, float | None]:
    """(F1, P / A) of the best threshold; the lowest of equals, which keeps more."""
    uses = counted * np.arange(window + 1)
    a = uses.sum()
    if not a:
        return None, None
    true, chosen = uses[::-1].cumsum()[::-1], window * counted[::-1].cumsum()[::-1]
    f1 = 2 * true / (chosen + a)
    best = int(f1.argmax())
    return float(f1[best]), float(chosen[best] / a)


def _resampled(sums: np.ndarray) -> np.ndarray:
    """[resamples, ..]: the sums of `sums` [sequences, ..] over the sequences of each resample, which are the same for
    all `sums` of so many; none where there is one sequence."""
    count = len(sums)
    if count < 2:
        return np.zeros((0, *sums.shape[1:]))
    weights = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), _RESAMPLES)
    return weights.astype(float) @ sums


def _interval(tried: Sequence[float | None] | np.ndarray, value: float | None) -> tuple[float | None, float | None]:
    found = [one for one in tried if one is not None]
    if value is None or not found:
        return None, None
    low, high = np.quantile(found, (0.025, 0.975))
    return float(low), float(high)


def _slots(trace: Trace, share: float) -> int:
    """That share of all experts; a token's in one layer at least."""
    return max(round(trace.layers * trace.experts * share), trace.top_k)


def _percent(share: float) -> str:
    return f"{share * 100:g} %"


def _amount(hardware: Hardware, records: float) -> str:
    return f"{records * hardware.record / 2**20:.3g} MiB" if hardware.record else f"{records:.3g} experts"


def _bandwidth(bandwidth: float) -> str:
    return f"{bandwidth / 1e9:.3g} GB/s"
