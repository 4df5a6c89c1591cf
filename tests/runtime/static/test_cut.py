"""Cutting a prompt: against all ways, and what a person expects of it."""

import itertools
import math

import numpy as np
import pytest

from shoal.runtime.static.cut import Costs, Piece, cut


def cheapest(count: int, costs: Costs) -> float:
    """Over every number of chunks of each length, the rest dynamic."""
    found = []
    most = [range(-(-count // length) + 1) for length in costs.chunks]
    for numbers in itertools.product(*most):
        held = sum(number * length for number, length in zip(numbers, costs.chunks, strict=True))
        seconds = sum(number * one for number, one in zip(numbers, costs.chunks.values(), strict=True))
        left = max(0, count - held)
        found.append(seconds + (costs.fixed + costs.each * left if left else 0.0))
    return min(found)


@pytest.mark.parametrize("seed", range(60))
def test_no_way_is_faster(seed):
    draw = np.random.default_rng(seed)
    lengths = sorted(draw.choice(np.arange(1, 12), draw.integers(1, 4), replace=False).tolist())
    costs = Costs(
        {length: float(draw.random() + length * draw.random()) for length in lengths},
        float(draw.random()), math.inf if seed % 5 == 0 else float(draw.random()),
    )  # fmt: skip
    count = int(draw.integers(1, 24))
    pieces = cut(count, costs)
    assert costs.of(pieces) == pytest.approx(cheapest(count, costs))
    at = 0
    for piece in pieces:  # they are neighbours, and only the last chunk and what is dynamic are not full
        assert piece.start == at and piece.count > 0 and (not piece.length or piece.count <= piece.length)
        at += piece.count
    assert at == count
    assert all(one.count == one.length and one.length >= two.length for one, two in itertools.pairwise(pieces))


def test_a_short_prompt_does_not_pay_for_a_full_chunk():
    costs = Costs({64: 1.0, 256: 3.0}, fixed=0.1, each=0.03)
    assert cut(10, costs) == [Piece(0, 10, 0)]  # 0.4 s against 1
    assert cut(40, costs) == [Piece(0, 40, 64)]
    assert cut(257, costs) == [Piece(0, 256, 256), Piece(256, 1, 0)]
    assert cut(300, costs) == [Piece(0, 256, 256), Piece(256, 44, 64)]
    assert cut(255, costs) == [Piece(0, 255, 256)]


def test_without_a_dynamic_graph_the_last_chunk_is_padded():
    costs = Costs({64: 1.0, 256: 3.0})
    assert cut(1, costs) == [Piece(0, 1, 64)]
    assert cut(513, costs) == [Piece(0, 256, 256), Piece(256, 256, 256), Piece(512, 1, 64)]


def test_without_chunks_all_is_dynamic():
    assert cut(5, Costs({}, 1.0, 1.0)) == [Piece(0, 5, 0)]
