"""Token ids against llama.cpp's (llama_cpp_tokens.json), and vocabularies that are damaged."""

import json
import unicodedata
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from shoal.converters.sources import gguf_tokenizer, open_source

STRING, ARRAY, I32, F32, U32, BOOL = 8, 9, 5, 6, 4, 7
GOLDEN = json.loads(Path(__file__).with_name("llama_cpp_tokens.json").read_bytes())


def agree(path, name: str) -> Tokenizer:
    with open_source(path) as source:
        tokenizer = Tokenizer.from_buffer(source.tokenizer())
    for text, ids in zip(GOLDEN["texts"], GOLDEN["ids"][name], strict=True):
        if name != "qwen" or unicodedata.is_normalized("NFC", text):
            assert tokenizer.encode(text).ids == ids, text
    return tokenizer


def test_smollm2(smollm2_gguf):
    tokenizer = agree(smollm2_gguf, "smollm2")
    chat = "<|im_start|>user\nhi<|im_end|>\n"
    assert tokenizer.decode(tokenizer.encode(chat).ids, skip_special_tokens=False) == chat
    assert tokenizer.decode(tokenizer.encode(chat).ids) == "user\nhi\n"


def test_sentencepiece(tiny_gguf):
    tokenizer = agree(tiny_gguf, "tiny")
    assert tokenizer.encode("a").tokens == ["<s>", "▁a"]  # begins with what the metadata wants
    assert tokenizer.decode(tokenizer.encode("  two\n\tline 😀").ids) == "  two\n\tline 😀"


@pytest.mark.deep
def test_qwen(qwen_gguf):
    tokenizer = agree(qwen_gguf, "qwen")
    assert tokenizer.encode("e\u0301").ids == tokenizer.encode("\u00e9").ids  # as its own tokenizer has it


@pytest.mark.deep
def test_gemma(gemma_gguf):
    agree(gemma_gguf, "gemma")


@pytest.fixture
def tokenizer_of(gguf_bytes, llama_keys, tmp_path):
    def build(**changes) -> Tokenizer:
        path = tmp_path / "x.gguf"
        path.write_bytes(gguf_bytes(llama_keys(**{f"tokenizer.ggml.{key}": value for key, value in changes.items()})))
        with open_source(path) as source:
            return Tokenizer.from_buffer(source.tokenizer())

    return build


@pytest.mark.parametrize("before", sorted(gguf_tokenizer._BEFORE))
def test_every_pre_tokenizer_is_accepted_and_loses_nothing(before, tokenizer_of):
    alphabet = [
        chr(byte + 256) if byte <= 32 else chr(byte) for byte in range(127)
    ]  # ASCII as byte-level BPE writes it
    tokens = ["<s>", *alphabet]
    built = tokenizer_of(
        pre=(STRING, before), tokens=(ARRAY, (STRING, tokens)), token_type=(ARRAY, (I32, [3] + [1] * 127)),
        merges=(ARRAY, (STRING, [])), bos_token_id=(U32, 0),
    )  # fmt: skip
    text = "I'm  here\n\n\tat 12345 o'clock!?\r\n  x_y=(a+b)**2 # done "
    assert built.decode(built.encode(text).ids) == text


PRE = {
    "smollm": (" 123", ["Ġ", "1", "2", "3"]),
    "gpt-2": (" 123", ["Ġ123"]),
    "qwen2": ("x123", ["x", "1", "2", "3"]),
    "llama-bpe": ("12345", ["123", "45"]),
    "gpt-4o": ("HelloWorld", ["Hello", "World"]),
    "tekken": ("HelloWorld12", ["Hello", "World", "1", "2"]),
    "deepseek-v3": ("12345", ["123", "45"]),
    "falcon": ("1234!!", ["123", "4", "!!"]),
}


@pytest.mark.parametrize("before", PRE)
def test_words(before, tokenizer_of):
    text, words = PRE[before]
    built = tokenizer_of(pre=(STRING, before))
    assert [word for word, _ in built.pre_tokenizer.pre_tokenize_str(text)] == words


def test_no_pre_tokenizer_means_the_default(tokenizer_of):
    built = tokenizer_of(pre=None)
    assert [word for word, _ in built.pre_tokenizer.pre_tokenize_str("a1234 b$$")] == ["a", "123", "4", "Ġb", "$$"]


def sentencepiece(pieces: list[tuple[str, float, int]], **more) -> dict:
    texts, scores, kinds = zip(*pieces, strict=True)
    return {
        "model": (STRING, "llama"), "pre": None, "merges": None, "tokens": (ARRAY, (STRING, texts)),
        "scores": (ARRAY, (F32, scores)), "token_type": (ARRAY, (I32, kinds)), "eos_token_id": None,
    } | more  # fmt: skip


PIECES = [("<unk>", 0, 2), ("<s>", 0, 3), ("</s>", 0, 3), ("<0x41>", 0, 6), ("▁", -9, 1), ("a", -9, 1), ("b", -9, 1)]


def test_merges_follow_the_scores(tokenizer_of):
    best_last = sentencepiece([*PIECES, ("ab", -3, 1), ("ba", -2, 1), ("▁a", -1, 1)], add_space_prefix=(BOOL, False))
    built = tokenizer_of(**best_last)
    assert built.encode("aba").tokens == ["<s>", "a", "ba"]
    assert built.encode(" aba").tokens == ["<s>", "▁a", "ba"]
    assert built.encode("A").tokens == ["<s>", "<0x41>"]
    assert built.encode("Z").tokens == ["<s>", "<unk>"]
    assert built.decode([1, 7, 8, 3]) == "abbaA"


def test_runs_of_equal_score_grow_from_the_left(tokenizer_of):
    runs = [("▁" * n, -1e9, 1) for n in range(2, 8)]
    built = tokenizer_of(**sentencepiece(PIECES + runs, add_bos_token=(BOOL, False), add_space_prefix=(BOOL, False)))
    for length in range(1, 40):
        assert [len(token) for token in built.encode(" " * length).tokens] == [7] * (length // 7) + (
            [length % 7] if length % 7 else []
        )


def test_begin_and_end(tokenizer_of):
    built = tokenizer_of(**sentencepiece(PIECES, add_eos_token=(BOOL, True)))
    assert built.encode("b").tokens == ["<s>", "▁", "b", "</s>"]
    assert built.encode("b", add_special_tokens=False).tokens == ["▁", "b"]


def test_a_vocabulary_made_to_be_halved(tokenizer_of, refused):
    """Runs of two letters, up to the longest piece: 262,000 merges of 1,024 tokens, were they all made."""
    runs = [(chr(0x4E00 + letter) * n, 0, 1) for letter in range(2) for n in range(1, 513)]
    with refused(32 << 20):
        tokenizer_of(**sentencepiece(PIECES + runs))


@pytest.mark.parametrize(
    "changes",
    [
        {"scores": (ARRAY, (F32, [0.0]))},
        {"scores": None},
        {"scores": (ARRAY, (F32, [float("nan")] * 7))},
        {"tokens": (ARRAY, (STRING, ["x" * 600, "b", "c", "d", "e", "f", "g"])), "token_type": None},
        {"tokens": (ARRAY, (STRING, []))},
        {"add_bos_token": (BOOL, True), "bos_token_id": (U32, 99)},
        {"unknown_token_id": (STRING, "0")},
        {"add_space_prefix": (U32, 1)},
    ],
)
def test_damaged_vocabulary(changes, tokenizer_of, refused):
    with refused():
        tokenizer_of(**sentencepiece(PIECES) | changes)
