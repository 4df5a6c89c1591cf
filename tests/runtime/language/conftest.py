"""Tokenizers: a real one, and small ones of every kind, trained here on a page of text."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from shoal.converters.sources import open_source

TEXT = """The quick brown fox doesn't jump over 12 lazy dogs; it's 3,141 or 271828 times they've slept. I'LL say: "WHY?"
def main(argv: list[str]) -> int:\n    return sum(len(word) for word in argv if word != "")\n\n\tprint(x_1, y_2)\r\n
Größe, façade, naïve, Ångström, ſo, ĳs. Съешь же ещё этих мягких булок. Η γρήγορη καφέ αλεπού. שלום עולם مرحبا بالعالم
敏捷的棕色狐狸跳过了懒狗。いろはにほへと ちりぬるを 다람쥐 헌 쳇바퀴에 타고파\
 नमस्ते दुनिया ไทย ½ ² Ⅷ ٣٤ 😀👨‍👩‍👧🏽 e\u0301 \u00a0\u2003\u3000 \u200b
"""
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_HEAD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
KINDS = ("gpt2", "smollm", "qwen2", "llama3", "sentencepiece", "sentencepiece-prefix")


def _split(digits: str) -> dict:
    pattern = {"Regex": f"{_HEAD}|{digits}|{_TAIL}"}
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


def _bytes(use_regex: bool) -> dict:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _sequence(*parts: dict) -> dict:
    return {"type": "Sequence", "pretokenizers": list(parts)}


CUT = {
    "gpt2": _bytes(True),
    "smollm": _sequence({"type": "Digits", "individual_digits": True}, _bytes(True)),
    "qwen2": _sequence(_split(r"\p{N}"), _bytes(False)),
    "llama3": _sequence(_split(r"\p{N}{1,3}"), _bytes(False)),
}


def make(kind: str) -> bytes:
    """A small tokenizer.json of a kind, with two special tokens, one that is text, and a template."""
    plain = kind in CUT
    tokenizer = Tokenizer(models.BPE(unk_token=None if plain else "<unk>", byte_fallback=not plain, fuse_unk=not plain))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False) if plain else pre_tokenizers.Metaspace()
    alphabet = pre_tokenizers.ByteLevel.alphabet() if plain else []
    byte_tokens = [] if plain else ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=alphabet, special_tokens=byte_tokens, show_progress=False,
        limit_alphabet=1000 if plain else 80,
    )  # fmt: skip
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    config = json.loads(tokenizer.to_str())
    size = len(config["model"]["vocab"])
    config["added_tokens"] = [
        {"id": size + index, "content": content, "special": special, "normalized": False}
        | {"single_word": False, "lstrip": False, "rstrip": False}
        for index, (content, special) in enumerate((("<|s|>", True), ("<|s|><|t|>", True), ("<tool>", False)))
    ]
    special = {"id": "<|s|>", "ids": [size], "tokens": ["<|s|>"]}
    config["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|s|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|s|>": special},
    }
    if plain:
        config["pre_tokenizer"], config["decoder"] = CUT[kind], _bytes(True)
        config["normalizer"] = {"type": "NFC"} if kind == "qwen2" else None
        config["model"]["ignore_merges"] = kind == "llama3"
    else:
        prefix = kind == "sentencepiece-prefix"
        spaces = [normalizers.Prepend("▁")] * prefix + [normalizers.Replace(" ", "▁")]
        strip = [decoders.Strip(" ", 1, 0)] * prefix
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
        config["pre_tokenizer"] = None
        config["normalizer"] = json.loads(normalizers.Sequence(spaces).__getstate__())
        config["decoder"] = json.loads(decoders.Sequence(steps).__getstate__())
    return json.dumps(config, ensure_ascii=False).encode()


@pytest.fixture(scope="session", params=KINDS)
def small_json(request) -> bytes:
    """A tokenizer.json of each kind that bpe.py takes."""
    return make(request.param)


@pytest.fixture(scope="session")
def gpt2_json() -> bytes:
    return make("gpt2")


@pytest.fixture(scope="session")
def smollm2_json(smollm2_gguf) -> bytes:
    with open_source(smollm2_gguf) as source:
        return source.tokenizer()


@pytest.fixture(scope="session")
def minilm_json(minilm_folder) -> bytes:
    return (minilm_folder / "tokenizer.json").read_bytes()
