"""Which of several edges gets the next task: the one where all tasks together lose the least by it.

An edge shares its speed equally among what it computes (processor sharing). A task's own delay is not what it costs:
it also slows those that are there. The marginal cost is the difference that it makes to the sum of all their times, and
to the device's energy (the reward of GMORL, Yang et al. 2025); here it is minimised greedily, task by task, which needs
no training. `simulate` runs any such choice against arrivals. Pure functions; nothing here knows a link.
"""

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Task:
    """Arrives at `at` seconds with `nbytes` to send and `work` to do, in whatever unit a server's speed counts."""

    at: float
    nbytes: float
    work: float


@dataclass(frozen=True)
class Server:
    """An edge as a device sees it: work a second, bytes/s to it, watts while sending to it, joules for a unit of work
    (0 where an edge's energy is not the device's), and the remaining `works` of the tasks it has."""

    speed: float
    rate: float
    watts: float = 0.0
    joules: float = 0.0
    works: tuple[float, ...] = ()


Choice = Callable[[Sequence[Server], Task], int]


def residence(works: Sequence[float], speed: float) -> float:
    """The sum of the seconds until each of these is done, if nothing more comes. O(n log n)."""
    total = before = 0.0
    for place, work in enumerate(sorted(works)):
        left = len(works) - place
        total += left * left * (work - before) / speed  # `left` tasks share, and each of them waits
        before = work
    return total


def drain(works: Sequence[float], speed: float, seconds: float) -> tuple[tuple[float, ...], float]:
    """What remains of these after so long, without those that are done, and the sum of the seconds spent in it."""
    left, spent, gone = sorted(works), 0.0, 0.0
    while left and seconds > 0:
        step = min((left[0] - gone) * len(left) / speed, seconds)
        spent, seconds = spent + step * len(left), seconds - step
        gone += step * speed / len(left)
        while left and left[0] - gone <= 1e-12 * max(left[0], 1e-300):
            left.pop(0)
    return tuple(work - gone for work in left), spent


def marginal(server: Server, task: Task) -> tuple[float, float]:
    """Seconds that all tasks together, this one with its sending, lose by sending it there, and joules."""
    sending = task.nbytes / server.rate
    after, spent = drain(server.works, server.speed, sending)
    seconds = sending + spent + residence((*after, task.work), server.speed) - residence(server.works, server.speed)
    return seconds, server.watts * sending + server.joules * task.work


def greedy(weight: float = 1.0, scale: float = 1.0) -> Choice:
    """The least weight × seconds + (1 - weight) × scale × joules, by the marginal cost; `scale` in seconds a joule."""

    def choose(servers: Sequence[Server], task: Task) -> int:
        def cost(place: int) -> float:
            seconds, joules = marginal(servers[place], task)
            return weight * seconds + (1 - weight) * scale * joules

        return min(range(len(servers)), key=cost)

    return choose


def selfish(servers: Sequence[Server], task: Task) -> int:
    """Where this task alone is done first: what the marginal cost is compared with."""

    def own(place: int) -> float:
        server = servers[place]
        sending = task.nbytes / server.rate
        after, _ = drain(server.works, server.speed, sending)
        shared = sum(min(work, task.work) for work in after)  # until it is done each other gets as much, or ends
        return sending + (task.work + shared) / server.speed

    return min(range(len(servers)), key=own)


def shortest_queue(servers: Sequence[Server], task: Task) -> int:
    """Where the fewest tasks are, of equal ones the fastest."""
    return min(range(len(servers)), key=lambda place: (len(servers[place].works), -servers[place].speed))


def single(place: int) -> Choice:
    """Always that one."""
    return lambda servers, task: place


def simulate(choose: Choice, servers: Sequence[Server], tasks: Sequence[Task]) -> tuple[float, float]:
    """Mean seconds of a task, from its arrival to its end, and joules of all, where `choose` places each as it comes.

    What is still being sent counts as being there for the choice. Sending to one does not slow sending to another.
    """
    now, total, joules = 0.0, 0.0, 0.0
    running = [_Running(server) for server in servers]
    for task in sorted(tasks, key=lambda one: one.at):
        now = task.at
        seen = [replace(one.server, works=one.until(now)) for one in running]
        place = choose(seen, task)
        sending = task.nbytes / servers[place].rate
        running[place].coming(now + sending, task.work)
        total -= now
        joules += servers[place].watts * sending + servers[place].joules * task.work
    for one in running:
        one.until(math.inf)
        total += one.ended
    return total / max(1, len(tasks)), joules


class _Running:
    """A server over time. `ended` is the sum of the moments at which its tasks were done."""

    def __init__(self, server: Server):
        self.server, self.ended = server, 0.0
        self._now, self._done = 0.0, 0.0  # `_done` is the work that each task has had that has always been there
        self._works: list[float] = []  # heap: the `_done` at which a task ends
        self._sent: list[tuple[float, float]] = []  # heap: when it is here, its work

    def coming(self, at: float, work: float) -> None:
        heapq.heappush(self._sent, (at, work))

    def until(self, moment: float) -> tuple[float, ...]:
        """Goes on to that moment; what remains of what is here or on its way."""
        while True:
            ends = math.inf
            if self._works:
                ends = self._now + (self._works[0] - self._done) * len(self._works) / self.server.speed
            comes = self._sent[0][0] if self._sent else math.inf
            step = min(ends, comes, moment)
            if step == math.inf:
                break
            if self._works:
                self._done += (step - self._now) * self.server.speed / len(self._works)
            self._now = max(self._now, step)
            if step == ends:
                heapq.heappop(self._works)
                self.ended += step
            elif step == comes:
                heapq.heappush(self._works, self._done + heapq.heappop(self._sent)[1])
            else:
                break
        return tuple(max(0.0, end - self._done) for end in self._works) + tuple(work for _, work in self._sent)
