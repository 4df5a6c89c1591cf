"""Training in stages on a small teacher: what each is worth and what it leaves alone; a kill costs nothing."""

import copy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from shoal.converters.split import bottleneck, distil, modes
from shoal.converters.split.distil import CUT, Rows, Schedule, Student
from shoal.converters.split.entropic import FactorisedPrior
from shoal.converters.split.slimmable import Ensemble, Levels
from shoal.runtime.errors import StorageError, UsageError

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "data"))
from small_teacher import TAPS, Teacher  # noqa: E402

GHND = (CUT, *TAPS)
FEATURE = (32, 4, 4)


def student(teacher: Teacher, channel: nn.Module, latent: int, members: int = 1) -> Student:
    torch.manual_seed(1)
    bodies = [bottleneck.encoder("separable", 3, latent, 4, 16) for _ in range(members)]
    encoder = bodies[0] if members == 1 else Ensemble(bodies)
    decoder = bottleneck.decoder("light", (latent, 4, 4), FEATURE)
    return Student(encoder, channel, decoder, copy.deepcopy(teacher.tail), TAPS)


def distilled(teacher: Teacher, names, latent: int = 3, epochs: int = 5) -> Student:
    made = student(teacher, Levels(latent), latent)
    schedule = Schedule(epochs, 50, 3e-3, cosine=True)
    distil.fit(made, made.stage(1), distil.stage1(made, names=names, bits=(4, 8)), teacher.train, schedule)
    return made.eval()


@pytest.fixture(scope="module")
def ghnd(teacher) -> Student:
    return distilled(teacher, GHND)


def error(teacher: Teacher, made: Student, names) -> float:
    """Of the features on the test's rows, at 8 bits."""
    with torch.no_grad():
        batch = teacher.test.take(np.arange(teacher.test.count))
        features, _ = made.decode(made.send(made.encode(batch["input"]), 8))
        return float(distil.distance(features, batch, names))


def test_later_features_come_out_nearer_when_they_are_distilled(teacher, ghnd):
    hnd = distilled(teacher, (CUT,))
    assert error(teacher, ghnd, TAPS) < error(teacher, hnd, TAPS)
    assert teacher.accuracy(lambda x: ghnd(x, 8)) >= teacher.accuracy(lambda x: hnd(x, 8)) - 0.02


def test_a_second_stage_recovers_half_the_gap_and_one_encoder_serves_two_tails(teacher, ghnd):
    whole = teacher.accuracy(lambda x: teacher.tail(teacher.head(x)))
    first = teacher.accuracy(lambda x: ghnd(x, 8))
    frozen, theirs = distil.digest(ghnd.encoder), distil.digest(teacher.tail)
    rows = Rows({**teacher.train.arrays, "latent": modes.latents(ghnd, teacher.train)})
    tails = []
    for alpha in (1.0, 0.5):
        made = copy.deepcopy(ghnd)
        loss = distil.stage2(made, modes=((0, 4), (0, 8)), alpha=alpha)
        distil.fit(made, made.stage(2), loss, rows, Schedule(4, 50, 1e-3, cosine=True))
        made.eval()
        assert teacher.accuracy(lambda x, made=made: made(x, 8)) - first >= (whole - first) / 2
        assert distil.digest(made.encoder) == frozen
        tails.append(distil.digest(made.tail))
    assert len({theirs, *tails}) == 3 and distil.digest(teacher.tail) == theirs


def test_a_higher_price_of_bits_buys_fewer_bytes_and_worse_features(teacher):
    made, found = student(teacher, FactorisedPrior(6), 6), []
    for beta, epochs in ((0.5, 8), (5.0, 3), (50.0, 3)):  # one goes on where the last one ended
        loss = distil.stage1(made, names=GHND, beta=beta)
        distil.fit(made, made.stage(1), loss, teacher.train, Schedule(epochs, 50, 5e-3, cosine=True))
        made.eval()
        held, learnt = modes.latents(made, teacher.test), modes.latents(made, teacher.train)
        tables = modes.tables(made, learnt)
        sizes, outputs = modes.answers(made, tables, held)
        # The tail's answers to decoded messages are those to rounded latents
        with torch.no_grad():
            rounded = made.decode(made.send(torch.from_numpy(held)))[1].numpy()
        assert (rounded.argmax(1) == outputs.argmax(1)).mean() > 0.99
        found.append((sizes.mean(), error(teacher, made, GHND)))
    (most, near), (some, far), (few, farthest) = found
    assert most > some > few and near < far < farthest


def test_an_ensembles_modes_are_a_table(teacher):
    made = student(teacher, Levels(4, 3), 4, members=3)
    loss = distil.stage1(made, names=GHND, bits=(1, 2, 4))
    distil.fit(made, made.stage(1), loss, teacher.train, Schedule(3, 50, 3e-3))
    table = modes.table(made, teacher.train, teacher.test, (1, 2, 4))
    assert [(mode.id, mode.encoder, mode.bits) for mode in table] == [
        (at * 3 + i + 1, at + 1, bits) for at in range(3) for i, bits in enumerate((1, 2, 4))
    ]
    assert len({mode.codec for mode in table}) == 9
    for choice in range(3):
        one, two, four = table[3 * choice : 3 * choice + 3]
        assert one.bytes < two.bytes < four.bytes < 64 * 4 / 8 + 10
        assert one.accuracy < four.accuracy
    assert table[0].row().keys() == {"id", "encoder", "codec", "bits", "bytes", "device_ms", "accuracy"}


class Killed(Exception):
    pass


@pytest.mark.parametrize("channel", [Levels, FactorisedPrior])
def test_a_training_that_was_killed_ends_as_one_that_was_not(teacher, channel, tmp_path):
    rows = Rows({name: array[:200] for name, array in teacher.train.arrays.items()}, copies=2)
    schedule, digests = Schedule(3, 20, 3e-3, cosine=True), []
    bits, beta = ((2, 4), 0.0) if channel is Levels else ((0,), 1.0)
    for kill in (None, (2, 7, 12)):
        path = tmp_path / f"{kill is None}.pt"
        seen: list[int] = []

        def stop(event, kill=kill, seen=seen):
            seen.append(event.done)
            if kill and len(seen) in kill:
                raise Killed

        for _ in range(1 + len(kill or ())):
            made = student(teacher, channel(3), 3)
            loss = distil.stage1(made, names=GHND, bits=bits, beta=beta)
            torch.rand(7)  # a process that went on has drawn other numbers
            try:
                losses = distil.fit(made, made.stage(1), loss, rows, schedule, checkpoint=path, every=0, progress=stop)
            except Killed:
                continue
        digests.append((distil.digest(made), losses))
        assert seen[-1] == 15 and len(losses) == 3
    assert digests[0] == digests[1]
    # What is finished is only read
    assert distil.fit(made, made.stage(1), loss, rows, schedule, checkpoint=path, progress=stop) == losses


def test_a_checkpoint_of_something_else_is_refused(teacher, tmp_path):
    rows = Rows({name: array[:40] for name, array in teacher.train.arrays.items()})
    made = student(teacher, Levels(3), 3)
    loss, path = distil.stage1(made), tmp_path / "a.pt"
    distil.fit(made, made.stage(1), loss, rows, Schedule(1, 20), checkpoint=path)
    with pytest.raises(UsageError, match="not of this training"):
        distil.fit(made, made.stage(1), loss, rows, Schedule(2, 20), checkpoint=path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(StorageError):
        distil.fit(made, made.stage(1), loss, rows, Schedule(1, 20), checkpoint=path)
    with pytest.raises(UsageError, match="no module 'third'"), distil.tapped(teacher.tail, ["third"]):
        pass
    with pytest.raises(UsageError):
        Rows({"a": np.zeros(3), "b": np.zeros(4)})
