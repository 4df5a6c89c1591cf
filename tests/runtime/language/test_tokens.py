"""Text to ids and back: the same at once and token by token, whole characters only, for every kind of tokenizer."""

import random
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Packaged

from shoal.runtime.errors import BundleError, MissingPackageError, UsageError
from shoal.runtime.language.tokens import Tokenizer

TEXTS = ["Hello, world!", " two  spaces ", "naïve Größe", "日本語 한국어 😀👨‍👩‍👧🏽", "x\n\n\ty", "don't <tool> it", ""]


@pytest.fixture(scope="module")
def smollm2(smollm2_json) -> Tokenizer:
    return Tokenizer.from_json(smollm2_json)


def test_decodes_as_tokenizers(small_json):
    tokenizer, packaged = Tokenizer.from_json(small_json), Packaged.from_str(small_json.decode())
    for text in TEXTS:
        ids = tokenizer.encode(text)
        for special in (True, False):
            assert tokenizer.decode(ids, special=special) == packaged.decode(ids, skip_special_tokens=not special)
        if "<" not in text:  # SentencePiece puts a space after an added token
            assert tokenizer.decode(ids) == text


def test_a_stream_is_the_text_in_whole_characters(small_json):
    tokenizer = Tokenizer.from_json(small_json)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        text = tokenizer.decode(ids)
        stream, shown = tokenizer.stream(), ""
        for number in ids:
            shown += stream.push(number)
            assert text.startswith(shown)
        assert stream.flush() == "" and shown == text


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(-5, 49_200), max_size=20))
def test_any_ids_stream_as_they_decode(smollm2, ids):
    stream = smollm2.stream()
    pieces = [stream.push(number) for number in ids] + [stream.flush()]
    raw = b"".join(smollm2.token_bytes(number) for number in ids if number not in smollm2.special)
    assert "".join(pieces) == raw.decode("utf-8", "replace") == smollm2.decode(ids)


def test_half_a_character_waits_and_is_marked_at_the_end(smollm2):
    ids = smollm2.encode("😀")
    assert len(ids) > 1
    stream = smollm2.stream()
    assert [stream.push(number) for number in ids[:-1]] == [""] * (len(ids) - 1)
    assert stream.flush() == "\ufffd"


def test_the_first_space_belongs_to_the_text_only_where_it_goes_on(tiny_gguf):
    from shoal.converters.sources import open_source

    with open_source(tiny_gguf) as source:
        tokenizer = Tokenizer.from_json(source.tokenizer())
    ids = tokenizer.encode("word", special=False)
    assert tokenizer.decode(ids) == "word"
    stream = tokenizer.stream(continues=True)
    assert "".join(stream.push(number) for number in ids) == " word"
    assert tokenizer.encode("word")[0] == tokenizer.id("<s>")  # its own template


def test_special_tokens(smollm2):
    end = smollm2.id("<|im_end|>")
    assert end in smollm2.special and smollm2.text_of(end) == "<|im_end|>"
    assert smollm2.encode("hi<|im_end|>")[-1] == end
    assert smollm2.decode([*smollm2.encode("hi"), end]) == "hi"
    assert smollm2.decode([*smollm2.encode("hi"), end], special=True) == "hi<|im_end|>"


def test_word_pieces(minilm_json):
    tokenizer, packaged = Tokenizer.from_json(minilm_json), Packaged.from_str(minilm_json.decode())
    packaged.no_padding()
    packaged.no_truncation()
    for text in ("Unbelievable: it's world-class, isn't it?", "a " * 400, "Größe 日本"):
        ids = tokenizer.encode(text)
        assert ids == packaged.encode(text).ids  # as long as it is, neither cut nor padded
        stream = tokenizer.stream()
        assert "".join(stream.push(number) for number in ids) == packaged.decode(ids)


def test_without_the_package(minilm_json, smollm2_json, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert Tokenizer.from_json(smollm2_json).decode(Tokenizer.from_json(smollm2_json).encode("hi")) == "hi"
    with pytest.raises(MissingPackageError, match="shoal\\[language\\]"):
        Tokenizer.from_json(minilm_json)


def test_bytes_that_are_no_tokenizer(minilm_json):
    chance = random.Random(1)
    broken = [b"", b"{}", b"[]", b"\xff\xfe", b'{"merges": [', b"[" * 100_000, minilm_json[:-1000], b"\0" * 1000]
    for _ in range(30):
        data = bytearray(minilm_json)
        for _ in range(3):
            data[chance.randrange(2000)] = chance.randrange(256)
        broken.append(bytes(data))
    refused = 0
    for data in broken:
        try:
            Tokenizer.from_json(data).encode("hello")
        except BundleError:
            refused += 1
    assert refused >= 8


@pytest.mark.parametrize("text", [b"bytes", None, 5, "lone \ud83d surrogate"])
def test_what_is_no_text(smollm2, minilm_json, text):
    for tokenizer in (smollm2, Tokenizer.from_json(minilm_json)):
        with pytest.raises(UsageError):
            tokenizer.encode(text)
