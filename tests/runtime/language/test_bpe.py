"""bpe.py gives the ids of `tokenizers`, in less memory, and refuses what is damaged."""

import json
import random
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Packaged

from shoal.converters.sources import open_source
from shoal.runtime.errors import BundleError
from shoal.runtime.language.bpe import BytePairs
from shoal.runtime.language.tokens import Tokenizer

POOLS = (
    "abcdefghijklmnopqrstuvwxyz", "THE quick BROWN", " \t\n\r\v\f\x1c\x85\xa0\u2003\u2028\u3000\u200b\ufeff",
    "0123456789٣४Ⅷ½²①", "'sStTrReEvVmMlLdDſ", "!?.,;:-_#@$%^&*()[]{}<>|/\\\"`~", "éüñçßøåÆœÿİıǅĳ",
    "абвгдежзийЖЩαβγδεΩς",
    "中文字符日本語ひらがなカタカナ한국어", "مرحبا नमस्ते ไทยภาษา",
    "😀🎉👨‍👩‍👧🏽🇩🇪𝐀𝟘𐐀", "e\u0301o\u0308a\u20dd\u1e9b\u0323\u212b\u2126ﬁﬆ",
)  # fmt: skip


def varied(count: int, seed: int, extra: list[str]) -> list[str]:
    """Texts that mix scripts, digits, spaces, contractions and added tokens."""
    chance = random.Random(seed)
    texts = []
    for _ in range(count):
        parts = []
        for _ in range(chance.randint(1, 20)):
            pool = chance.choice(POOLS)
            parts.append("".join(chance.choice(pool) for _ in range(chance.randint(1, 6))))
            if chance.random() < 0.2:
                parts.append(chance.choice(extra))
        texts.append("".join(parts))
    return texts


EXTRA = ["<|s|>", "<|s|><|t|>", "<tool>", "<|", "'s", "I'LL", "don't", " the", "   ", "\n\n", "▁", "<0x41>"]


def same(data: bytes, texts: list[str]) -> None:
    ours, theirs = BytePairs.from_json(data), Packaged.from_str(data.decode())
    assert ours is not None
    for text in texts:
        for special in (True, False):
            assert ours.encode(text, special) == theirs.encode(text, add_special_tokens=special).ids, repr(text)


def test_ids_are_those_of_tokenizers(small_json):
    # The whole of the first planes that Python and every Unicode of the last decade class alike, then mixtures
    bases = (*range(0, 0x800, 16), *range(0x2000, 0x3100, 16))
    planes = ["a" + "a ".join(map(chr, range(base, base + 16))) for base in bases]
    same(small_json, ["", " ", "a", "\n", *planes, *varied(400, 1, EXTRA)])


def test_ids_of_any_text(smollm2_json):
    ours, theirs = BytePairs.from_json(smollm2_json), Packaged.from_buffer(smollm2_json)

    @settings(max_examples=100, deadline=None)
    @given(st.text(st.characters(max_codepoint=0x24F), max_size=60))
    def check(text):
        assert ours.encode(text) == theirs.encode(text).ids

    check()


def test_smollm2(smollm2_json):
    same(smollm2_json, varied(600, 2, ["<|im_start|>", "<|im_end|>", "<file_sep>", *EXTRA]))


@pytest.mark.deep
@pytest.mark.parametrize("name", ["smollm2_gguf", "qwen_gguf", "gemma_gguf", "tiny_gguf"])
def test_real_vocabularies(name, request):
    with open_source(request.getfixturevalue(name)) as source:
        data = source.tokenizer()
    extra = [entry["content"] for entry in json.loads(data)["added_tokens"]][:40]
    same(data, varied(4000, 3, extra + EXTRA))


def test_merges_as_texts(small_json):
    config = json.loads(small_json)
    config["model"]["merges"] = [" ".join(pair) for pair in config["model"]["merges"]]
    same(json.dumps(config).encode(), varied(50, 4, EXTRA))  # with \u escapes, which the merges' reader must follow


def test_long_words(small_json):
    same(small_json, ["a" * 30_000, "ab" * 15_000, "the" * 10_000])


def test_tokens_are_found_by_name(small_json):
    tokenizer, packaged = BytePairs.from_json(small_json), Packaged.from_str(small_json.decode())
    for token, number in packaged.get_vocab(with_added_tokens=True).items():
        assert tokenizer.find(token) == number
    assert tokenizer.find("no such token") is None


def test_other_kinds_are_left_to_the_package(gpt2_json, minilm_json):
    assert BytePairs.from_json(minilm_json) is None
    for path, value in (
        (("model", "dropout"), 0.1), (("model", "end_of_word_suffix"), "</w>"), (("normalizer",), {"type": "NFKC"}),
        (("pre_tokenizer",), {"type": "Whitespace"}), (("decoder",), {"type": "BPEDecoder", "suffix": "</w>"}),
        (("added_tokens", 0, "lstrip"), True), (("post_processor",), {"type": "BertProcessing"}),
    ):  # fmt: skip
        config = part = json.loads(gpt2_json)
        for key in path[:-1]:
            part = part[key]
        part[path[-1]] = value
        assert BytePairs.from_json(json.dumps(config).encode()) is None, path


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("model", "vocab"), []), (("model", "vocab", "a"), -1), (("model", "vocab", "a"), 1 << 40),
        (("model", "vocab", "a"), "5"), (("model", "merges"), [["a", "no such"]]), (("model", "merges"), [["a"]]),
        (("model", "merges"), ["a b c"]), (("added_tokens",), [{"content": 3, "id": 1}]), (("added_tokens",), 5),
        (("post_processor", "single"), [{"SpecialToken": {"id": "gone"}}]), (("model",), "BPE"),
    ],
)  # fmt: skip
def test_damage_is_named(gpt2_json, path, value):
    config = part = json.loads(gpt2_json)
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    with pytest.raises(BundleError):
        Tokenizer.from_json(json.dumps(config).encode())


def test_damaged_bytes(gpt2_json):
    chance = random.Random(6)
    for _ in range(200):
        data = bytearray(gpt2_json)
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        if chance.random() < 0.3:
            del data[chance.randrange(len(data)) :]
        try:
            tokenizer = BytePairs.from_json(bytes(data))
        except BundleError:
            continue
        if tokenizer is not None:
            tokenizer.encode("The quick brown fox <|s|> 12")


MEASURE = """
import mmap, re, sys
from shoal.runtime.language.tokens import Tokenizer
def anonymous():
    return int(re.search("Anonymous: *([0-9]+)", open("/proc/self/smaps_rollup").read())[1]) << 10
file = open(sys.argv[1], "rb")
view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
before = anonymous()
tokenizer = Tokenizer.from_json(view)
print(anonymous() - before, tokenizer.nbytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_what_it_says(smollm2_json, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(smollm2_json)
    done = subprocess.run([sys.executable, "-c", MEASURE, path], capture_output=True, text=True, check=True)
    grew, said = map(int, done.stdout.split())
    assert said < 5 << 20  # the package takes 13 MiB, and 30 before the heap is trimmed
    assert grew < said + (3 << 20)
