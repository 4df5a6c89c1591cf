"""A learned choice among several edges: a small network that scores each, the same for every edge, and takes the best.

What `offload.greedy` cannot know is what the tasks yet to come will lose by where this one goes. The network sees what
GMORL's does (Yang et al. 2025): of each edge its speed, rate, queue and a histogram of what remains there; of the task
its size and work; the preference. Beside them the load that is expected, and means over the edges. All is relative to
a typical task, so it does not matter in which units work and bytes are. One network for every edge: there may be
as many as there are, in any order. It is trained by converters.split.offload; here it is numpy, some 6,000 numbers.

A policy as bytes, read as hostile, little-endian, nothing between the parts and nothing behind them:
  header   16 bytes: magic, uint16 features (22), uint16 hidden (1 to 256), fp32: how much of the marginal cost the
           score has, 0 or more
  weights  fp32: [features, hidden], [hidden], [hidden, hidden], [hidden], [hidden]
"""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import BundleError, UsageError
from .offload import Choice, Server, Task

MAGIC = b"shoffld\x01"
MAX_HIDDEN = 256
BINS = np.array([0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0])  # of what remains of a task, in typical tasks
FEATURES = 14 + len(BINS) + 1
_HEADER = struct.Struct("<8sHHf")


@dataclass(frozen=True)
class Load:
    """The tasks that are expected: one `every` seconds, of `nbytes` and `work`, the means."""

    every: float
    nbytes: float
    work: float

    @classmethod
    def of(cls, tasks: Sequence[Task]) -> "Load":
        """As these were, two at least, in the order in which they came. Raises UsageError."""
        if len(tasks) < 2 or not tasks[-1].at > tasks[0].at:
            raise UsageError("There is no load to see.", f"{len(tasks)} tasks came at one time.", "Give more tasks.")
        count = len(tasks)
        every = (tasks[-1].at - tasks[0].at) / (count - 1)
        return cls(every, sum(task.nbytes for task in tasks) / count, sum(task.work for task in tasks) / count)


@dataclass(frozen=True)
class View:
    """Many choices at once. Of edges [choices, edges]: `speed`, `rate`, `watts`, `joules`, whether it is `present`;
    what remains of their tasks, `works` [choices, edges, room], 0 where none is. [choices]: the task's `nbytes` and
    `work`; the load; the preference's `weight` and `scale`, as in `offload.greedy`."""

    speed: np.ndarray
    rate: np.ndarray
    watts: np.ndarray
    joules: np.ndarray
    present: np.ndarray
    works: np.ndarray
    nbytes: np.ndarray
    work: np.ndarray
    every: np.ndarray
    typical_nbytes: np.ndarray
    typical_work: np.ndarray
    weight: np.ndarray
    scale: np.ndarray


def marginal(view: View) -> tuple[np.ndarray, np.ndarray]:
    """`offload.marginal` of each: seconds and joules [choices, edges]."""
    sending = view.nbytes[:, None] / view.rate
    after = drain(view.works, view.speed, sending)
    slowed = np.minimum(after, view.work[:, None, None]).sum(
        2
    )  # until the shorter of two is done, each slows the other
    seconds = sending + (view.work[:, None] + 2 * slowed) / view.speed
    return seconds, view.watts * sending + view.joules * view.work[:, None]


def drain(works: np.ndarray, speed: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """What remains of works [..., room], 0 where none is, after `seconds` [...] at `speed` [...], in rising order."""
    works = np.sort(works, -1)
    sharing = np.arange(works.shape[-1], 0, -1)
    lasts = np.diff(works, axis=-1, prepend=0.0) * sharing / speed[..., None]
    before = np.cumsum(lasts, -1) - lasts
    gone = (np.clip(seconds[..., None] - before, 0.0, lasts) * speed[..., None] / sharing).sum(-1)
    return np.maximum(works - gone[..., None], 0.0)


def encode(view: View) -> tuple[np.ndarray, np.ndarray]:
    """Features fp32 [choices, edges, FEATURES] and the marginal cost [choices, edges], that which `offload.greedy`
    makes least, in typical tasks' seconds; infinite where an edge is not present."""
    present, count = view.present, view.present.sum(1)
    total = np.where(present, view.speed, 0.0).sum(1)
    second = view.typical_work * count / total  # what a typical task takes by itself at the mean speed

    def mean(values: np.ndarray) -> np.ndarray:
        return np.broadcast_to((np.where(present, values, 0.0).sum(1) / count)[:, None], present.shape)

    def of_all(values: np.ndarray) -> np.ndarray:
        return np.broadcast_to(values[:, None], present.shape)

    seconds, joules = marginal(view)
    weight, unit = view.weight[:, None], second[:, None]
    spent = (1 - weight) * view.scale[:, None] * joules / unit
    cost = weight * seconds / unit + spent
    cost = np.where(present, cost, np.inf)
    queue = np.log1p((view.works > 0).sum(2))
    backlog = np.log1p(view.works.sum(2) / view.speed / unit)
    relative = view.works / view.typical_work[:, None, None]
    above = np.stack([(relative > edge).sum(2) for edge in (0.0, *BINS)], 2)
    histogram = np.log1p(above - np.append(above[..., 1:], np.zeros((*present.shape, 1), above.dtype), 2))
    columns = [
        of_all(view.weight),
        of_all(np.log(view.typical_work / view.every / total)),  # 0: as much comes as all edges together can do
        of_all(np.log(count)),
        np.log(view.speed / total[:, None] * count[:, None]),
        np.log(view.typical_nbytes[:, None] / view.rate / unit),
        queue,
        backlog,
        mean(queue),
        mean(backlog),
        of_all(np.log(view.work / view.typical_work)),
        of_all(np.log(view.nbytes / view.typical_nbytes)),
        np.log(seconds / unit),
        np.log1p(cost - cost.min(1, keepdims=True)),
        np.log1p(spent),
    ]
    features = np.concatenate([np.stack(columns, 2), histogram], 2)
    return np.where(present[..., None], features, 0.0).astype(np.float32), cost


class Policy:
    """`weights` fp32 as the module says, and how much of the marginal cost a score has, `greed`. Raises UsageError
    where they do not fit together."""

    def __init__(self, weights: Sequence[np.ndarray], greed: float):
        self.weights = tuple(np.array(part, np.float32) for part in weights)
        self.greed = float(np.float32(greed))
        if problem := self._problem():
            raise UsageError("This policy cannot be used.", f"It has {problem}.", "Train one with converters.split.")

    @classmethod
    def load(cls, path: str | Path) -> "Policy":
        """Reads an untrusted file. Raises BundleError."""
        most = _HEADER.size + 4 * sum(math.prod(shape) for shape in _shapes(MAX_HIDDEN))
        try:
            with open(path, "rb") as file:
                return cls.from_bytes(file.read(most + 1))
        except OSError as error:
            raise _refuse(f"cannot be read: {error.strerror}") from None

    @classmethod
    def shipped(cls) -> "Policy":
        """The one that comes with the package, of `offload.anticipate()` as it is by default."""
        return cls.load(Path(__file__).with_name("edges.policy"))

    @classmethod
    def from_bytes(cls, data: bytes) -> "Policy":
        """Reads untrusted bytes. Raises BundleError that says what is wrong."""
        if len(data) < _HEADER.size or not data.startswith(MAGIC):
            raise _refuse("does not begin as a policy does")
        _, features, hidden, greed = _HEADER.unpack_from(data)
        if features != FEATURES or not 1 <= hidden <= MAX_HIDDEN:
            raise _refuse(f"has {features} features and {hidden} hidden units")
        shapes = _shapes(hidden)
        counts = [math.prod(shape) for shape in shapes]
        if len(data) != _HEADER.size + 4 * sum(counts):
            raise _refuse(f"has {len(data)} bytes, not {_HEADER.size + 4 * sum(counts)}")
        numbers = np.frombuffer(data, "<f4", offset=_HEADER.size)
        parts = np.split(numbers, np.cumsum(counts)[:-1])
        try:
            return cls([part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)], greed)
        except UsageError as error:
            raise _refuse(f"is none: {error.why}") from None

    def to_bytes(self) -> bytes:
        """As the module says."""
        header = _HEADER.pack(MAGIC, FEATURES, self.weights[0].shape[1], self.greed)
        return header + b"".join(part.astype("<f4").tobytes() for part in self.weights)

    def scores(self, features: np.ndarray, cost: np.ndarray) -> np.ndarray:
        """Of features and costs as `encode` gives them: [choices, edges], the best is the highest; where an edge is
        not present, -infinity."""
        first, first_bias, second, second_bias, last = self.weights
        hidden = np.maximum(features @ first + first_bias, 0)
        hidden = np.maximum(hidden @ second + second_bias, 0)
        return np.where(np.isfinite(cost), hidden @ last - self.greed * np.where(np.isfinite(cost), cost, 0), -np.inf)

    def choice(self, load: Load, weight: float = 1.0, scale: float = 1.0) -> Choice:
        """What `offload.greedy` is, learned, where such a load is expected. Raises UsageError for an impossible one,
        and its result for edges without speed or rate, and tasks without bytes or work."""
        if not all(math.isfinite(number) and number > 0 for number in (load.every, load.nbytes, load.work)):
            raise UsageError("There can be no such load.", f"{load} is not all above 0.", "Give what is expected.")
        if not (0 <= weight <= 1 and 0 <= scale < math.inf):
            raise UsageError("There is no such preference.", f"It is {weight}, {scale}.", "Give a weight from 0 to 1.")

        def choose(servers: Sequence[Server], task: Task) -> int:
            return int(self.scores(*encode(_view(servers, task, load, weight, scale)))[0].argmax())

        return choose

    def _problem(self) -> str:
        shapes = [part.shape for part in self.weights]
        hidden = shapes[0][-1] if shapes and len(shapes[0]) == 2 else 0
        if not 1 <= hidden <= MAX_HIDDEN or shapes != _shapes(hidden):
            return f"weights of shapes {shapes}"
        if not all((abs(part) <= 1e4).all() for part in self.weights):  # what is no number is not either
            return "weights that are not finite or beyond 10,000"
        if not 0 <= self.greed <= 1e4:
            return f"{self.greed} of the marginal cost"
        return ""


def _view(servers: Sequence[Server], task: Task, load: Load, weight: float, scale: float) -> View:
    numbers = np.array([[server.speed, server.rate, server.watts, server.joules] for server in servers]).T[:, None]
    works = np.zeros((1, len(servers), max(len(server.works) for server in servers) if servers else 0))
    for row, server in zip(works[0], servers, strict=True):
        row[: len(server.works)] = server.works
    one = np.array([task.nbytes, task.work, load.every, load.nbytes, load.work, weight, scale])[:, None]
    sane = numbers.size and np.isfinite(numbers).all() and (numbers[:2] > 0).all() and (numbers[2:] >= 0).all()
    sane = sane and np.isfinite(works).all() and (works >= 0).all() and np.isfinite(one).all() and (one[:2] > 0).all()
    if not sane:
        raise UsageError("There is nothing to choose from.", "An edge or a task is impossible.", "Give speeds above 0.")
    speed, rate, watts, joules = numbers
    return View(speed, rate, watts, joules, np.ones((1, len(servers)), bool), works, *one)


def _shapes(hidden: int) -> list[tuple[int, ...]]:
    return [(FEATURES, hidden), (hidden,), (hidden, hidden), (hidden,), (hidden,)]


def _refuse(problem: str) -> BundleError:
    return BundleError("The policy for several edges cannot be used.", f"It {problem}.", "Train it again.")
