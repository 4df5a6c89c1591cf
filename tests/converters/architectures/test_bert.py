"""BERT encoders: random ones against transformers, MiniLM against sentence-transformers' recipe."""

import json
from pathlib import Path

import numpy as np
import pytest

from shoal.runtime.language.tokens import Tokenizer

TEXTS = json.loads((Path(__file__).resolve().parents[2] / "data" / "embeddings.json").read_text())


def reference(tiny, name: str) -> dict[str, np.ndarray]:
    with np.load(tiny / name / "reference.npz") as stored:
        return dict(stored)


@pytest.mark.parametrize("name", ["bert-mean", "bert-cls"])
def test_embeddings_equal_the_original(converted, tiny, name):
    expected = reference(tiny, name)
    tokens, mask = expected["tokens"], expected["mask"]
    model = converted(tiny / name)
    assert (model.card.pooling, model.card.normalize) == (name[5:], name == "bert-mean")
    with model.open() as session:
        together = session.run({"tokens": tokens, "mask": mask})["embedding"]
        alone = [
            session.run({"tokens": tokens[i : i + 1, :n], "mask": mask[i : i + 1, :n]})["embedding"][0]
            for i, n in enumerate(mask.sum(1))
        ]
        # What lies under the padding is not seen
        other = session.run({"tokens": np.where(mask, tokens, 9), "mask": mask})["embedding"]
    np.testing.assert_allclose(together, expected["embedding"], atol=1e-5)
    np.testing.assert_allclose(np.stack(alone), expected["embedding"], atol=1e-5)
    np.testing.assert_array_equal(other, together)


def test_ranges_of_blocks_make_the_whole(converted, tiny):
    expected = reference(tiny, "bert-mean")
    model = converted(tiny / "bert-mean")
    x = {"tokens": expected["tokens"]}
    for blocks in (range(0, 1), range(1, 2), range(2, 3)):
        with model.open(blocks) as session:
            found = session.run(x | {"mask": expected["mask"]})
        if "hidden_out" in found:
            x = {"hidden": found["hidden_out"]}
    np.testing.assert_allclose(found["embedding"], expected["embedding"], atol=1e-5)


def test_a_sentence_model_cuts_where_it_was_trained_to(converted, tiny):
    assert converted(tiny / "bert-mean").card.max_context == 32  # of 40 positions


def test_a_checkpoint_may_carry_a_prefix(converted, tiny, tmp_path):
    from safetensors.numpy import load_file, save_file

    folder = tmp_path / "prefixed"
    folder.mkdir()
    for path in (tiny / "bert-cls").glob("*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_bytes((tiny / "bert-cls" / "1_Pooling" / "config.json").read_bytes())
    stored = load_file(tiny / "bert-cls" / "model.safetensors")
    save_file({f"bert.{name}": array for name, array in stored.items()}, folder / "model.safetensors")
    expected = reference(tiny, "bert-cls")
    with converted(folder).open() as session:
        found = session.run({"tokens": expected["tokens"], "mask": expected["mask"]})["embedding"]
    np.testing.assert_allclose(found, expected["embedding"], atol=1e-5)


def test_minilm_equals_sentence_transformers(converted, minilm_folder):
    model = converted(minilm_folder)
    tokenizer = Tokenizer.from_json(model.source.tokenizer())
    ids = [tokenizer.encode(entry["text"]) for entry in TEXTS["texts"]]
    assert [len(row) for row in ids] == [entry["tokens"] for entry in TEXTS["texts"]]
    expected = np.array([entry["embedding"] for entry in TEXTS["texts"]], np.float32)
    with model.open() as session:
        for batch in (range(0, 1), range(1, 4), range(len(ids))):
            length = max(len(ids[i]) for i in batch)
            tokens, mask = np.zeros((2, len(batch), length), np.int64)
            for row, i in enumerate(batch):
                tokens[row, : len(ids[i])], mask[row, : len(ids[i])] = ids[i], 1
            found = session.run({"tokens": tokens, "mask": mask})["embedding"]
            np.testing.assert_allclose(found, expected[batch], atol=1e-4)
