"""Real models against transformers, token by token (tests/data/make_greedy.py says how the answers were made)."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from shoal.runtime.language.tokens import Tokenizer

KNOWN = json.loads((Path(__file__).resolve().parents[2] / "data" / "greedy.json").read_text())


@pytest.mark.parametrize(
    "name", ["smollm2", *(pytest.param(name, marks=pytest.mark.deep) for name in ("qwen", "gemma"))]
)
def test_greedy_tokens_equal_transformers(converted, request, name):
    """64 tokens on each of ten prompts, in fp32: prompts one by one, then all of them in steps of a token."""
    path = request.getfixturevalue(f"{name}_gguf")
    if hashlib.sha256(path.read_bytes()).hexdigest() != KNOWN[name]["sha256"]:
        pytest.skip("the answers are of another file")
    answers = KNOWN[name]["answers"]
    expected = np.array([answer["tokens"] for answer in answers])
    lengths = [len(answer["ids"]) for answer in answers]
    model = converted(path)
    tokenizer = Tokenizer.from_json(model.source.tokenizer())
    assert [tokenizer.encode(answer["prompt"]) for answer in answers] == [answer["ids"] for answer in answers]
    with model.open() as session:
        firsts, pasts = zip(
            *(model.step(session, np.array([answer["ids"]]), [0], {}, context=128) for answer in answers), strict=True
        )
        past = {key: np.concatenate([single[key] for single in pasts]) for key in pasts[0]}
        tokens = [np.array([logits[0, -1].argmax() for logits in firsts])]
        for _ in range(expected.shape[1] - 1):
            logits, past = model.step(session, tokens[-1][:, None], lengths, past, context=128)
            tokens.append(logits[:, 0].argmax(-1))
            lengths = [length + 1 for length in lengths]
    np.testing.assert_array_equal(np.stack(tokens, 1), expected)
