"""Memory as a promise: what a model will use, row by row, before anything is loaded.

`plan` is a pure function of a card, the sizes of the mapped weights and what a person asks for. It counts private
anonymous bytes and every mapped byte that a decode step touches. Elastic rows may be resized while the model serves;
fixed ones may not. A plan that does not fit is refused with its table and the two cheapest ways out.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .card import Card
from .errors import BudgetError, UsageError
from .language.cache import DTYPES, cache_bytes
from .language.decoder import rotary_bytes, stream_bytes

MIB = 1 << 20
DEFAULT_CONTEXT = 4096
SHORTEST_CONTEXT = 64
CHUNKS = (256, 128, 64, 32)
_ARENA = 1.22
_PASSING = 6 * MIB
_MOMENTS = 0.015  # of all else: a stack that left more room for what comes for moments would not follow its budget


@dataclass(frozen=True)
class Row:
    """One consumer: `where` is anonymous or mapped, `kind` fixed or elastic."""

    name: str
    bytes: int
    where: str
    kind: str = "fixed"
    note: str = ""


@dataclass(frozen=True)
class Sizes:
    """What a bundle brings, in bytes: `weights` mapped from the bundle and read by every step, `row` of the tables for
    each token of a step, `repacked` mapped from the prepared cache, `private` copies that the engine makes where
    nothing is prepared, `tokenizer`, the engine's own, `session`, and its `code`, touched for the first time. `cold` is
    what is read or held while the model is prepared and opened, before there is a cache or an activation. `graph`
    is fused (our own operators, which keep least between two of them), lowered (the same in the engine's) or plain. Of
    a `stack` there are the bytes of its first 0, 1, 2, .. entries, and the model needs `floor` of these to run; where
    `pool` is experts, these are slots for so many of them. `more` are rows that nothing chosen here changes,
    `arena` what graphs beside the model's own keep between two operators."""

    weights: int
    row: int = 0
    repacked: int = 0
    private: int = 0
    tokenizer: int = 0
    session: int = 0
    code: int = 56 << 18
    cold: int = 0
    graph: str = "plain"
    stack: Sequence[int] = (0,)
    floor: int = 0
    pool: str = "stack"
    more: tuple[Row, ...] = ()
    arena: int = 0

    @property
    def opening(self) -> int:
        """The most that is held before the model is ready."""
        more = sum(row.bytes for row in self.more)
        return self.cold + self.private + self.tokenizer + self.session + self.code + more


@dataclass(frozen=True)
class Plan:
    """Rows and the choices behind them. Lengths are tokens; `memory` is the budget in bytes, None for none; `entries`
    are those of the stack, where there is one."""

    rows: tuple[Row, ...]
    context: int
    slots: int
    chunk: int
    kv: str
    memory: int | None = None
    entries: int = 0

    @property
    def total(self) -> int:
        return sum(row.bytes for row in self.rows)

    @property
    def anonymous(self) -> int:
        return sum(row.bytes for row in self.rows if row.where == "anonymous")

    def table(self) -> str:
        """The rows as text, one a line."""
        lines = [f"{'':22}{'MiB':>9}  {'':10} {'':8}"]
        for row in self.rows:
            lines.append(f"{row.name:22}{row.bytes / MIB:9.1f}  {row.where:10} {row.kind:8} {row.note}".rstrip())
        budget = f"of {self.memory / MIB:.1f}" if self.memory is not None else "no budget"
        lines.append(f"{'total':22}{self.total / MIB:9.1f}  {budget}")
        return "\n".join(lines)

    def to_dict(self) -> dict:
        return {
            "rows": [vars(row) for row in self.rows], "total": self.total, "anonymous": self.anonymous,
            "memory": self.memory, "context": self.context, "slots": self.slots, "chunk": self.chunk, "kv": self.kv,
            "entries": self.entries,
        }  # fmt: skip


def plan(
    card: Card, sizes: Sizes, *, memory: int | None = None, context: int | None = None, slots: int = 1,
    kv: str = "fp32", chunk: int | None = None, shortest: int = SHORTEST_CONTEXT, loaded: bool = False,
    keep: int | None = None, entries: int | None = None,
) -> Plan:  # fmt: skip
    """Decides what goes where. Without `context` it is the longest that fits `memory` (up to the model's own, or
    4096 where there is no budget); without `chunk` the largest that leaves room for `context`. Of a model that is
    `loaded` only the context and the stack can change, so only that is offered where it does not fit.

    A stack takes the largest prefix that fits, or `entries` of it. Beside it, without `context`, memory that shrinks
    first costs context (from 4096 tokens down to 1024), then entries, and at the stack's floor context again; with
    `keep`, the context that there is, first entries and at the floor context.

    Raises UsageError for impossible arguments and BudgetError, with the table, where it cannot fit.
    """
    if kv not in DTYPES:
        raise UsageError(f"There is no key-value format {kv!r}.", f"It is one of {', '.join(DTYPES)}.", "Name one.")
    for name, value, least in (
        ("slots", slots, 1),
        ("context", context, 2),
        ("chunk", chunk, 1),
        ("memory", memory, 1),
    ):
        if value is not None and (type(value) is not int or value < least):
            raise UsageError(f"{name} is {value!r}.", f"It must be a whole number of at least {least}.", "Correct it.")
    if context is not None and context > card.max_context:
        why = f"The model was trained for {card.max_context}."
        raise UsageError(f"A context of {context} tokens is asked for.", why, "Ask for less.")
    stack = len(sizes.stack) - 1
    if entries is not None and (type(entries) is not int or not sizes.floor <= entries <= stack):
        why = f"This model's can have {sizes.floor} to {stack}."
        what = f"Slots for {entries!r} experts are" if sizes.pool == "experts" else f"A stack of {entries!r} entries is"
        raise UsageError(f"{what} asked for.", why, "Ask for as many as that.")
    floor, whole = (sizes.floor, stack) if entries is None else (entries, entries)

    def rows(
        length: int, block: int, entries: int = floor, kind: str = kv, count: int = slots
    ) -> tuple[Row, ...]:  # fmt: skip
        found = [Row("weights", sizes.weights, "mapped")]
        if stack:
            least = ", its floor" if entries == sizes.floor else ""
            if sizes.pool == "experts":
                note = f"slots for {entries} of {stack}{', the fewest' if least else ''}"
                found.append(Row("experts", sizes.stack[entries], "anonymous", "elastic", note))
            else:
                note = f"{entries} of {stack} blocks{least}"
                found.append(Row("stack", sizes.stack[entries], "mapped", "elastic", note))
        if sizes.repacked:
            found.append(Row("repacked weights", sizes.repacked, "mapped", note="prepared on this device"))
        if sizes.private:
            found.append(Row("private weights", sizes.private, "anonymous", note="the engine's own copies"))
        found += sizes.more
        if card.task == "generate":
            found.append(Row("key-value cache", cache_bytes(card, length, count, kind), "anonymous", "elastic",
                             f"{count} x {length} tokens, {kind}"))  # fmt: skip
            found.append(Row("rotary tables", rotary_bytes(card, length), "anonymous", "elastic"))
        work = activation_bytes(card, block, length, count, sizes.graph) + sizes.arena
        found.append(Row("activations", work, "anonymous", note=f"chunks of {block} tokens"))
        found.append(Row("tokenizer", sizes.tokenizer, "anonymous"))
        found.append(Row("engine", sizes.session, "anonymous", note="ONNX Runtime's own"))
        found.append(Row("engine code", sizes.code, "mapped", note="what running it adds of its libraries"))
        # Rows of tables that a long step fetches, the sampler's arrays in double, and what the heap holds more of in
        # one run than in another
        passing = sizes.row * block + 16 * card.vocab * card.has_head + _PASSING
        if stack:
            passing = min(passing, int(_MOMENTS * sum(row.bytes for row in found)))
        found.append(Row("step peak", passing, "anonymous", note="at most, for moments"))
        return tuple(row for row in found if row.bytes or row.name in ("weights", "activations", "stack", "experts"))

    def total(length: int, block: int, entries: int = floor, **kinds) -> int:
        return max(0 if loaded else sizes.opening, sum(row.bytes for row in rows(length, block, entries, **kinds)))

    def longest(block: int, most: int, limit: int, entries: int = floor) -> int:
        """The longest context that fits `limit`, 0 where none does."""
        return _largest(0, most, lambda length: total(length, block, entries) <= limit)

    chunks = (chunk,) if chunk else CHUNKS
    if memory is None:
        length = context or keep or min(card.max_context, DEFAULT_CONTEXT)
        return Plan(rows(length, chunks[0], whole), length, slots, chunks[0], kv, None, whole)
    most = context or keep or card.max_context
    least = context or min(shortest, most)
    for block in chunks:
        length = longest(block, most, memory)
        # A long chunk is worth less than room for a conversation
        if length >= (context or min(most, 1024)) or (block == chunks[-1] and length >= least):
            if stack and not (context or keep):
                length = max(min(length, 1024), longest(block, min(most, DEFAULT_CONTEXT), memory, whole))
            length = length if length == most or length < 64 else length // 64 * 64
            blocks = _largest(floor, whole, lambda some, n=length, c=block: total(n, c, some) <= memory)
            return Plan(rows(length, block, blocks), length, slots, block, kv, memory, blocks)
    block = chunks[-1]
    refused = Plan(rows(least, block), least, slots, block, kv, memory, floor)
    fixes = []
    other = longest(block, most, memory)
    if other >= min(shortest, card.max_context):
        fixes.append(f"ask for a context of {other} tokens")
    if not loaded and kv != "int8" and card.task == "generate" and total(least, block, kind="int8") <= memory:
        fixes.append("keep the cache in int8 (kv='int8')")
    if not loaded and slots > 1 and total(least, block, count=1) <= memory:
        fixes.append("ask for one slot")
    needed = total(least, block)
    fixes.append(f"allow {math.ceil(needed / MIB)} MiB")
    fixes.append("load it again with a shorter chunk" if loaded else "convert with a recipe of fewer bits")
    why = f"It would use {refused.total / MIB:.1f} MiB" if needed == refused.total else (
        f"It needs {needed / MIB:.1f} MiB while it is opened, and {refused.total / MIB:.1f} MiB then"
    )  # fmt: skip
    error = BudgetError(
        f"The model does not fit {memory / MIB:.1f} MiB.", f"{why}:\n{refused.table()}",
        f"{fixes[0][0].upper()}{fixes[0][1:]}, or {fixes[1]}.",
    )  # fmt: skip
    error.plan = refused  # type: ignore[assignment]
    raise error


def _largest(low: int, high: int, fits) -> int:
    """The largest number of low..high that fits, or `low`; bytes grow with it, so halving finds it."""
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low


def activation_bytes(card: Card, chunk: int, context: int, slots: int, graph: str = "plain") -> int:
    """Bytes that the engine's arena holds for intermediate values after a step of `chunk` tokens.

    ONNX Runtime shares a buffer only among values of one shape and keeps each to the end of a step, so what counts is
    how many values of each width are alive at once, plus the largest operator's scratch; its arena holds 1.22
    times that once it has seen chunks of several lengths.
    """
    q, kv = card.heads * card.head_dim, card.kv_heads * card.head_dim
    stream = 4 * card.hidden  # the residual, its sum, the norm and a block's output
    qkv = q + 2 * kv
    if card.task == "embed":
        # Q, K, V, their product, and one row of scores a head; the activation doubles the feed-forward
        floats = stream + 2 * qkv + 2 * card.ffn + card.heads * min(context, chunk)
        return int(_ARENA * 4 * floats * max(chunk, context))
    if graph == "fused":
        # The stream thrice, what attention takes and gives, the gated product; a row's codes and their sums, in bytes
        floats = 3 * card.hidden + qkv + q + card.ffn + 5 * max(card.ffn, card.hidden) // 16
    else:
        scratch = max(2 * q + 3 * kv + qkv, 5 * max(card.ffn, card.hidden) // 16)
        floats = stream + qkv + (2 if graph == "lowered" else 5) * card.ffn + scratch
    # Beside the arena: each slot's logits and the sampler's copies of them, and what a request's own lists take
    arena = 1.0 if graph == "fused" else _ARENA  # its scratch is of another heap
    if card.experts:  # what each chosen expert gives, the logits, and the rows that one takes and gives
        floats += (card.top_k + 2) * card.hidden + 2 * card.total_experts + card.expert_ffn + card.shared_ffn
    lists = 4 * card.vocab * card.has_head * 2 * slots + 5 * MIB // 4
    return int(arena * 4 * floats * max(chunk, slots)) + lists + sum(stream_bytes(card, chunk, slots))


def parse_size(text: "int | str | None") -> int | None:
    """Bytes from 200MB, 1.5GiB, 800M or a number; decimal units are powers of 1000. Raises UsageError."""
    if text is None or type(text) is int:
        return text
    units = {"": 1, "b": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
    cleaned = str(text).strip().lower()
    number = cleaned.rstrip("bikmgt")
    unit = cleaned[len(number) :]
    binary = unit.endswith("ib") or unit.endswith("i")
    prefix = unit[:1] if unit else ""
    try:
        value = float(number)
        if unit not in ("", "b", *(f"{p}{s}" for p in "kmgt" for s in ("", "b", "i", "ib"))):
            raise ValueError
        scale = 1024 ** "bkmgt".index(prefix) if binary else units[prefix]
        if not math.isfinite(value) or value <= 0:
            raise ValueError
    except ValueError:
        raise UsageError(
            f"{text!r} is not a size.", "A size is a number and a unit.", "Write 200MB or 1.5GiB."
        ) from None
    return int(value * scale)
