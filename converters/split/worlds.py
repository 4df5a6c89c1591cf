"""Many sets of edges at once, each with its own tasks: what a choice among edges is trained in.

The same processor sharing as `runtime.split.offload.simulate`, which a test holds it to, over arrays of
[worlds, edges, tasks]. Edges that a world does not have are masked. Seconds, bytes and work as there; nothing here
learns.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from shoal.runtime.split.learned import View

_ROOM = 16  # tasks that an edge has room for at first


@dataclass(frozen=True)
class Context:
    """What worlds are: of edges [worlds, edges] `speed`, `rate`, `watts`, `joules` and which are `present`; of tasks
    [worlds, tasks] `at`, `nbytes` and `work`; what is expected of tasks [worlds]: seconds from one to the next
    `every`, and the mean `typical_nbytes` and `typical_work`; the preference's `weight` and `scale` [worlds]."""

    speed: np.ndarray
    rate: np.ndarray
    watts: np.ndarray
    joules: np.ndarray
    present: np.ndarray
    at: np.ndarray
    nbytes: np.ndarray
    work: np.ndarray
    every: np.ndarray
    typical_nbytes: np.ndarray
    typical_work: np.ndarray
    weight: np.ndarray
    scale: np.ndarray

    def rows(self, index: np.ndarray) -> "Context":
        """The worlds of these indices."""
        return Context(*(getattr(self, name)[index] for name in self.__dataclass_fields__))


class Worlds:
    """Where the tasks are at `now` [worlds]. `waited` [worlds] is the sum of the seconds that tasks have spent since
    they came, being sent and computed; `joules` [worlds] what was spent on them."""

    def __init__(self, context: Context):
        self.context = context
        worlds, edges = context.speed.shape
        self.now, self.waited, self.joules = np.zeros(worlds), np.zeros(worlds), np.zeros(worlds)
        self._done = np.zeros((worlds, edges))  # the work that a task has had that has always been there
        self._ends = np.full((worlds, edges, _ROOM), np.inf)  # the `_done` at which a task ends
        self._comes = np.full((worlds, edges, _ROOM), np.inf)  # when one that is being sent is there
        self._sent = np.zeros((worlds, edges, _ROOM))  # its work

    def rows(self, index: np.ndarray) -> "Worlds":
        """A copy of the worlds of these indices."""
        found = object.__new__(Worlds)
        found.context = self.context.rows(index)
        for name in ("now", "waited", "joules", "_done", "_ends", "_comes", "_sent"):
            setattr(found, name, getattr(self, name)[index].copy())
        return found

    def view(self, nbytes: np.ndarray, work: np.ndarray) -> View:
        """What a choice for a task of so many bytes and so much work [worlds] is made from."""
        c = self.context
        works = self.works()
        works = np.sort(works, 2)[..., -max(1, int((works > 0).sum(2).max())) :]
        load = (c.every, c.typical_nbytes, c.typical_work, c.weight, c.scale)
        return View(c.speed, c.rate, c.watts, c.joules, c.present, works, nbytes, work, *load)

    def works(self) -> np.ndarray:
        """What remains of the tasks [worlds, edges, room], those being sent too; 0 where none is."""
        left = np.where(np.isfinite(self._ends), np.maximum(self._ends - self._done[..., None], 0.0), 0.0)
        return np.concatenate([left, self._sent], 2)

    def place(self, choice: np.ndarray, nbytes: np.ndarray, work: np.ndarray) -> None:
        """A task for each world, of so many bytes and so much work [worlds], is sent to its edge `choice` [worlds]."""
        every = np.arange(len(choice))
        free = np.isinf(self._comes[every, choice])
        if not free.any(1).all():
            self._comes = _wider(self._comes, np.inf)
            self._sent = _wider(self._sent, 0.0)
            free = np.isinf(self._comes[every, choice])
        slot, context = free.argmax(1), self.context
        sending = nbytes / context.rate[every, choice]
        self._comes[every, choice, slot] = self.now + sending
        self._sent[every, choice, slot] = work
        self.joules += context.watts[every, choice] * sending + context.joules[every, choice] * work

    def until(self, moment: np.ndarray) -> None:
        """Goes on to that moment [worlds], which may be infinite: until all is done."""
        speed, clock = self.context.speed, np.repeat(self.now[:, None], self._done.shape[1], 1)
        moment = np.broadcast_to(moment[:, None], clock.shape)
        going = np.argwhere(clock < moment)
        w, e = going[:, 0], going[:, 1]
        while len(w):
            ends, comes = self._ends[w, e], self._comes[w, e]
            count = np.isfinite(ends).sum(1)
            first, next_ = ends.min(1), comes.min(1)
            now, end = clock[w, e], moment[w, e]
            with np.errstate(invalid="ignore"):
                finish = np.where(count > 0, now + (first - self._done[w, e]) * count / speed[w, e], np.inf)
            step = np.minimum(np.minimum(finish, next_), end)
            idle = np.isinf(step)  # until infinity, and nothing is left
            passed = np.where(idle, 0.0, step - now)
            np.add.at(self.waited, w, passed * (count + np.isfinite(comes).sum(1)))
            self._done[w, e] += passed * speed[w, e] / np.maximum(count, 1) * (count > 0)
            clock[w, e] = np.where(idle, now, step)
            done, come = (step == finish) & ~idle, (step == next_) & (step < finish) & ~idle
            self._ends[w[done], e[done], ends[done].argmin(1)] = np.inf
            if come.any():
                cw, ce = w[come], e[come]
                free = np.isinf(self._ends[cw, ce])
                if not free.any(1).all():
                    self._ends = _wider(self._ends, np.inf)
                    free = np.isinf(self._ends[cw, ce])
                from_, to = comes[come].argmin(1), free.argmax(1)
                self._ends[cw, ce, to] = self._done[cw, ce] + self._sent[cw, ce, from_]
                self._comes[cw, ce, from_], self._sent[cw, ce, from_] = np.inf, 0.0
            on = (done | come) & ~idle
            w, e = w[on], e[on]
        finite = np.isfinite(moment[:, 0])
        self.now = np.where(finite, moment[:, 0], clock.max(1))


def _wider(array: np.ndarray, fill: float) -> np.ndarray:
    return np.concatenate([array, np.full_like(array, fill)], 2)


def play(choose: Callable[[View], np.ndarray], context: Context) -> tuple[np.ndarray, np.ndarray]:
    """Mean seconds of a task, from its arrival to its end, and joules of all tasks, [worlds] each, where `choose`
    gives each world's edge for the task that comes."""
    worlds = Worlds(context)
    for task in range(context.at.shape[1]):
        worlds.until(context.at[:, task])
        nbytes, work = context.nbytes[:, task], context.work[:, task]
        worlds.place(choose(worlds.view(nbytes, work)), nbytes, work)
    worlds.until(np.full(len(worlds.now), np.inf))
    return worlds.waited / context.at.shape[1], worlds.joules


def contexts(
    rng: np.random.Generator, worlds: int, tasks: int, edges: tuple[int, int] = (2, 6), preferences: bool = True
) -> Context:
    """Worlds to train in: from `edges[0]` to `edges[1]` edges of speeds 1 : 16, a typical task's sending 0.03 to 1.5
    times its computing, log-normal tasks, 10 to 115 % of what all edges can do. Every second world's edges take the
    device's joules for work too. Where there are `preferences`, two worlds in five have seconds only and the others any
    weight from 0 to 1. The load that is expected is off by 10 %."""
    shape = (worlds, edges[1])

    def spread(least: float, most: float) -> np.ndarray:
        return np.exp(rng.uniform(np.log(least), np.log(most), shape))

    def sizes(least: float, most: float) -> np.ndarray:
        sigma = rng.uniform(least, most, worlds)[:, None]
        return rng.lognormal(-(sigma**2) / 2, sigma, (worlds, tasks))

    count = rng.integers(edges[0], edges[1] + 1, worlds)
    present, speed, one = np.arange(edges[1]) < count[:, None], spread(0.25, 4.0), np.ones(worlds)
    total = np.where(present, speed, 0.0).sum(1)
    rate = (total / count)[:, None] / spread(0.03, 1.5)
    joules = np.where(rng.random((worlds, 1)) < 0.5, spread(0.02, 1.0), 0.0)
    every = 1 / (rng.uniform(0.1, 1.15, worlds) * total)
    at = np.cumsum(rng.exponential(1, (worlds, tasks)), 1) * every[:, None]
    weight = np.where(rng.random(worlds) < 0.4, 1.0, rng.random(worlds)) if preferences else one
    nbytes, work, expected = sizes(0.2, 0.8), sizes(0.3, 1.2), every * np.exp(rng.normal(0, 0.1, worlds))
    watts = spread(0.05, 3.0)
    return Context(speed, rate, watts, joules, present, at, nbytes, work, expected, one, one, weight, one)
