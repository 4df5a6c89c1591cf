"""What each mode of a split network costs and is worth, measured on held-out rows: a message for each, decoded again.

A mode is a choice of the encoder and tables for its latents. Bytes are those of the runtime's codec, one latent a
message, everything that goes over the link counted; accuracy is of what the tail makes of the decoded message, by
whatever measure (agreement.py). It trains nothing.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from shoal.runtime.split.codec import Codec
from shoal.runtime.split.tables import Tables

from . import agreement
from .distil import Rows, Student
from .entropic import FactorisedPrior
from .slimmable import Levels
from .write import opened

_BATCH = 250


@dataclass(frozen=True)
class Mode:
    """A row of the table of modes, and the tables that it names. `encoder` is 0 where the head has no choice; `bytes`
    is the mean of a message, `device_ms` the head's median at batch 1 (0: not measured), `accuracy` from 0 to 1."""

    id: int
    encoder: int
    codec: str
    bits: int
    bytes: float
    device_ms: float
    accuracy: float
    tables: Tables

    def row(self) -> dict:
        """As it is in a bundle's section of modes."""
        return {"id": self.id, "encoder": self.encoder, "codec": self.codec, "bits": self.bits,
                "bytes": math.ceil(self.bytes), "device_ms": round(self.device_ms, 3),
                "accuracy": round(self.accuracy, 5)}  # fmt: skip


@torch.no_grad()
def latents(student: Student, rows: Rows, choice: int = 0, *, copies: bool = False) -> np.ndarray:
    """fp32 [n, ...] of all rows, with `copies` of their changed ones too."""
    student.eval()
    found = []
    count = rows.whole if copies else rows.count
    for at in range(0, count, _BATCH):
        batch = rows.take(np.arange(at, min(at + _BATCH, count)))
        found.append(student.encode(batch["input"], choice).float().numpy())
    return np.concatenate(found)


def tables(student: Student, learnt: np.ndarray, choice: int = 0, bits: int = 0) -> Tables:
    """The codec's, from latents of the data that was trained on; with a prior, its own number of bits."""
    if isinstance(student.channel, FactorisedPrior):
        return student.channel.tables(learnt)
    assert isinstance(student.channel, Levels)
    return Tables.fit(student.channel.quantiser(bits, choice), learnt)


@torch.no_grad()
def answers(student: Student, found: Tables, held: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(bytes of each latent's message int [n], outputs of the tail [n, ...]) for held-out latents fp32 [n, ...]."""
    student.eval()
    codec = Codec(found, held.shape[1:])
    messages = [codec.encode(held[at : at + 1]) for at in range(len(held))]
    sizes = np.array([len(message) for message in messages])
    decoded = np.concatenate([codec.decode(message) for message in messages])
    outputs = [
        student.tail(student.decoder(torch.from_numpy(decoded[at : at + _BATCH]))).numpy()
        for at in range(0, len(decoded), _BATCH)
    ]
    return sizes, np.concatenate(outputs)


def table(
    student: Student,
    train: Rows,
    held: Rows,
    bits: Sequence[int],
    graph: bytes | None = None,
    shape: Sequence[int] = (),
    worth: Callable[[np.ndarray], float] | None = None,
) -> list[Mode]:
    """Every choice times every number of bits (with a prior: its own). With the head's ModelProto and an image's shape,
    its time by choice is measured as well. `worth` says what the outputs of the held-out rows are, from 0 to 1; by
    default it is the part of them that is right by "label"."""
    worth = worth or (lambda outputs: agreement.classes(outputs, held.arrays["label"]))
    modes: list[Mode] = []
    for choice in range(1, student.choices + 1):
        learnt, kept = latents(student, train, choice), latents(student, held, choice)
        taken = head_ms(graph, shape, choice if student.choices > 1 else 0) if graph else 0.0
        for wanted in (0,) if isinstance(student.channel, FactorisedPrior) else bits:
            found = tables(student, learnt, choice, wanted)
            sizes, outputs = answers(student, found, kept)
            name = f"e{choice}b{found.bits}"
            number = choice if student.choices > 1 else 0
            size = float(sizes.mean())
            modes.append(Mode(len(modes) + 1, number, name, found.bits, size, taken, worth(outputs), found))
    return modes


def head_ms(graph: bytes, shape: Sequence[int], choice: int = 0, *, runs: int = 20, threads: int = 1) -> float:
    """Milliseconds, the median of `runs`, that a head takes for one image [*shape] at this choice (0: none)."""
    times = []
    with opened(graph, threads) as session:
        feeds = {name: np.zeros((1, *shape), np.float32) for name in session.inputs if name != "encoder"}
        if choice:
            feeds["encoder"] = np.array(choice, np.int64)
        for _ in range(runs + 3):
            begun = time.perf_counter()
            session.run(feeds)
            times.append(time.perf_counter() - begun)
    return float(np.median(times[3:])) * 1e3


def paired(correct: np.ndarray, baseline: np.ndarray) -> tuple[float, float]:
    """(difference of accuracies, half of its 95 % interval) of two that answered the same rows (bool [n])."""
    differences = np.asarray(correct, float) - np.asarray(baseline, float)
    return float(differences.mean()), float(1.96 * differences.std(ddof=1) / len(differences) ** 0.5)
