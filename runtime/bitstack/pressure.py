"""How much memory a model should take as the system's changes: readings, a policy over them, and a thread that follows.

`decide` is a pure function of a reading and a state, so traces of real machines test it. Readings are of /proc and of
control groups version 2; where there is nothing to read (another system, a locked-down /proc) nothing is decided. It
shrinks at once and by enough, grows slowly and only after calm, and waits longer each time that growing was a mistake.
"""

import dataclasses
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .. import measure
from ..budget import SHORTEST_CONTEXT, Plan, parse_size
from ..errors import ShoalError, UsageError

MIB = 1 << 20
RESERVE = 128 * MIB
BAND = 0.03  # of the budget: how far off it may be before anything moves, and what a shrink gives beyond the need
STALLED = 0.10  # of the time that some task waits for memory: enough to shrink, whatever seems to be available
CALM = 0.01  # of the time: little enough to grow
PATIENCE, LONGEST = 10.0, 600.0  # seconds of calm after a shrink before it grows again, at first and at most
MISTAKE = 60.0  # seconds: who has grown and must shrink within them, or within two patiences, grew in vain
SETTLE = 2.0  # seconds after any change until the next one shows what it did; a lack of room does not wait for them


@dataclass(frozen=True)
class Reading:
    """What the system said at `time` (seconds): `available` bytes that nobody holds or that are of files and could be
    dropped, the model's mapped ones among them, under the tightest limit; None where it does not tell. `held` are the
    model's anonymous bytes, which are not among these. `stalled` is the share of the time since the reading before in
    which some task waited for memory."""

    time: float
    available: int | None
    held: int = 0
    stalled: float | None = None


@dataclass(frozen=True)
class State:
    """A model's `memory` budget now, the `least` and the `most` it may have, and the `reserve` to leave free, in bytes.
    Times are those of readings: when it last grew and shrank, and until when nothing is tried; `patience`: seconds."""

    memory: int
    least: int
    most: int
    reserve: int = RESERVE
    grew: float = -math.inf
    shrank: float = -math.inf
    until: float = -math.inf
    patience: float = PATIENCE


def decide(reading: Reading, state: State) -> int | None:
    """The budget in bytes that the model should have instead of `state.memory`; None where it should keep it."""
    if reading.time < state.until:
        return None
    room = math.inf if reading.available is None else reading.held + reading.available - state.reserve
    settled = reading.time - max(state.grew, state.shrank) >= SETTLE
    band = max(BAND * state.memory, MIB)
    target: float = state.memory
    if room < state.memory:
        target = room - band
    elif reading.stalled is not None and reading.stalled >= STALLED and settled:
        target = state.memory - max((state.memory - state.least) / 4, band)
    elif reading.available is not None and (reading.stalled or 0.0) <= CALM and settled:
        # Half of what is free at a time; the last bit at once
        gap = min(room - band, state.most) - state.memory
        if reading.time - state.shrank >= state.patience and (gap >= band or state.memory + gap >= state.most):
            target = state.memory + (gap if gap < 4 * band else gap / 2)
    found = int(min(max(target, state.least), state.most))
    return None if found == state.memory else found


def moved(state: State, memory: int, now: float) -> State:
    """The state once the model has the budget `memory`. A shrink soon after growing doubles the patience, a late one
    ends that."""
    if memory >= state.memory:
        return dataclasses.replace(state, memory=memory, grew=now)
    patience, lasted = state.patience, now - state.grew
    if state.grew > state.shrank:  # the first shrink after growing tells
        patience = min(2 * patience, LONGEST) if lasted < max(MISTAKE, 2 * patience) else PATIENCE
    return dataclasses.replace(state, memory=memory, shrank=now, patience=patience)


def refused(state: State, now: float) -> State:
    """The state once a change could not be made: another try comes after the patience of a beginning."""
    return dataclasses.replace(state, until=now + PATIENCE)


class System:
    """What the kernel says, below `root`; `clock` in seconds. What is absent or makes no sense says nothing."""

    def __init__(self, root: str | os.PathLike = "/", clock: Callable[[], float] = time.monotonic):
        self.root, self.clock = Path(root), clock
        self._before: tuple[float, int] | None = None  # time and stalled microseconds of the reading before

    def read(self, held: int = 0) -> Reading:
        """A reading now, for a model that holds `held` anonymous bytes."""
        now, groups = self.clock(), list(self.groups())
        rooms = [self.meminfo(), *map(available_in, groups)]
        stalled, spent = None, self.stalled(groups)
        if spent is not None:
            if self._before is not None and now > self._before[0] and spent >= self._before[1]:
                stalled = min(1.0, (spent - self._before[1]) / 1e6 / (now - self._before[0]))
            self._before = (now, spent)
        return Reading(now, min((room for room in rooms if room is not None), default=None), held, stalled)

    def meminfo(self) -> int | None:
        """MemAvailable of /proc/meminfo in bytes."""
        return measure.parse_status(_text(self.root / "proc/meminfo")).get("MemAvailable")

    def groups(self) -> Iterator[Path]:
        """The folders of this process's control group and of those above it."""
        inside = next(
            (line[3:] for line in _text(self.root / "proc/self/cgroup").splitlines() if line[:3] == "0::"), ""
        )
        for mount in parse_mounts(_text(self.root / "proc/self/mountinfo")):
            path = inside.removeprefix(mount[0]).strip("/") if inside.startswith(mount[0]) else ""
            parts = [part for part in path.split("/") if part]
            if ".." in parts:  # a group that is not below what is mounted here
                parts = []
            folder = self.root / mount[1].lstrip("/")
            for count in range(len(parts), -1, -1):
                yield folder.joinpath(*parts[:count])
            return

    def stalled(self, groups: list[Path]) -> int | None:
        """Microseconds in which some task waited for memory: of the control group, or else of the whole system."""
        for path in (*(group / "memory.pressure" for group in groups[:1]), self.root / "proc/pressure/memory"):
            if (spent := parse_pressure(_text(path))) is not None:
                return spent
        return None


def available_in(group: Path) -> int | None:
    """Bytes that a control group may still take, its files' pages counted as free; None where it has no limit."""
    limits = [_number(_text(group / name)) for name in ("memory.max", "memory.high")]
    current = _number(_text(group / "memory.current"))
    tightest = min((limit for limit in limits if limit is not None), default=None)
    if tightest is None or current is None:
        return None
    lines = (line.split() for line in _text(group / "memory.stat").splitlines())
    counts = {words[0]: _number(words[1]) or 0 for words in lines if len(words) == 2}
    files = counts.get("active_file", 0) + counts.get("inactive_file", 0)
    return max(0, tightest - current + min(files, current))


def parse_pressure(text: str) -> int | None:
    """The total of the line "some" of a PSI file, microseconds."""
    for line in text.splitlines():
        words = line.split()
        if words[:1] == ["some"]:
            return next((_number(word[6:]) for word in words if word.startswith("total=")), None)
    return None


def parse_mounts(text: str) -> list[tuple[str, str]]:
    """(root in its file system, where it is) of the control groups version 2 in /proc/self/mountinfo."""
    found = []
    for line in text.splitlines():
        words, _, rest = line.partition(" - ")
        fields = words.split()
        if rest.split()[:1] == ["cgroup2"] and len(fields) >= 5:
            found.append((fields[3].rstrip("/"), fields[4]))
    return found


@dataclass(frozen=True)
class Change:
    """What a watcher did at `reading`: the budget before and after it, and the plan; or why it could not, `error`."""

    reading: Reading
    before: int
    memory: int
    plan: Plan | None = None
    error: Exception | None = None


class Watcher:
    """Follows the system's memory with a model's budget, on a thread of its own, from `start` until `close`.

    `least` and `most` bound the budget, by default what the model's floor and the whole of it take; `reserve` bytes are
    left free; `interval` is in seconds. `on_change` is told of every Change, on that thread, refused ones included;
    `error` is the latest that it was not told, because there is none or because it raised.
    """

    def __init__(
        self, model, least: "int | str | None" = None, most: "int | str | None" = None,
        reserve: "int | str" = RESERVE, interval: float = 1.0, on_change: Callable[[Change], None] | None = None,
        system: System | None = None,
    ):  # fmt: skip
        """Raises UsageError for bounds that are none."""
        if not 0.01 <= interval <= 3600:
            raise UsageError(f"interval is {interval!r}.", "It is 0.01 to 3600 seconds.", "Correct it.")
        low, high = _bounds(model)
        bottom, top, free = (parse_size(size) for size in (least, most, reserve))
        bottom = low if bottom is None else bottom
        top = high if top is None else min(top, max(high, bottom))
        if bottom > top:
            raise UsageError(f"least is {bottom} bytes and most {top}.", "The model lies between.", "Correct them.")
        self.interval, self.on_change, self.system = interval, on_change, system or System()
        self.state = State(_budget(model), bottom, top, free or 0)
        self.error: Exception | None = None
        self._model = weakref.ref(model)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="follow-memory", daemon=True)

    def start(self) -> "Watcher":
        self._thread.start()
        return self

    def close(self) -> None:
        """Ends the thread, after what it is changing just now; a second call does nothing."""
        self._stop.set()
        if self._thread.ident is not None and threading.current_thread() is not self._thread:
            self._thread.join()

    def step(self) -> Change | None:
        """Reads, decides and changes once; what the thread does at every interval."""
        model = self._model()
        if model is None or model.closed:
            self._stop.set()
            return None
        self.state = dataclasses.replace(self.state, memory=_budget(model))  # others may set it too
        held = min(model.plan.anonymous, measure.anonymous_bytes() or model.plan.anonymous)
        reading, before = self.system.read(held), self.state.memory
        memory = decide(reading, self.state)
        if memory is None:
            return None
        try:
            change = Change(reading, before, memory, model.set_memory(memory))
            self.state = moved(self.state, memory, reading.time)
        except Exception as error:
            if model.closed:
                return None
            change = Change(reading, before, before, error=error)
            self.state = refused(self.state, reading.time)
        self._tell(change)
        return change

    def _tell(self, change: Change) -> None:
        error = change.error
        if self.on_change is not None:
            try:
                self.on_change(change)
                error = None
            except Exception as raised:  # theirs, and the model's budget must be followed all the same
                error = raised
        if error is not None:
            self.error = error

    def _follow(self) -> None:
        while not self._stop.wait(self.interval):
            try:
                self.step()
            except ShoalError as error:
                self.error = error

    def __enter__(self) -> "Watcher":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _budget(model) -> int:
    return model.plan.memory or model.plan.total


def _bounds(model) -> tuple[int, int]:
    """Bytes that the model takes at the least, its context kept where it has a stack, and with all it could have."""
    plan, stack = model.plan, model.stack
    kept = {"memory": None, "chunk": plan.chunk, "loaded": True}
    if stack is None:
        least = model.parts.replan(**kept, context=min(SHORTEST_CONTEXT, plan.context))
        return least.total, max(plan.total, _budget(model))
    low, high = (
        model.parts.replan(**kept, context=plan.context, entries=entries)
        for entries in (stack.index.floor, len(stack.index.order))
    )
    return low.total, high.total


def _text(path: Path) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(1 << 20)
    except (OSError, ValueError):
        return ""


def _number(text: str) -> int | None:
    """A count; None for "max" and for what is none."""
    text = text.strip()
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None
