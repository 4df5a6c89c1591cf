"""The sessions of one part of a language model on the edge: whose key-value rows are whose, and whose step is next.

`Sessions` is the policy, pure: a session keeps a slot of the cache until another needs it and it has been idle for
`hold` seconds; a device beyond its share loses its own oldest first. `Rest` runs the part for all sessions from one
task: one chunk of the oldest prompt, then one position for everybody who decodes, in one run. It knows nothing about
links and messages.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from shoal.runtime.errors import BackendError, BusyError, LinkError, ShoalError
from shoal.runtime.language.part import Part, Step


@dataclass(eq=False)
class Session:
    """`held` positions of `slot` are valid; a session that lost its slot has -1. `turn` is the latest request's,
    `calls` are under way, `used` is when."""

    owner: str
    name: str
    slot: int
    used: float
    held: int = 0
    turn: int = 0
    calls: int = 0


class Sessions:
    """`slots` rows of a cache. One owner gets at most `share` of them, by default half, while others want them."""

    def __init__(self, slots: int, hold: float = 10.0, share: int | None = None):
        self.slots, self.hold = slots, hold
        self.share = max(1, slots // 2) if share is None else share
        self._table: dict[tuple[str, str], Session] = {}

    def __len__(self) -> int:
        return len(self._table)

    @property
    def calls(self) -> int:
        """Requests under way."""
        return sum(session.calls for session in self._table.values())

    def enter(self, owner: str, name: str, turn: int, now: float) -> Session:
        """The owner's session of that name for one request, new (it then holds nothing) where there is none; `leave`
        must follow. Raises BusyError, with `retry_ms`, where no slot is to be had, and LinkError for a turn that comes
        after a later one: what an old link still delivered. Turn 0 has no order."""
        session = self._table.get((owner, name))
        if session is None:
            session = self._table[owner, name] = Session(owner, name, self._slot(owner, now), now)
        elif 0 < turn <= session.turn:
            raise overtaken()
        session.turn, session.used = turn or session.turn, now
        session.calls += 1
        return session

    def leave(self, session: Session, now: float) -> None:
        session.calls -= 1
        session.used = now

    def forget(self, owner: str) -> None:
        """Frees the idle sessions of an owner that is gone for good."""
        for session in [s for s in self._table.values() if s.owner == owner and not s.calls]:
            self._end(session)

    def _end(self, session: Session) -> int:
        """Ends a session; returns the slot that it had."""
        del self._table[session.owner, session.name]
        slot, session.slot = session.slot, -1
        return slot

    def _slot(self, owner: str, now: float) -> int:
        """A free slot, the lowest, so that those in use lie together and run together; else of who may lose it."""
        taken = {session.slot for session in self._table.values()}
        if len(taken) < self.slots:
            return min(set(range(self.slots)) - taken)
        idle = sorted((s for s in self._table.values() if not s.calls), key=lambda session: session.used)
        own = [session for session in idle if session.owner == owner]
        if sum(session.owner == owner for session in self._table.values()) < self.share:
            own = []
        expired = [session for session in idle if now - session.used >= self.hold]
        for session in (*own, *expired):
            return self._end(session)
        error = BusyError(
            "The edge has no room for another session.", f"All {self.slots} are in use.", "It may work later."
        )
        wait = min((self.hold - (now - session.used) for session in idle), default=self.hold)
        error.retry_ms = max(1, round(wait * 1000))  # type: ignore[attr-defined]
        raise error


def overtaken() -> LinkError:
    return LinkError("The request was overtaken.", "A later one of this session came first.", "Nothing is lost.")


@dataclass(eq=False)
class _Job:
    """`x` fp32 [n, hidden] at `position`; `finish` makes the result of the last row's logits, in the worker thread."""

    session: Session
    turn: int
    x: np.ndarray
    position: int
    finish: Callable[[np.ndarray], Any] | None
    done: asyncio.Future
    at: int = 0  # rows that have run
    seconds: float = 0.0


@dataclass
class Load:
    """What a Rest has done: positions, engine runs and seconds in them."""

    positions: int = 0
    runs: int = 0
    seconds: float = 0.0
    waiting: int = 0


class Rest:
    """A part with the head, serving many sessions."""

    def __init__(self, part: Part, sessions: Sessions):
        self.part, self.sessions = part, sessions
        self.load = Load()
        self._jobs: deque[_Job] = deque()
        self._moved = asyncio.Event()
        self._worker: asyncio.Task | None = None
        self._thread = ThreadPoolExecutor(1, "rest")
        self._closed = False

    async def run(
        self, session: Session, turn: int, x: np.ndarray, position: int, finish: Callable[[np.ndarray], Any] | None
    ) -> tuple[Any, float]:
        """What `finish` makes of the last row's logits (None: nothing is wanted), and the seconds the engine took.

        Raises LinkError where a later turn has come meanwhile, and what the part raises. Where the caller is cancelled
        the rows are run all the same, unless a later turn comes: a device that returns need not send them again.
        """
        if self._closed:
            raise BackendError("The model is closed.", "The edge is shutting down.", "Ask again later.")
        job = _Job(session, turn or session.turn, x, position, finish, asyncio.get_running_loop().create_future())
        self._jobs.append(job)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await job.done, job.seconds

    async def settled(self, session: Session) -> None:
        """Waits until no rows of a session wait to be run."""
        while any(job.session is session for job in self._jobs):
            self._moved.clear()
            await self._moved.wait()

    async def _work(self) -> None:
        """Runs until nothing waits."""
        while self._jobs:
            for job in [job for job in self._jobs if job.session.slot < 0 or job.turn != job.session.turn]:
                self._settle(job, overtaken())
            long = next((job for job in self._jobs if len(job.x) - job.at > 1), None)
            if long is not None:
                await self._take([long], self._chunk)
            short: dict[int, _Job] = {}
            for job in self._jobs:
                if len(job.x) - job.at == 1 and job is not long:
                    short.setdefault(job.session.slot, job)
            if short:
                await self._take(list(short.values()), self._steps)

    async def _take(self, jobs: list[_Job], work: Callable[[list[_Job]], list[Any]]) -> None:
        """Runs `work` on the jobs; where several fail together each runs alone, so that one takes no other along."""
        started = time.perf_counter()
        try:
            results = await asyncio.get_running_loop().run_in_executor(self._thread, work, jobs)
        except Exception as error:
            if len(jobs) > 1:
                for job in jobs:
                    await self._take([job], work)
                return
            known = error if isinstance(error, ShoalError) else BackendError(
                "A step of the model failed.", f"{type(error).__name__}: {error}", "See the edge's log."
            )  # fmt: skip
            jobs[0].session.held = min(jobs[0].session.held, jobs[0].position + jobs[0].at)
            self._settle(jobs[0], known)
            return
        spent = time.perf_counter() - started
        self.load.runs += 1
        self.load.seconds += spent
        for job, (rows, result) in zip(jobs, results, strict=True):
            job.at += rows
            job.seconds += spent
            job.session.held = job.position + job.at
            self.load.positions += rows
            if job.at == len(job.x):
                self._settle(job, result)

    def _chunk(self, jobs: list[_Job]) -> list[Any]:
        [job] = jobs
        part = job.x[job.at : job.at + self.part.chunk]
        last = job.at + len(part) == len(job.x) and job.finish is not None
        logits = self.part.forward(job.session.slot, part, job.position + job.at, rows=int(last))
        return [(len(part), job.finish(logits[0]) if last and job.finish else None)]

    def _steps(self, jobs: list[_Job]) -> list[Any]:
        steps = [Step(job.session.slot, job.x[job.at], job.position + job.at) for job in jobs]
        return [
            (1, job.finish(logits) if job.finish else None)
            for job, logits in zip(jobs, self.part.step(steps), strict=True)
        ]

    def _settle(self, job: _Job, result: Any) -> None:
        if job in self._jobs:  # else it was ended while it ran
            self._jobs.remove(job)
        self._moved.set()
        if not job.done.done():
            if isinstance(result, ShoalError):
                job.done.set_exception(result)
            else:
                job.done.set_result(result)

    async def close(self) -> None:
        """Ends what waits, then frees the part."""
        self._closed = True
        for job in list(self._jobs):
            self._settle(job, BackendError("The model is closed.", "The edge is shutting down.", "Ask again later."))
        if self._worker is not None:
            await asyncio.wait([self._worker])
        await asyncio.get_running_loop().run_in_executor(self._thread, self.part.close)
        self._thread.shutdown()
