"""What a trained mixture loses on its way into a bundle, on text that it never saw: nothing in fp32, beside the figure
of the plain torch that made it, and little where its experts are rounded."""

import dataclasses
import json
import math

import numpy as np
import pytest

import shoal
from shoal.converters.convert import convert
from shoal.converters.quality import perplexity
from shoal.converters.text import HELDOUT
from shoal.converters.walk import Scratch, Walk
from shoal.runtime.experts.predictors import guesses, recall
from shoal.runtime.experts.trace import Trace
from shoal.runtime.language.tokens import Tokenizer


def test_in_fp32_it_predicts_as_the_torch_that_trained_it(mixture_folder, tmp_path):
    figures = json.loads((mixture_folder / "figures.json").read_text())
    convert(mixture_folder, tmp_path / "a.shoal", "fp32", check_parity=False)
    with shoal.load(tmp_path / "a.shoal") as model:
        length, ids = model.card.max_context, np.array(model.tokenizer.encode(HELDOUT))
        rows = ids[: len(ids) // length * length].reshape(-1, length)
        found = math.log2(perplexity(model, rows[::16], length))
    assert found == pytest.approx(figures["every_16th_row"], abs=1e-4)
    assert found < min(figures["counted"].values()) - 0.2


def test_rounded_experts_cost_little(mixture_folder, tmp_path):
    """In bits per byte; fewer bits cost more."""
    lost = []
    for recipe in ("int8", "int4"):
        found = convert(mixture_folder, tmp_path / f"{recipe}.shoal", recipe).parity
        lost.append(math.log2(found["perplexity"] / found["source_perplexity"]))
    assert abs(lost[0]) < 0.01 and lost[0] < lost[1] < 0.15


def test_what_was_learned_of_some_text_foretells_the_experts_of_other_text(converted, mixture_folder, tmp_path):
    """From a layer's inputs, before the next one runs. The runtime records none of a router that reads before attention
    and needs no guess, so they come from the checkpoint; the first layer's experts are guessed by nothing."""
    model = converted(mixture_folder)
    length, ids = model.card.max_context, np.array(Tokenizer.from_json(model.source.tokenizer()).encode(HELDOUT))
    walk = Walk(model.architecture, model.card, ids[: len(ids) // length * length].reshape(-1, length)[::64])
    chosen, inputs = [], []
    for block in range(model.card.blocks):
        kept: dict[str, list[np.ndarray]] = {}
        with Scratch(model.source, tmp_path) as scratch:
            list(walk.inputs(range(block, block + 1), scratch, kept))
            walk.advance(range(block, block + 1), scratch)
        chosen.append(np.argsort(-np.concatenate(kept["gates"]), 1)[:, : model.card.top_k])
        inputs.append(np.concatenate(kept["inputs"]))
    starts = np.arange(len(walk.hidden)) * length
    trace = Trace("a", model.card.experts, np.stack(chosen, 1).astype(np.int16), starts, None,
                  np.stack(inputs, 1).astype(np.float16))  # fmt: skip
    later = dataclasses.replace(trace, ids=trace.ids[:, 1:], inputs=None)
    right = {name: recall(later, guesses(trace, name)[:, 1:]) for name in ("repeat", "popular", "learned")}
    assert min(right.values()) > model.card.top_k / model.card.experts  # chance
    assert right["learned"] > 2 * max(right["repeat"], right["popular"])
