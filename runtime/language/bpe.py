"""Byte-pair encoding over compact tables: the ids that `tokenizers` gives, in a fifth of its memory.

It takes byte-level BPE with the pre-tokenizers of GPT-2, SmolLM, Qwen 2 and Llama 3, and SentencePiece BPE with byte
fallback (Sennrich et al. 2016; Kudo and Richardson 2018). For each token it holds its bytes and 16 more, for each merge
16. It knows nothing about models, chats or files; how text is cut into words is said in words.py.
"""

import json
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from heapq import heapify, heappop, heappush
from itertools import accumulate
from operator import add

import numpy as np

from ..errors import BundleError
from . import words

_MOST_IDS = 1 << 21
_CACHED_WORDS, _CACHED_LENGTH = 4096, 32

# The merges are most of the file. They are parsed block by block, so that not all of them are Python objects at once;
# possessive quantifiers keep hostile text from making the match backtrack.
_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_MERGES = re.compile(rb'"merges"(?<!\\"merges")\s*+:\s*+\[')
_BLOCK = re.compile(rb"(?:\s*+(?:\[\s*+%b\s*+,\s*+%b\s*+\]|%b)\s*+,?+){1,4096}+" % ((_STRING,) * 3), re.DOTALL)

_HIDDEN = [*range(33), *range(127, 161), 173]  # bytes that Latin-1 does not show are spelled from U+0100 on
_BYTE_OF = {chr(byte): byte for byte in range(256) if byte not in _HIDDEN}
_BYTE_OF |= {chr(256 + index): byte for index, byte in enumerate(_HIDDEN)}
_LATIN = {ord(character): chr(byte) for character, byte in _BYTE_OF.items()}
_LATIN |= {byte: "\uffff" for byte in _HIDDEN}  # what spells nothing must not become a byte


class BytePairs:
    """A tokenizer. `size` is the greatest id plus one, `special` are the ids that carry no text, `strips` says that a
    text's first space is the tokenizer's own and is dropped when decoding."""

    def __init__(self, config: dict, merges: Iterable[tuple[Sequence[str], Sequence[str]]]):
        model = config["model"]
        words.need(model, dropout=None, continuing_subword_prefix="", end_of_word_suffix="")
        vocab: dict[str, int] = model["vocab"]
        added = [words.added_token(entry) for entry in config.get("added_tokens") or ()]
        ids = [*vocab.values(), *(number for _, number, _, _ in added)]
        if not all(type(number) is int and 0 <= number < _MOST_IDS for number in ids):
            raise ValueError(f"a token id is not between 0 and {_MOST_IDS - 1}")
        if any(vocab.get(text, number) != number for text, number, _, _ in added):
            raise words.Unsupported
        self._normalize, spaceless = words.normalizer(config.get("normalizer"))
        self._cutter, self._byte_level = words.pre_tokenizer(config.get("pre_tokenizer"), spaceless)
        self.strips = words.decoder(config.get("decoder"), self._byte_level)
        self._before, self._after = words.template(config.get("post_processor"))
        self.size = max(ids, default=-1) + 1
        self.special = frozenset(number for _, number, special, _ in added if special)
        self._contents = {number: self._shown(text.encode()) for text, number, _, _ in added}
        self._plain = words.AddedTokens({text: number for text, number, _, late in added if not late})
        self._late = words.AddedTokens({self._normalize(text): number for text, number, _, late in added if late})
        self._vocabulary = _Vocabulary(vocab, self.size, self._byte_level)
        self._merges = _Merges(vocab, merges)
        self._whole = bool(model.get("ignore_merges"))  # a word that is a token is not merged from parts
        if self._byte_level:
            self._bytes = [self._vocabulary.find(bytes([byte])) for byte in range(256)]
        else:
            self._bytes = [vocab.get(f"<0x{byte:02X}>", -1) for byte in range(256)]
            if not model.get("byte_fallback") or -1 in self._bytes:
                raise words.Unsupported
        self._byte_of = {number: bytes([byte]) for byte, number in enumerate(self._bytes)}
        self._known: dict[str, tuple[int, ...]] = {}

    @classmethod
    def from_json(cls, data: bytes | memoryview) -> "BytePairs | None":
        """Reads a tokenizer.json; None where it is of a kind that this module does not take, or none at all.

        Raises BundleError for one that is damaged.
        """
        start = _MERGES.search(data)
        if start is None:
            return None
        blocks, end = [], start.end()
        while block := _BLOCK.match(data, end):
            blocks.append(block.span())
            end = block.end()
        try:
            config = json.loads(b"".join((data[: start.end()], data[end:])))
            if config["model"].get("merges") != [] or config["model"].get("type", "BPE") != "BPE":
                return None
            return cls(config, _pairs(data, blocks))
        except words.Unsupported:
            return None
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError) as error:
            why = f"{type(error).__name__}: {error}"[:200]
            raise BundleError("The tokenizer cannot be read.", why, "Convert the checkpoint again.") from None

    @property
    def nbytes(self) -> int:
        """Bytes of the tables, of the cache as if full, and of what reading the file leaves in the heap."""
        objects = 320 * len(self._contents) + 400 * _CACHED_WORDS + 16 * self.size  # measured
        return self._vocabulary.nbytes + self._merges.nbytes + objects

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Ids of a text; `special` adds what the tokenizer's own template puts before and after it."""
        ids = list(self._before) if special else []
        for piece, token in self._plain.split(text):
            for part, late in self._late.split(self._normalize(piece)) if piece else ():
                for word in self._cutter.words(part):
                    ids.extend(self._word(word))
                if late is not None:
                    ids.append(late)
            if token is not None:
                ids.append(token)
        return ids + self._after if special else ids

    def piece(self, number: int) -> bytes:
        """What a token adds to the text that it stands within; nothing for an id that is none."""
        if number in self._contents:
            return self._contents[number]
        if not 0 <= number < self.size:
            return b""
        byte = None if self._byte_level else self._byte_of.get(number)
        return byte or self._shown(self._vocabulary[number])

    def find(self, token: str) -> int | None:
        """The id of a token as the vocabulary writes it."""
        for added in (self._plain, self._late):
            if token in added.ids:
                return added.ids[token]
        number = self._vocabulary.find(spelled(token) if self._byte_level else token.encode())
        return None if number < 0 else number

    def _shown(self, token: bytes) -> bytes:
        return token if self._byte_level else token.replace("▁".encode(), b" ")

    def _word(self, word: str) -> tuple[int, ...]:
        known = self._known.get(word)
        if known is None:
            whole = self._vocabulary.find(word.encode()) if self._whole else -1
            known = (whole,) if whole >= 0 else tuple(self._merges.apply(self._symbols(word)))
            if len(word) <= _CACHED_LENGTH:
                if len(self._known) >= _CACHED_WORDS:
                    self._known.clear()
                self._known[word] = known
        return known

    def _symbols(self, word: str) -> list[int]:
        """What merging starts from: bytes, or characters and the bytes of those that are no token."""
        if self._byte_level:
            return [number for byte in word.encode() if (number := self._bytes[byte]) >= 0]
        symbols: list[int] = []
        for character in word:
            data = character.encode()
            number = self._vocabulary.find(data)
            symbols.extend((number,) if number >= 0 else (self._bytes[byte] for byte in data))
        return symbols


class _Vocabulary:
    """The tokens' bytes in one string, and their hashes in order, so that a token is found by bisection."""

    def __init__(self, vocab: dict[str, int], size: int, byte_level: bool):
        tokens = [b""] * size
        known = sorted(vocab.values())
        try:
            if not byte_level or len(set(known)) < len(known):
                raise UnicodeError
            # Every character is a byte: all tokens at once
            texts = sorted(vocab, key=vocab.__getitem__)
            data, end = "".join(texts).translate(_LATIN).encode("latin-1"), 0
            for number, length in zip(known, map(len, texts), strict=True):
                tokens[number] = data[end : (end := end + length)]
        except UnicodeError:
            known = []
            for text, number in vocab.items():
                token = spelled(text) if byte_level else text.encode()
                tokens[number] = text.encode() if token is None else token
                if token is not None:
                    known.append(number)
        self._data = b"".join(tokens)
        self._ends = np.fromiter(accumulate(map(len, tokens)), np.uint32, size).data
        hashes = np.fromiter(map(hash, map(tokens.__getitem__, known)), np.int64, len(known))
        order = np.argsort(hashes)
        self._hashes = hashes[order].data
        self._ids = np.array(known, np.int32)[order].data

    @property
    def nbytes(self) -> int:
        return len(self._data) + self._ends.nbytes + self._hashes.nbytes + self._ids.nbytes

    def __getitem__(self, number: int) -> bytes:
        return self._data[self._ends[number - 1] if number else 0 : self._ends[number]]

    def find(self, token: bytes | None) -> int:
        """The id of a token, -1 for none."""
        key = hash(token)
        place = bisect_right(self._hashes, key) - 1
        while place >= 0 and self._hashes[place] == key:
            if self[self._ids[place]] == token:
                return self._ids[place]
            place -= 1
        return -1


class _Merges:
    """Which pair of ids becomes which id, and which pair goes first: the lower rank, then the one further left."""

    def __init__(self, vocab: dict[str, int], merges: Iterable[tuple[Sequence[str], Sequence[str]]]):
        keys, made = [np.empty(0, np.int64)], [np.empty(0, np.int32)]
        number = vocab.__getitem__
        for lefts, rights in merges:
            left, right = (np.fromiter(map(number, side), np.int64, len(side)) for side in (lefts, rights))
            keys.append(left << 32 | right)
            made.append(np.fromiter(map(number, map(add, lefts, rights)), np.int32, len(lefts)))
        joined = np.concatenate(keys)
        order = np.argsort(joined, kind="stable")  # of a pair that is there twice the last counts
        self._keys = joined[order].data
        self._ranks = order.astype(np.int32).data
        self._made = np.concatenate(made).data

    @property
    def nbytes(self) -> int:
        return self._keys.nbytes + self._ranks.nbytes + self._made.nbytes

    def _rank(self, left: int, right: int) -> int:
        key = left << 32 | right
        place = bisect_right(self._keys, key) - 1
        return self._ranks[place] if place >= 0 and self._keys[place] == key else -1

    def apply(self, ids: list[int]) -> list[int]:
        """Merges until no pair is left that merges: O(n log n) for n symbols, whatever they are."""
        count = len(ids)
        if count < 2:
            return ids
        right = list(range(1, count + 1))  # of each symbol that lives, the next one
        left = list(range(-1, count - 1))
        ranks = [self._rank(a, b) for a, b in zip(ids, ids[1:], strict=False)] + [-1]
        queue = [rank << 32 | at for at, rank in enumerate(ranks) if rank >= 0]
        heapify(queue)
        while queue:
            item = heappop(queue)
            rank, at = item >> 32, item & 0xFFFFFFFF
            if ranks[at] != rank:
                continue  # one of the pair was merged with its other neighbour meanwhile
            gone = right[at]
            after, before = right[gone], left[at]
            ids[at], ids[gone], ranks[gone] = self._made[rank], -1, -1
            right[at], ranks[at] = after, -1
            if after < count:
                left[after] = at
                ranks[at] = self._rank(ids[at], ids[after])
                if ranks[at] >= 0:
                    heappush(queue, ranks[at] << 32 | at)
            if before >= 0:
                ranks[before] = self._rank(ids[before], ids[at])
                if ranks[before] >= 0:
                    heappush(queue, ranks[before] << 32 | before)
        return [number for number in ids if number >= 0]


def _pairs(data: bytes | memoryview, blocks: list[tuple[int, int]]) -> Iterator[tuple[Sequence[str], Sequence[str]]]:
    """The merges block by block, left sides and right sides. They are pairs or, in older files, texts with a space
    between. Raises ValueError for what is neither."""
    for start, end in blocks:
        merges = json.loads(b"[" + bytes(data[start:end]).rstrip(b", \t\r\n") + b"]")
        if merges:
            pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
            lefts, rights = zip(*pairs, strict=True)
            yield lefts, rights


def spelled(token: str) -> bytes | None:
    """The bytes of a byte-level token, which writes each byte as one visible character (Radford et al. 2019)."""
    try:
        return bytes(map(_BYTE_OF.__getitem__, token))
    except KeyError:
        return None
