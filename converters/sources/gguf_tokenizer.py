"""tokenizer.json from the vocabulary in a GGUF file's metadata.

Two kinds of vocabulary: `gpt2` (byte-level BPE with the merges of the original) and `llama` (SentencePiece BPE, whose
merges are implied by the scores). Promises the token ids of llama.cpp, with special tokens in the text recognised,
except where the original tokenizer is known to do otherwise: those of Qwen 2, Command R, OLMo and MPT normalise text to
NFC, which llama.cpp leaves out. Knows nothing about files.
"""

import json
from collections.abc import Callable

from shoal.runtime.errors import MissingPackageError, SourceError

from .gguf_config import adds_bos
from .gguf_header import Metadata

Refuse = Callable[..., SourceError]

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_SPACE = "\u2581"  # what SentencePiece writes for a space
_LONGEST_PIECE = 512  # characters; every way to halve a piece is tried

_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}%s| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_TAIL}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = "|".join(rf"[^\r\n\p{{L}}\p{{N}}]?{word}%s" for word in (f"{_UPPER}*{_LOWER}+", f"{_UPPER}+{_LOWER}*"))
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"


def _split(pattern: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _bytes(use_regex: bool) -> dict:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


_DIGITS = {"type": "Digits", "individual_digits": True}
_GPT2 = [_bytes(True)]
_STARCODER = [_DIGITS, _bytes(True)]
_QWEN2 = [_split(_WORDS % ""), _bytes(False)]
_LLAMA3 = [_split(_WORDS % "{1,3}"), _bytes(False)]
_GPT4O = [
    _split(_CASED % (f"{_CONTRACTION}?", f"{_CONTRACTION}?") + rf"|\p{{N}}{{1,3}}|{_SYMBOLS}|{_TAIL}"),
    _bytes(False),
]
_TEKKEN = [_split(_CASED % ("", "") + rf"|\p{{N}}|{_SYMBOLS}|{_TAIL}"), _bytes(False)]
_GPT2_WORDS = _split(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
_THREES = _split("[0-9][0-9][0-9]")
_FALCON = [{"type": "Punctuation", "behavior": "Contiguous"}, _GPT2_WORDS, _THREES, _bytes(False)]
# What llama.cpp does for files that do not name their pre-tokenizer.
_UNNAMED = [_split(r"[\p{P}\$\+<=>\^~\|]+"), _GPT2_WORDS, _split(r"\p{N}+"), _THREES, _bytes(False)]
_DEEPSEEK_CODER = [
    _split("[\r\n]"),
    _split(r"\s?\p{L}+"),
    _split(r"\s?\p{P}+"),
    _split("[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"),
    _DIGITS,
    _bytes(False),
]
_DEEPSEEK_V3 = [
    _split(r"\p{N}{1,3}"),
    _split("[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"),
    _split(
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
        rf"|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_TAIL}"
    ),
    _bytes(False),
]

# tokenizer.ggml.pre: the names that llama.cpp gives to the ways of cutting text into words.
_BEFORE: dict[str, list[dict]] = {
    "default": _UNNAMED,
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "exaone4", "trillion"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _STARCODER),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2", "hunyuan"), _QWEN2),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), _LLAMA3
    ),
    **dict.fromkeys(("gpt-4o", "llama4"), _GPT4O),
    "tekken": _TEKKEN,
    "falcon": _FALCON,
    "deepseek-coder": _DEEPSEEK_CODER,
    "deepseek-v3": _DEEPSEEK_V3,
}
_WHOLE_WORDS = frozenset(
    ("llama-bpe", "llama3", "llama-v3", "falcon3", "tekken")
)  # a word that is a token needs no merges
_NFC = frozenset(("qwen2", "command-r", "olmo", "mpt"))


def build(metadata: Metadata, refuse: Refuse) -> bytes:
    """The tokenizer.json of a GGUF file, tried with the tokenizers package. Raises what `refuse` makes of a sentence
    (a SourceError) for a vocabulary that is damaged or of a kind that is not known exactly."""
    tokens = _tokens(metadata, refuse)
    kinds = metadata.numbers("tokenizer.ggml.token_type", None)
    kinds = [_NORMAL] * len(tokens) if kinds is None else kinds.tolist()
    if len(kinds) != len(tokens):
        raise refuse(f"It has {len(tokens)} tokens and {len(kinds)} token types.")
    model = metadata.text("tokenizer.ggml.model")
    if model == "gpt2":
        parts = _byte_level(metadata, tokens, refuse)
    elif model == "llama":
        parts = _sentencepiece(metadata, tokens, kinds, refuse)
    else:
        raise refuse(
            f"Its tokenizer is of the kind {model!r:.80}; gpt2 and llama are known.",
            "Convert from the Hugging Face folder of the model, which has a tokenizer.json.",
        )
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": index, "content": tokens[index], "single_word": False, "lstrip": False, "rstrip": False}
            | {"normalized": False, "special": kind != _USER_DEFINED}
            for index, kind in enumerate(kinds)
            if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        ],
        "post_processor": _post_processor(metadata, tokens, refuse),
        **parts,
    }
    data = json.dumps(document, ensure_ascii=False).encode()
    check(data, refuse)
    return data


def check(data: bytes, refuse: Refuse) -> None:
    """Raises unless the tokenizers package accepts `data`."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MissingPackageError(
            "Checking a tokenizer needs a package that is not here.", str(error), "Run: pip install 'shoal[convert]'"
        ) from None
    try:
        Tokenizer.from_buffer(data)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a panic in Rust is no Exception
        raise refuse(f"Its tokenizer is refused by the tokenizers package: {str(error):.200}") from None


def _tokens(metadata: Metadata, refuse: Refuse) -> list[str]:
    tokens = metadata.strings("tokenizer.ggml.tokens")
    tokens = [text or f"[EMPTY_{index}]" for index, text in enumerate(tokens)]
    if len(set(tokens)) != len(tokens):
        raise refuse("Its vocabulary has the same token twice.")
    if not tokens:
        raise refuse("Its vocabulary is empty.")
    return tokens


def _byte_level(metadata: Metadata, tokens: list[str], refuse: Refuse) -> dict:
    before = metadata.text("tokenizer.ggml.pre", "default")
    if before not in _BEFORE:
        raise refuse(
            f"Its pre-tokenizer is {before!r:.80}; known are {', '.join(_BEFORE)}.",
            "Convert from the Hugging Face folder of the model, which has a tokenizer.json.",
        )
    known, merges = set(tokens), []
    for text in metadata.strings("tokenizer.ggml.merges"):
        cut = text.find(" ", 1)
        left, right = text[:cut], text[cut + 1 :]
        if cut < 0 or left not in known or right not in known or left + right not in known:
            raise refuse(f"Its merge {text!r:.80} does not make one of its tokens of two others.")
        merges.append((left, right))
    return {
        "normalizer": {"type": "NFC"} if before in _NFC else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _BEFORE[before]},
        "decoder": _bytes(True),
        "model": _bpe(tokens, merges, ignore_merges=before in _WHOLE_WORDS),
    }


def _sentencepiece(metadata: Metadata, tokens: list[str], kinds: list[int], refuse: Refuse) -> dict:
    scores = metadata.numbers("tokenizer.ggml.scores")
    if len(scores) != len(tokens):
        raise refuse(f"It has {len(tokens)} tokens and {len(scores)} scores.")
    unknown = metadata.integer("tokenizer.ggml.unknown_token_id", 0, high=(1 << 32) - 1)
    prefix = metadata.flag("tokenizer.ggml.add_space_prefix", True)
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    # A prefix goes before each stretch of text between special tokens, not only the first: that is what the models saw.
    normalizers = [{"type": "Prepend", "prepend": _SPACE}, spaces] if prefix else [spaces]
    decoders: list[dict] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _bpe(
            tokens, _implied_merges(tokens, kinds, scores.tolist(), refuse), byte_fallback=True, fuse_unk=True
        )
        | {"unk_token": tokens[unknown] if unknown < len(tokens) else None},
    }


def _implied_merges(tokens: list[str], kinds: list[int], scores: list[float], refuse: Refuse) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a third one, best score first.

    SentencePiece has no list of merges: it joins the two neighbours whose union has the best score. Among equals
    llama.cpp extends the leftmost, which a list can say only by putting longer left halves first: it matters for runs
    of spaces, whose scores are all the same.
    """
    mergeable = (_NORMAL, _USER_DEFINED, _UNUSED)
    pieces = {text: text for text, kind in zip(tokens, kinds, strict=True) if kind in mergeable}  # one copy of each
    merges: list[tuple[float, int, int, str, str]] = []
    most = 8 * len(tokens) + (1 << 16)  # a real vocabulary has two a token
    for text, kind, score in zip(tokens, kinds, scores, strict=True):
        if kind not in mergeable:
            continue
        if len(text) > _LONGEST_PIECE:
            raise refuse(f"A token has {len(text)} characters; {_LONGEST_PIECE} is the limit.")
        if score != score:
            raise refuse(f"The score of the token {text!r:.80} is not a number.")
        for cut in range(1, len(text)):
            left = pieces.get(text[:cut])
            if left and (right := pieces.get(text[cut:])):
                merges.append((-score, -cut, len(text), left, right))
        if len(merges) > most:
            raise refuse(f"Its {len(tokens)} tokens can be halved in more than {most} ways.")
    merges.sort()
    return [(left, right) for *_, left, right in merges]


def _bpe(tokens: list[str], merges: list[tuple[str, str]], **options: bool) -> dict:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {text: index for index, text in enumerate(tokens)},
        "merges": merges,
        **options,
    }


def _post_processor(metadata: Metadata, tokens: list[str], refuse: Refuse) -> dict | None:
    """Adds the tokens of beginning and end where the model wants them."""

    def special(name: str, default: int | None) -> str:
        index = metadata.integer(f"tokenizer.ggml.{name}_token_id", default, high=(1 << 32) - 1)
        if index is None or index >= len(tokens):
            raise refuse(f"It wants a {name} token added to every text, but has none.")
        return tokens[index]

    sentencepiece = metadata.text("tokenizer.ggml.model") == "llama"
    begin = [special("bos", 1 if sentencepiece else None)] if adds_bos(metadata) else []
    end = [special("eos", 2 if sentencepiece else None)] if metadata.flag("tokenizer.ggml.add_eos_token", False) else []
    if not begin and not end:
        return None

    def sequence(identifier: str, kind: int) -> list[dict]:
        added = [[{"SpecialToken": {"id": text, "type_id": kind}} for text in texts] for texts in (begin, end)]
        return [*added[0], {"Sequence": {"id": identifier, "type_id": kind}}, *added[1]]

    index = {text: number for number, text in enumerate(tokens)}
    return {
        "type": "TemplateProcessing",
        "single": sequence("A", 0),
        "pair": sequence("A", 0) + sequence("B", 1),
        "special_tokens": {text: {"id": text, "ids": [index[text]], "tokens": [text]} for text in begin + end},
    }
