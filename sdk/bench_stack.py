"""A stacked bundle's speed at several sizes, each beside a stream read of the bytes that a step then reads, and beside
another bundle in turn: how much longer our own kernels take over the same bytes of a stack than over its.
"""

import contextlib
import statistics
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path

from shoal.runtime.errors import UsageError
from shoal.runtime.events import Progress, silent
from shoal.runtime.model import load

from . import bench
from . import bench_machine as machine
from .bench_arms import ShoalArm, Test


def measure(
    bundle: str, tests: Sequence[Test], *, sizes: int, beside: str | None = None, repetitions: int = 5,
    threads: int = 0, progress: Progress = silent, **loading,
) -> dict:  # fmt: skip
    """`tests` at `sizes` sizes of a stacked bundle, from its floor to what `loading` (as `load` takes it) leaves room
    for: {"bundle", "beside", "threads", "entries", "rows"}.

    A row has `entries`, `stack_bytes`, `test`, `mean`, `deviation`; tg tests also `step_bytes`, what a step reads,
    `gb_per_s`, `of_stream_read` and, with another bundle `beside`, `times`: seconds a byte over those of the other one.
    Raises UsageError where there is no stack, and what loading raises.
    """
    if not tests or not 2 <= sizes <= 64 or repetitions < 1:
        raise UsageError("Nothing would be measured.", "No test, size or repetition is left.", "Ask for 2 to 64 sizes.")
    threads = threads or machine.threads()
    card, _ = bench.describe(bundle)
    context = min(max(256, *(test.context for test in tests)), card.max_context)
    loading |= {"context": context, "threads": threads}
    with contextlib.ExitStack() as opened:
        model = opened.enter_context(load(bundle, progress=progress, **loading))
        stack = model.stack
        if stack is None:
            why = "Its size is what it is."
            raise UsageError(f"{bundle} has no stack.", why, "Name a bundle of the recipe bitstack or hybrid.")
        arms, other_bytes = [ShoalArm(model)], 0
        if beside is not None:
            other = opened.enter_context(load(beside, progress=progress, **loading))
            other_bytes = sum(length for *_, length in bench.step_ranges(other))
            arms.append(ShoalArm(other, Path(beside).name))
        rows = []
        for entries in spread(stack.index.sizes(), stack.index.floor, stack.entries, sizes):
            model.set_entries(entries)
            bench.run(arms, tests, 1, vocab=card.vocab, stage=f"warm up, {entries} entries", seed=8, progress=progress)
            with contextlib.closing(machine.Stream(bench.step_ranges(model), threads)) as stream:
                results, streamed = bench.run(
                    arms, tests, repetitions, vocab=card.vocab, stream=stream, progress=progress,
                    stage=f"{entries} entries",
                )  # fmt: skip
            for own, rival in zip(results[:: len(arms)], results[len(arms) - 1 :: len(arms)], strict=True):
                row = {"entries": entries, "stack_bytes": stack.bytes, "test": str(own.test), "mean": own.mean,
                       "deviation": own.deviation}  # fmt: skip
                if own.test.kind == "tg":
                    rate = own.mean * stream.bytes
                    row |= {"step_bytes": stream.bytes, "gb_per_s": rate / 1e9,
                            "of_stream_read": rate / statistics.fmean(streamed)}  # fmt: skip
                    row["times"] = rival.mean * other_bytes / rate if beside else None
                rows.append(row)
    named = Path(beside).name if beside else None
    return {"bundle": Path(bundle).name, "beside": named, "threads": threads, "entries": len(stack.index.order),
            "rows": rows}  # fmt: skip


def spread(held: Sequence[int], floor: int, most: int, count: int) -> list[int]:
    """`count` numbers of entries from `floor` to `most`, even by the bytes `held`; fewer of a short stack."""
    low, high = held[floor], held[most]
    wanted = (low + (high - low) * step // (count - 1) for step in range(count))
    return sorted({min(max(bisect_right(held, size) - 1, floor), most) for size in wanted})


def render(found: dict) -> str:
    """The rows as Markdown."""
    beside = found["beside"]
    header = ["entries", "stack, MiB", "test", "tokens/s", "step, MiB", "GB/s", "of stream read"]
    header += [f"time for the same bytes over {beside}'s"] if beside else []
    lines = [header, ["---:", "---:", "---", *["---:"] * (len(header) - 3)]]
    for row in found["rows"]:
        cells = [str(row["entries"]), f"{row['stack_bytes'] / 2**20:.1f}", row["test"],
                 f"{row['mean']:.1f} ± {row['deviation']:.1f}"]  # fmt: skip
        if "step_bytes" in row:
            cells += [f"{row['step_bytes'] / 2**20:.1f}", f"{row['gb_per_s']:.1f}", f"{row['of_stream_read']:.0%}"]
            cells += [f"{row['times']:.2f}"] if beside else []
        lines.append(cells + [""] * (len(header) - len(cells)))
    facts = f"- {found['bundle']}, {found['entries']} entries in all, {found['threads']} threads"
    return "\n".join(["| " + " | ".join(line) + " |" for line in lines] + ["", facts]) + "\n"
