"""Real threads that follow the schedule: one a processor, each runs what schedule.State hands it, and notes when.

A processor's thread waits for its device; ONNX Runtime lets the interpreter go meanwhile, so all work at once. A task
that fails ends everything, one that hangs is given up. This module knows nothing about graphs: what a task does is a
call.
"""

import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from .errors import BackendError, UsageError
from .schedule import Rule, Run, Schedule, State, Task, layer_first, processors

PATIENCE = 120.0  # seconds that one task may take


def execute(
    tasks: Sequence[Task], work: Callable[[int, str], object], *, rule: Rule = layer_first, strict: bool = False,
    patience: float = PATIENCE, cores: Mapping[str, Iterable[int]] | None = None,
) -> Schedule:  # fmt: skip
    """Calls `work(index, processor)` for every task, each after what it needs, and returns what ran when.

    Their expected seconds only steer. `cores` keeps a processor's thread on some of the machine's cores (Linux): what
    an engine of one thread computes then stays there. Raises what a task raised, the first one, when those that
    were running have come back; BackendError for a task that takes longer than `patience` seconds, whose thread is
    left behind.
    """
    run = _Execution(State(tasks, rule, strict), work, patience)
    threads = [
        threading.Thread(target=run.serve, args=(name, (cores or {}).get(name)), name=f"shoal-{name}", daemon=True)
        for name in processors(tasks)
    ]
    for thread in threads:
        thread.start()
    run.wait()
    return Schedule(tuple(tasks), tuple(sorted(run.runs, key=lambda one: (one.start, one.task))))


class _Execution:
    def __init__(self, state: State, work: Callable[[int, str], object], patience: float):
        self.state, self.work, self.patience = state, work, patience
        self.runs: list[Run] = []
        self.error: BaseException | None = None
        self.began = time.perf_counter()
        self._running: dict[str, tuple[int, float]] = {}  # processor -> task, when it began
        self._turn = threading.Condition()

    def serve(self, name: str, cores: Iterable[int] | None) -> None:
        """A processor's thread."""
        if cores is not None and hasattr(os, "sched_setaffinity"):
            try:
                os.sched_setaffinity(threading.get_native_id(), cores)
            except (OSError, ValueError) as error:
                why = f"Cores {sorted(cores)} of this machine: {error}."
                self._stop(UsageError(f"The {name} cannot be kept there.", why, "Name cores that the process may use."))
        while (index := self._next(name)) is not None:
            failed: BaseException | None = None
            start = self._now()
            try:
                self.work(index, name)
            except BaseException as raised:
                failed = raised
            self._done(Run(index, name, start, self._now()), failed)

    def wait(self) -> None:
        """Until all is done or something is wrong, which is raised."""
        try:
            with self._turn:
                while self._running or (self.state.left and self.error is None):
                    oldest = min((began for _, began in self._running.values()), default=self._now())
                    left = oldest + self.patience - self._now()
                    if left <= 0:
                        raise self._late()
                    self._turn.wait(min(left, 1.0))
        except BaseException as error:  # of a hang, or Ctrl-C: nothing more begins
            self._stop(error)
            raise
        if self.error is not None:
            raise self.error

    def _stop(self, error: BaseException) -> None:
        with self._turn:
            self.error = self.error or error
            self._turn.notify_all()

    def _next(self, name: str) -> int | None:
        """The task that processor `name` begins now, waiting for one; None when there will be none."""
        with self._turn:
            while self.state.left and self.error is None:
                tasks = self.state.tasks
                expected = {one: began + tasks[at].seconds[one] for one, (at, began) in self._running.items()}
                index = self.state.choose(self._now(), expected).get(name)
                if index is not None:
                    self.state.begin(index)
                    self._running[name] = (index, self._now())
                    return index
                self._turn.wait(1.0)  # whoever ends or begins something wakes the others
            return None

    def _done(self, run: Run, error: BaseException | None) -> None:
        with self._turn:
            self._running.pop(run.processor, None)
            self.runs.append(run)
            if error is not None:
                self.error = self.error or error
            else:
                self.state.done(run.task)
            self._turn.notify_all()

    def _late(self) -> BackendError:
        name, (index, _) = min(self._running.items(), key=lambda one: one[1][1])
        return BackendError(
            f"The {name} did not finish {self.state.tasks[index].name} within {self.patience:g} s.",
            "Its driver hangs, or it is far slower than it was expected to be.",
            "Start the program again without it, or allow more seconds.",
        )

    def _now(self) -> float:
        return time.perf_counter() - self.began
