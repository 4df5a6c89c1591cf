"""Every family of decoders against its original, on random models of its shape (tests/data/make_*.py)."""

import json

import numpy as np
import pytest

from shoal.converters.architectures import Config, decoder
from shoal.converters.recipe import Format, Recipe

FAMILIES = ("llama", "llama3", "qwen2", "qwen2-yarn", "qwen3", "gemma3")
MIXTURES = ("qwen2_moe", "qwen3_moe", "olmoe", "mixtral", "smallthinker", "shoal_moe")


def reference(tiny, family: str) -> dict[str, np.ndarray]:
    with np.load(tiny / family / "reference.npz") as stored:
        return dict(stored)


@pytest.mark.parametrize("family", FAMILIES + MIXTURES)
def test_logits_equal_the_original(converted, tiny, family):
    expected = reference(tiny, family)
    model = converted(tiny / family)
    with model.open() as session:
        logits, _ = model.step(session, expected["tokens"][None], [0], {})
    np.testing.assert_allclose(logits[0], expected["logits"], atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES + MIXTURES)
def test_chunks_and_single_tokens_continue_a_prompt(converted, tiny, family):
    expected = reference(tiny, family)
    tokens = expected["tokens"][None]
    model = converted(tiny / family)
    parts, past = [], {}
    with model.open() as session:
        # The window of gemma3 is 7 tokens: chunks longer and shorter than it, then steps of one
        for start, stop in [(0, 17), (17, 20), (20, 32), *((at, at + 1) for at in range(32, tokens.shape[1]))]:
            logits, past = model.step(session, tokens[:, start:stop], [start], past)
            parts.append(logits)
    np.testing.assert_allclose(np.concatenate(parts, 1)[0], expected["logits"], atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_different_lengths_decode_together(converted, tiny, family):
    expected = reference(tiny, family)
    tokens, lengths = expected["tokens"], (3, 24, 11)
    model = converted(tiny / family)
    with model.open() as session:
        pasts = [model.step(session, tokens[None, :length], [0], {})[1] for length in lengths]
        past = {name: np.concatenate([single[name] for single in pasts]) for name in pasts[0]}
        logits, _ = model.step(session, tokens[list(lengths), None], list(lengths), past)
    np.testing.assert_allclose(logits[:, 0], expected["logits"][list(lengths)], atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_ranges_of_blocks_make_the_whole(converted, tiny, family):
    expected = reference(tiny, family)
    model = converted(tiny / family)
    x = expected["tokens"][None]
    for blocks in (range(0, 1), range(1, 2), range(2, 3)):
        with model.open(blocks) as session:
            x, _ = model.step(session, x, [0], {})
        if blocks == range(0, 1):
            np.testing.assert_allclose(x[0], expected["first_block"], atol=1e-4)
    np.testing.assert_allclose(x[0], expected["logits"], atol=1e-4)


@pytest.mark.parametrize("format", [Format(8), Format(8, 64, symmetric=True), Format(4), Format(4, 64)], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_integers_stay_close(converted, tiny, family, format):
    """Widths of 48 and 72 fill no block of 64, so nearly every matrix is padded; gemma3 ties its head."""
    expected = reference(tiny, family)
    model = converted(tiny / family, Recipe("test", linear=format, embedding=format, head=format))
    with model.open() as session:
        logits, _ = model.step(session, expected["tokens"][None], [0], {})
    error = np.linalg.norm(logits[0] - expected["logits"]) / np.linalg.norm(expected["logits"])
    assert error < (0.04 if format.bits == 8 else 0.25)


def test_rotary_scalings_equal_transformers(tiny):
    for case in json.loads((tiny / "ropes.json").read_text()):
        parameters = case["parameters"]
        problems: list[str] = []
        values = {"max_position_embeddings": 131072}
        older = {"rope_theta": parameters["rope_theta"], "rope_scaling": parameters}
        for config in (values | {"rope_parameters": parameters}, values | older):
            rope = decoder.rope(Config(config, problems), 64)
            np.testing.assert_allclose(rope.inverse_frequencies, case["inverse_frequencies"], rtol=1e-5)
            assert rope.scale == pytest.approx(case["scale"], rel=1e-6)
        assert not problems
