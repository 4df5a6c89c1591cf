"""Which of several proxy orders is taken, and by what text."""

from types import SimpleNamespace

import numpy as np
import pytest

from shoal.converters.bitstack import sort
from shoal.converters.calibrate import calibration_rows, unseen_rows
from shoal.converters.recipe import Calibration, Format, Ladder, Recipe
from shoal.runtime.events import silent


def test_the_order_is_taken_that_the_judge_finds_best(monkeypatch):
    monkeypatch.setattr(sort, "step_bytes", lambda one: [40, 10, 10])
    stacks = SimpleNamespace(
        floors=[1] * 10, matrices=[SimpleNamespace(steps=range(3))] * 10, ladder=Ladder(first=1, blocks=1),
        counts=lambda level: [level] * 10,
    )  # fmt: skip
    first = list(range(10))
    orders = [first + first[::-1] + first, first + first + first, first + [7, 8, 9, 0, 1, 2, 3, 4, 5, 6] + first]
    asked = []

    class Judge:
        def perplexity(self, counts):
            asked.append(counts)
            return 50.0 - sum(counts[:3])  # the first three matrices are worth most

    assert sort._best(stacks, orders, Judge(), silent) == orders[1]
    assert [sum(counts) - 10 for counts in asked] == [0, 1, 2] * 3  # parts of the first level's bytes


@pytest.mark.parametrize(
    ("losses", "kept"),
    [
        ([4.0, 3.7, 3.5, 3.2], [2, 3, 4, 5]),  # each below the line between its neighbours
        ([4.0, 3.95, 3.5, 3.2], [2, 4, 5]),
        ([4.0, 3.9, 3.8, 3.2], [2, 5]),  # the second alone would be below the first
        ([4.0, 4.5, 3.5, 3.2], [2, 4, 5]),
        ([4.0, 3.7, 3.9, 3.2], [2, 3, 5]),
        ([4.0, 3.81, 3.61, 3.2], [2, 3, 4, 5]),  # above by less than a mixture of the others has
        ([4.0, 3.81, 3.64, 3.2], [2, 3, 5]),
    ],
)
def test_rungs_of_few_bits_stay_where_a_whole_model_gains_by_them(monkeypatch, losses, kept):
    monkeypatch.setattr(sort, "step_bytes", lambda one: [20, 0, 10, 10, 20])
    dropped = []
    stacks = SimpleNamespace(
        ladder=Ladder(rungs=(Format(2, 64), Format(2), Format(3))), matrices=[None], drop=dropped.append,
        counts=lambda level: [level],
    )  # fmt: skip
    judge = SimpleNamespace(perplexity=lambda counts: float(np.exp(losses[counts[0] - 2])))
    sort.drop_rivals(stacks, judge)
    assert sorted({2, 3, 4, 5} - set(dropped)) == kept


@pytest.mark.parametrize("tokens", [64, 640, 6400])
def test_text_that_judges_is_none_that_calibrates(tmp_path, tokens):
    path = tmp_path / "text"
    path.write_text("x" * 2000)
    tokenizer = SimpleNamespace(encode=lambda text, special: list(range(len(text))))
    recipe = Recipe(calibration=Calibration(text=str(path), tokens=tokens, length=64), name="mine")
    card = SimpleNamespace(max_context=512)
    seen, unseen = calibration_rows(recipe, card, tokenizer), unseen_rows(recipe, card, tokenizer, 4)
    assert all(len(row) == 64 for row in unseen) and not np.intersect1d(seen, np.array(unseen, int)).size
    assert len(unseen) == {64: 0, 640: 3, 6400: 0}[tokens]  # one row leaves no gap, and as many as fit leave none
