"""Who computes what next: subgraphs of several chunks of a prompt on the npu, the gpu and the cpu at once.

Pure: what is ready, who is idle and the time come in, who starts what comes out. `simulate` plays it through by
expected times, executor.py follows it with real threads; both ask the same `State`. It knows nothing about graphs.

The rule is llm.npu's (Xu et al., ASPLOS 2025, out-of-order execution): where a processor is free, start the ready
subgraph that brings the bottleneck most work, and among equals the one of the lowest layer. The last matters more: with
ties to the lowest chunk processors wait for each other at the end (docs/backends.md has figures).
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from .errors import UsageError


@dataclass(frozen=True)
class Task:
    """A subgraph of one chunk: `seconds` it takes on each processor that can run it, by the processor's name, and the
    tasks it `needs`, by their places in the list. `part` is its place within the layer."""

    name: str
    chunk: int
    layer: int
    part: int
    seconds: Mapping[str, float]
    needs: tuple[int, ...] = ()

    @property
    def best(self) -> str:
        """The processor that takes the shortest."""
        return min(self.seconds, key=lambda name: (self.seconds[name], name))


@dataclass(frozen=True)
class Run:
    """`task`, by its place, ran on `processor` from `start` to `end`, in seconds from the beginning."""

    task: int
    processor: str
    start: float
    end: float


@dataclass(frozen=True)
class Schedule:
    """What ran when, in the order of starting."""

    tasks: tuple[Task, ...]
    runs: tuple[Run, ...]

    @property
    def makespan(self) -> float:
        """Seconds from the beginning to the last end."""
        return max((run.end for run in self.runs), default=0.0)

    def busy(self) -> dict[str, float]:
        """Processor -> seconds that it worked."""
        found = dict.fromkeys(processors(self.tasks), 0.0)
        for run in self.runs:
            found[run.processor] += run.end - run.start
        return found

    def bubbles(self) -> dict[str, float]:
        """Processor -> the share of the makespan in which it did not work. That of the bottleneck is what better order
        could win."""
        whole = self.makespan
        return {name: 1 - busy / whole if whole else 0.0 for name, busy in self.busy().items()}


@dataclass(frozen=True)
class Part:
    """A kind of subgraph that every layer has, for every chunk. `seconds(chunk)` -> those of each processor. With
    `across` it reads what the part before it gave for all chunks up to its own: attention, through the cache."""

    name: str
    seconds: Callable[[int], Mapping[str, float]]
    across: bool = False


def prefill(parts: Sequence[Part], layers: int, chunks: int) -> list[Task]:
    """The tasks of a prompt of `chunks` chunks: within a chunk the parts run in order, layer after layer. They are
    listed chunk by chunk, which is strict order."""
    tasks: list[Task] = []
    place: dict[tuple[int, int, int], int] = {}
    for chunk in range(chunks):
        for layer in range(layers):
            for at, part in enumerate(parts):
                before = (layer, at - 1) if at else (layer - 1, len(parts) - 1)
                since = 0 if part.across else chunk
                needs = tuple(place[one, *before] for one in range(since, chunk + 1) if before[0] >= 0)
                place[chunk, layer, at] = len(tasks)
                name = f"{layer}/{part.name} of chunk {chunk}"
                tasks.append(Task(name, chunk, layer, at, part.seconds(chunk), needs))
    return tasks


def processors(tasks: Iterable[Task]) -> list[str]:
    """The names of all processors that some task can run on."""
    return sorted({name for task in tasks for name in task.seconds})


def lower_bound(tasks: Sequence[Task]) -> float:
    """No schedule is shorter: the longest chain at its fastest, all work that only one processor can do, and all work
    at its fastest spread evenly."""
    ends: list[float] = []
    only = dict.fromkeys(processors(tasks), 0.0)
    for task in tasks:
        ends.append(max((ends[need] for need in task.needs), default=0.0) + task.seconds[task.best])
        if len(task.seconds) == 1:
            only[task.best] += task.seconds[task.best]
    spread = sum(task.seconds[task.best] for task in tasks) / max(1, len(only))
    return max([0.0, spread, *ends, *only.values()])


Rule = Callable[["State", int], tuple]


@dataclass
class State:
    """A schedule in the making: what has begun, what is done, what is ready. `rule` gives a ready task its key, the
    least first; with `strict` each processor takes its tasks in the order of the list and waits for the next one.

    Raises UsageError for tasks that do not end: a need that does not come before, a time that is none.
    """

    tasks: Sequence[Task]
    rule: Rule
    strict: bool = False
    ready: set[int] = field(default_factory=set, init=False)
    left: int = field(init=False)

    def __post_init__(self) -> None:
        self._unmet = [len(set(task.needs)) for task in self.tasks]
        self._followers: list[list[int]] = [[] for _ in self.tasks]
        for index, task in enumerate(self.tasks):
            if not task.seconds or not all(0 <= seconds < math.inf for seconds in task.seconds.values()):
                why = f"It takes {dict(task.seconds)} seconds."
                raise UsageError(f"{task.name} cannot be scheduled.", why, "Give a time of at least one processor.")
            for need in set(task.needs):
                if not 0 <= need < index:
                    why = f"It needs number {need} and is number {index}."
                    raise UsageError(f"{task.name} cannot be scheduled.", why, "List what it needs before it.")
                self._followers[need].append(index)
        self.left = len(self.tasks)
        self.ready = {index for index, unmet in enumerate(self._unmet) if not unmet}
        work = dict.fromkeys(processors(self.tasks), 0.0)
        for task in self.tasks:
            work[task.best] += task.seconds[task.best]
        self.bottleneck = max(work, key=lambda name: (work[name], name), default="")
        # What each processor has yet to begin, for strict order
        self._queues = {name: [i for i, task in enumerate(self.tasks) if task.best == name] for name in work}

    def choose(self, now: float, running: Mapping[str, float]) -> dict[str, int]:
        """Processor -> task for the idle ones to begin now; `running` says when those at work are expected to be free.

        Ready tasks are handed out by the rule, each to the processor where it would end first, so no processor is idle
        while a task is ready that it alone runs, and a slow one does not take what a fast one will have done sooner.
        """
        free = {name: max(now, running.get(name, now)) for name in self._queues}
        chosen: dict[str, int] = {}
        if self.strict:
            for name, queue in self._queues.items():
                if name not in running and queue and queue[0] in self.ready:
                    chosen[name] = queue[0]
            return chosen
        for index in sorted(self.ready, key=lambda index: self.rule(self, index)):
            seconds = self.tasks[index].seconds
            name = min(seconds, key=lambda name: (free[name] + seconds[name], name))
            if name not in running and name not in chosen:
                chosen[name] = index
            free[name] += seconds[name]
        return chosen

    def begin(self, index: int) -> None:
        """`index` was chosen and runs from now on."""
        self.ready.remove(index)
        if self.strict:
            self._queues[self.tasks[index].best].remove(index)

    def done(self, index: int) -> None:
        """`index` has ended; what needed only it becomes ready."""
        self.left -= 1
        for follower in self._followers[index]:
            self._unmet[follower] -= 1
            if not self._unmet[follower]:
                self.ready.add(follower)

    def brings(self, index: int) -> float:
        """The paper's C: seconds of the bottleneck's work that becomes ready only through this task; negative where the
        bottleneck itself would do the task, because that work is then there anyway."""
        opened = (self.tasks[one] for one in self._followers[index] if self._unmet[one] == 1)
        work = sum(task.seconds[task.best] for task in opened if task.best == self.bottleneck)
        return -work if self.tasks[index].best == self.bottleneck else work


def layer_first(state: State, index: int) -> tuple:
    """The rule: most work for the bottleneck, then the lowest layer, the earliest part, the lowest chunk."""
    task = state.tasks[index]
    return (-state.brings(index), task.layer, task.part, task.chunk)


def chunk_first(state: State, index: int) -> tuple:
    """The same with ties to the lowest chunk; for comparison."""
    task = state.tasks[index]
    return (-state.brings(index), task.chunk, task.layer, task.part)


def simulate(tasks: Sequence[Task], rule: Rule = layer_first, strict: bool = False) -> Schedule:
    """What would run when, if every task took the seconds it is expected to."""
    state, now = State(tasks, rule, strict), 0.0
    running: dict[str, Run] = {}
    runs: list[Run] = []
    while state.left:
        for name, index in state.choose(now, {name: run.end for name, run in running.items()}).items():
            state.begin(index)
            running[name] = Run(index, name, now, now + tasks[index].seconds[name])
            runs.append(running[name])
        now = min(run.end for run in running.values())
        for name in [name for name, run in running.items() if run.end <= now]:
            state.done(running.pop(name).task)
    return Schedule(tuple(tasks), tuple(runs))


def chrome_trace(schedule: Schedule) -> dict:
    """The schedule as a trace that chrome://tracing and ui.perfetto.dev show: a line a processor, a box a task; with
    makespan, lower bound and bubbles beside it. Times are microseconds."""
    names = processors(schedule.tasks)
    events: list[dict] = [
        {"ph": "M", "pid": 1, "tid": tid, "name": "thread_name", "args": {"name": name}}
        for tid, name in enumerate(names, 1)
    ]
    for run in schedule.runs:
        task = schedule.tasks[run.task]
        events.append({
            "ph": "X", "pid": 1, "tid": 1 + names.index(run.processor), "name": task.name, "cat": run.processor,
            "ts": run.start * 1e6, "dur": (run.end - run.start) * 1e6,
            "args": {"chunk": task.chunk, "layer": task.layer, "expected_us": task.seconds[run.processor] * 1e6},
        })  # fmt: skip
    facts = {"makespan_s": schedule.makespan, "expected_bound_s": lower_bound(schedule.tasks)}
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {**facts, "bubbles": schedule.bubbles()}}
