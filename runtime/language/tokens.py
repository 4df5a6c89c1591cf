"""Text to token ids and back, from the bytes of a tokenizer.json.

Byte-pair tokenizers of the common kinds run on compact tables of our own (bpe.py); for the others the package
`tokenizers` is loaded, which holds several times the memory. Either way a text decodes the same at once as token by
token, and what a `Detokenizer` gives never ends within a character. It knows nothing about models, prompts or sampling.
"""

import codecs
import ctypes
import json
import re
from collections.abc import Callable, Iterable
from typing import Any

from ..errors import BundleError, MissingPackageError, UsageError
from .bpe import BytePairs, spelled

_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")


class Tokenizer:
    """`vocab` is the greatest id plus one, `special` the ids that carry no text, `nbytes` what it holds in memory."""

    def __init__(self, engine: "BytePairs | _Packaged"):
        self._engine = engine
        self.vocab: int = engine.size
        self.special: frozenset[int] = engine.special
        self.nbytes: int = engine.nbytes

    @classmethod
    def from_json(cls, data: bytes | memoryview) -> "Tokenizer":
        """Reads untrusted bytes. Raises BundleError where they are no tokenizer, MissingPackageError where it is of a
        kind that needs the package `tokenizers`."""
        tokenizer = cls(BytePairs.from_json(data) or _Packaged(bytes(data)))
        _return_free_memory()
        return tokenizer

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Ids of a text. Special tokens that are written in it are recognised; `special` also adds those that the
        tokenizer itself puts around a text (leave it out for a rendered chat, which has its own)."""
        if not isinstance(text, str):
            raise UsageError("The text cannot be encoded.", f"It is of type {type(text).__name__}.", "Give a str.")
        try:
            return self._engine.encode(text, special)
        except UnicodeError as error:
            raise UsageError("The text cannot be encoded.", str(error)[:200], "Give valid Unicode text.") from None

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """The text of ids: what `stream` gives piece by piece. Special tokens are shown only if `special`; bytes that
        are not UTF-8 become U+FFFD."""
        stream = self.stream(special=special)
        return "".join([stream.push(number) for number in ids]) + stream.flush()

    def stream(self, special: bool = False, continues: bool = False) -> "Detokenizer":
        """A decoder for one text as it comes. With `continues` the text goes on from another, so a space that it
        begins with is text even where the tokenizer puts one before every text."""
        return Detokenizer(self, special, self._engine.strips and not continues)

    def token_bytes(self, number: int) -> bytes:
        """The bytes that a token adds to the text it stands within, which may be part of a character; for a special
        token its name; nothing for an id that is none."""
        return self._engine.piece(number)

    def text_of(self, number: int) -> str:
        """A token for a person or a chat template: its name or text."""
        return self.token_bytes(number).decode("utf-8", "replace")

    def id(self, token: str) -> int | None:
        """The id of a token as the vocabulary writes it ("<|im_end|>", "Ġthe"); None for none."""
        return self._engine.find(token)


class Detokenizer:
    """Text from ids, one at a time; see `Tokenizer.stream`. One text each, no thread of its own."""

    def __init__(self, tokenizer: Tokenizer, special: bool, strips: bool):
        self._tokenizer, self._special, self._strips = tokenizer, special, strips
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, number: int) -> str:
        """What is certain of the text now; it may be empty, and holds whole characters only."""
        if number in self._tokenizer.special and not self._special:
            return ""
        data = self._tokenizer.token_bytes(number)
        if self._strips and data:
            data, self._strips = data.removeprefix(b" "), False
        return self._utf8.decode(data)

    def flush(self) -> str:
        """Ends the text: U+FFFD for a character that was never completed, else nothing."""
        return self._utf8.decode(b"", final=True)


class _Packaged:
    """The package `tokenizers` behind the same door as BytePairs."""

    def __init__(self, data: bytes):
        try:
            from tokenizers import Tokenizer as Packaged
        except ImportError as error:
            raise MissingPackageError(
                "This model's tokenizer needs a package that is not here.",
                str(error),
                "Run: pip install 'shoal[language]'",
            ) from None
        try:
            self._tokenizer = Packaged.from_buffer(data)
            self._tokenizer.no_padding()  # lengths are the model's business
            self._tokenizer.no_truncation()
            added = self._tokenizer.get_added_tokens_decoder()
            decoder = self._tokenizer.decoder
            self._steps, self.strips = _steps(json.loads(decoder.__getstate__()) if decoder else None)
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:  # a panic in Rust is no Exception
            raise _broken(error) from None
        self.size = max([self._tokenizer.get_vocab_size(), *(number + 1 for number in added)])
        self.special = frozenset(number for number, token in added.items() if token.special)
        self.nbytes = 8 * len(data) + (4 << 20)  # measured 6 to 8 times the file, and the library itself

    def encode(self, text: str, special: bool) -> list[int]:
        text.encode()  # says where it is not valid Unicode, which the package does not
        try:
            return self._tokenizer.encode(text, add_special_tokens=special).ids
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:
            raise _broken(error) from None

    def piece(self, number: int) -> bytes:
        token: Any = self._tokenizer.id_to_token(number) if 0 <= number < self.size else None
        if token is None:
            return b""
        for step in self._steps:
            if isinstance(token, str):
                token = step(token)
        return token.encode() if isinstance(token, str) else token

    def find(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)


def _broken(error: BaseException) -> BundleError:
    why = f"{type(error).__name__}: {error}"[:200]
    return BundleError("The tokenizer cannot be used.", why, "Convert the checkpoint again.")


def _steps(config: dict | None) -> tuple[list[Callable[[str], str | bytes]], bool]:
    """What a decoder does with one token, and whether the first space of a text is dropped."""
    if config is None:
        return [lambda token: " " + token], True
    kind = config["type"]
    if kind == "Sequence":
        parts = [_steps(part) for part in config["decoders"]]
        return [step for steps, _ in parts for step in steps], any(strips for _, strips in parts)
    if kind == "Fuse":
        return [], False
    if kind == "Strip" and config["content"] == " " and config["start"] <= 1 and not config["stop"]:
        return [], config["start"] == 1
    if kind == "Replace" and "String" in config["pattern"]:
        return [lambda token: token.replace(config["pattern"]["String"], config["content"])], False
    if kind == "Metaspace":
        strips = config.get("prepend_scheme", "always") != "never"
        return [lambda token: token.replace(config["replacement"], " ")], strips
    if kind == "ByteLevel":
        return [lambda token: spelled(token) or token], False
    if kind == "ByteFallback":
        return [lambda token: bytes([int(token[3:5], 16)]) if _BYTE.fullmatch(token) else token], False
    if kind == "WordPiece":
        return [lambda token: _word_piece(token, config["prefix"], config["cleanup"])], True
    raise ValueError(f"a decoder of the kind {kind!r:.40} is not known")


def _word_piece(token: str, prefix: str, cleanup: bool) -> str:
    token = token[len(prefix) :] if token.startswith(prefix) else " " + token
    # The tokens that BERT's own clean-up joins to the word before them
    return token[1:] if cleanup and token[:2] in (" .", " ?", " !", " ,") else token


def _return_free_memory() -> None:
    """Gives the system what reading the file took and freed; glibc would keep several times what the tables hold."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
