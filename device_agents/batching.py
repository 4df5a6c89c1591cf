"""Which requests run together, and when: values and a clock that is passed in.

Requests of one key may be joined. A batch is due when it is full, when its first request has waited `max_wait`, or at
once when no device that has lately asked for the same could still join: who is alone never waits for nobody. Requests
leave in the order in which they came, and one whose deadline has passed leaves without being run. It knows nothing
about tensors, threads or links.
"""

import asyncio
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_LATELY = 10  # times max_wait: a device that asked within that is expected again


@dataclass(eq=False)
class Job:
    """A request that waits. `key`, a digest and shapes, is shared by those that may run together; moments are the
    loop's."""

    device: str
    key: tuple
    rows: int
    feeds: Mapping[str, Any]
    deadline: float | None
    arrived: float
    done: asyncio.Future | None = None
    tail: Any = None


class Waiting:
    """What waits, and which of it runs next: values and a clock that is passed in."""

    def __init__(self, max_batch: int = 8, max_wait: float = 0.003):
        self.max_batch, self.max_wait = max_batch, max_wait
        self._jobs: dict[tuple, deque[Job]] = {}
        self._asked: dict[tuple, dict[str, float]] = {}  # key -> device -> when it last asked

    def __len__(self) -> int:
        return sum(map(len, self._jobs.values()))

    def count(self, digest: str) -> int:
        """How many wait for the tail of that digest."""
        return sum(len(jobs) for key, jobs in self._jobs.items() if key[0] == digest)

    def add(self, job: Job) -> None:
        self._jobs.setdefault(job.key, deque()).append(job)
        self._asked.setdefault(job.key, {})[job.device] = job.arrived

    def due(self, now: float) -> float | None:
        """When the next batch should run, now or later; None while nothing waits."""
        return min((self._due(key, now) for key in self._jobs), default=None)

    def take(self, now: float) -> tuple[list[Job], list[Job]]:
        """Removes and returns the batch that is due, in the order of arrival, and what has become late."""
        late = []
        for key in list(self._jobs):
            jobs = self._jobs[key]
            for job in [job for job in jobs if job.deadline is not None and job.deadline <= now]:
                jobs.remove(job)
                late.append(job)
            if not jobs:
                del self._jobs[key]
        ready = [key for key in self._jobs if self._due(key, now) <= now]
        if not ready:
            return [], late
        key = min(ready, key=lambda key: self._jobs[key][0].arrived)
        jobs, rows = self._jobs[key], 0
        batch: list[Job] = []
        while jobs and (not batch or rows + jobs[0].rows <= self.max_batch):
            batch.append(jobs.popleft())
            rows += batch[-1].rows
        if not jobs:
            del self._jobs[key]
        return batch, late

    def drop(self, job: Job) -> None:
        """Forgets a job that nobody waits for any more."""
        jobs = self._jobs.get(job.key)
        if jobs and job in jobs:
            jobs.remove(job)
            if not jobs:
                del self._jobs[job.key]

    def _due(self, key: tuple, now: float) -> float:
        jobs = self._jobs[key]
        asked = self._asked[key] = {
            device: at for device, at in self._asked[key].items() if now - at <= _LATELY * self.max_wait
        }
        if sum(job.rows for job in jobs) >= self.max_batch or not asked.keys() - {job.device for job in jobs}:
            return now
        return jobs[0].arrived + self.max_wait

    def forget(self) -> None:
        """Drops what is known of keys that nobody asks for any more."""
        self._asked = {key: asked for key, asked in self._asked.items() if key in self._jobs}
