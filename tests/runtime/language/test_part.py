"""A model in two parts: the same as the whole, by position, whatever was computed in what steps, and clear refusals."""

import numpy as np
import pytest

import shoal
from shoal.runtime.errors import ContextError, ShoalError, UsageError
from shoal.runtime.language.part import Step, load_part

IDS = [int(n) for n in np.random.default_rng(8).integers(5, 250, 40)]


@pytest.fixture(scope="module")
def pair(tiny_folder, tmp_path_factory):
    """The tiny llama's first block and its other two, with three slots of 48 positions."""
    folder = tmp_path_factory.mktemp("parts")
    options = dict(recipe="fp32", check_parity=False)
    for name, blocks in (("front", "0:1"), ("rest", "1:3")):
        shoal.convert(tiny_folder, folder / f"{name}.shoal", blocks=blocks, **options)
    options = dict(slots=3, context=48, chunk=16)
    with load_part(folder / "front.shoal", **options) as front, load_part(folder / "rest.shoal", **options) as rest:
        yield front, rest


@pytest.fixture(scope="module")
def logits(tiny_bundle) -> np.ndarray:
    """Of the whole model after each of IDS; it is also the part that has all blocks."""
    with load_part(tiny_bundle, context=48) as whole:
        return whole.forward(0, IDS, 0, rows=len(IDS))


def close(found, expected):
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_in_steps_of_any_length_and_back_again(pair, logits):
    front, rest = pair
    rng = np.random.default_rng(0)
    for slot in range(3):
        at = 0
        while at < len(IDS):
            count = int(rng.integers(1, 20))
            stream = front.forward(slot, IDS[at : at + count], at)
            assert stream.shape == (len(IDS[at : at + count]), front.card.hidden)
            close(rest.forward(slot, stream, at), logits[at : at + count][-1:])
            at += len(stream)
    # From the middle on, another text, and then the first one again
    front.forward(1, [7, 8, 9], 20)
    assert front.lengths == [40, 23, 40]
    rest.truncate(1, 12)
    close(rest.forward(1, front.forward(1, IDS[12:], 12), 12, rows=28), logits[12:])
    rest.truncate(2, 50)
    assert rest.lengths == [40, 40, 40]


def test_slots_step_together(pair, logits):
    front, rest = pair
    starts = [30, 11, 17]
    for slot, start in enumerate(starts):
        rest.forward(slot, front.forward(slot, IDS[:start], 0), 0)
    # All, then the outer two over a slot that only looks on, then all in another order
    for slots in ([0, 1, 2], [2, 0], [1, 0, 2], [1]):
        streams = front.step([Step(slot, IDS[starts[slot]], starts[slot]) for slot in slots])
        found = rest.step([Step(slot, x, starts[slot]) for slot, x in zip(slots, streams, strict=True)])
        for slot, row in zip(slots, found, strict=True):
            close(row, logits[starts[slot]])
            starts[slot] += 1
    assert rest.lengths == starts
    full = rest.forward(1, front.forward(1, [*IDS, *IDS[:8]], 0), 0)  # no room for the one in the middle
    close(rest.step([Step(slot, front.forward(slot, IDS[-1:], 33)[0], 33) for slot in (0,)])[0].shape, full[0].shape)
    streams = front.step([Step(0, IDS[31], 31), Step(2, IDS[19], 19)])
    for row, at in zip(rest.step([Step(0, streams[0], 31), Step(2, streams[1], 19)]), (31, 19), strict=True):
        close(row, logits[at])
    close(rest.forward(1, front.forward(1, IDS[30:], 30), 30), logits[-1:])


def test_what_does_not_fit_is_refused_and_changes_nothing(pair, logits):
    front, rest = pair
    stream = front.forward(0, IDS, 0)
    rest.forward(0, stream, 0)
    wrong = stream.copy()
    wrong[3, 3] = np.inf
    for part, x, position, family in (
        (front, [], 0, UsageError), (front, [260], 0, UsageError), (front, [-1], 0, UsageError),
        (front, stream, 0, UsageError), (front, [1], 41, UsageError), (front, [1], -1, UsageError),
        (front, [1] * 9, 40, ContextError), (rest, stream, 9, ContextError), (rest, wrong, 0, UsageError),
        (rest, [1, 2], 0, UsageError), (rest, stream[:, 1:], 0, UsageError), (rest, stream.astype("f8"), 0, UsageError),
    ):  # fmt: skip
        with pytest.raises(family):
            part.forward(0, x, position)
    with pytest.raises(UsageError):
        rest.forward(3, stream, 0)
    with pytest.raises(UsageError):
        rest.forward(0, stream, 0, rows=41)
    with pytest.raises(UsageError):
        rest.step([Step(0, stream[0], 0), Step(0, stream[1], 1)])
    assert front.lengths[0] == rest.lengths[0] == 40
    close(rest.forward(0, front.forward(0, IDS[-2:], 38), 38), logits[-1:])
    assert front.prompt_ids("Hi") and front.takes_tokens and rest.gives_logits
    with pytest.raises(UsageError, match="no tokenizer"):
        rest.prompt_ids("Hi")


def test_a_part_does_not_run_alone_and_its_plan_holds(pair, tiny_bundle, minilm_bundle):
    front, rest = pair
    for part in pair:
        with pytest.raises(UsageError, match="a part of a model"):
            shoal.load(part.bundle.path)
        assert shoal.plan(part.bundle.path, slots=3, context=48, chunk=16).rows == part.plan.rows
        held = part.measure()["key-value cache"]
        assert held is None or held == next(row.bytes for row in part.plan.rows if row.name == "key-value cache")
    rows = [{row.name: row.bytes for row in part.plan.rows} for part in pair]
    assert 2 * rows[0]["key-value cache"] == rows[1]["key-value cache"] and "tokenizer" not in rows[1]
    with pytest.raises(UsageError, match="embeds text"):
        load_part(minilm_bundle)
    with load_part(rest.bundle.path, context=48, kv="int8") as small, load_part(front.bundle.path, kv="fp16") as half:
        found = small.forward(0, half.forward(0, IDS, 0), 0)[0]
        assert rest.forward(0, front.forward(0, IDS, 0), 0)[0].argmax() == found.argmax()
    small.close()
    with pytest.raises(ShoalError, match="closed"):
        small.forward(0, np.zeros((1, 48), np.float32), 0)
