"""From text to the words that byte-pair encoding works on, as a tokenizer.json says it.

A component of the file (added tokens, normalizer, pre-tokenizer, template, decoder) has one reader, which raises
`Unsupported` for a kind that is not known here exactly; values of a wrong type raise what Python raises, which the
caller turns into its own error. Characters are classed by Python's `unicodedata`, so letters that a newer Unicode added
may be cut elsewhere than by `tokenizers`. Nothing here knows ids other than those of added tokens.
"""

import re
import unicodedata
from collections.abc import Callable, Iterator

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_SPACES = {0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000}


class Unsupported(Exception):
    """A valid tokenizer.json of a kind that is not taken."""


class AddedTokens:
    """Tokens that are found in a text before anything else: at the leftmost place, the longest first."""

    def __init__(self, ids: dict[str, int]):
        self.ids = ids
        self._lengths: dict[str, list[int]] = {}
        for first in {text[0] for text in ids}:
            self._lengths[first] = sorted({len(text) for text in ids if text[0] == first}, reverse=True)
        self._first = re.compile("[" + "".join(map(re.escape, sorted(self._lengths))) + "]") if ids else None

    def split(self, text: str) -> Iterator[tuple[str, int | None]]:
        """(text, id of the token that follows it), the last with None."""
        at = 0
        for match in self._first.finditer(text) if self._first else ():
            start = match.start()
            if start < at:
                continue
            for length in self._lengths[text[start]]:
                number = self.ids.get(text[start : start + length])
                if number is not None:
                    yield text[at:start], number
                    at = start + length
                    break
        yield text[at:], None


class Cutter:
    """Cuts a text with patterns, one after the other; matches and what lies between them are words."""

    def __init__(self, patterns: list[re.Pattern]):
        self._patterns = patterns

    def words(self, text: str) -> Iterator[str]:
        shadow = text if text.isascii() else text.translate(_SHADOW)
        spans = [(0, len(text))] if text else []
        for pattern in self._patterns:
            spans = [part for start, end in spans for part in _isolate(pattern, shadow, start, end)]
        for start, end in spans:
            yield text[start:end]


class _Shadow(dict):
    """A text's shadow has an ASCII character of the same class for each one beyond ASCII, so that patterns about
    letters, digits and spaces, which Python's `re` cannot name there, run on it."""

    def __missing__(self, code: int) -> int:
        if code < 128:
            return code
        kind = unicodedata.category(chr(code))[0]
        # The long s is an s where case does not matter; no contraction has an x
        shadow = "S" if code == 0x17F else "\v" if code in _SPACES else {"L": "x", "N": "0"}.get(kind, "!")
        if len(self) < 1 << 12:
            self[code] = ord(shadow)
        return ord(shadow)


def _on_shadow(pattern: str) -> re.Pattern:
    pattern = re.sub(r"\[[^]]*\]", lambda found: found[0].replace(r"\p{L}", "A-Za-z").replace(r"\p{N}", "0-9"), pattern)
    return re.compile(pattern.replace(r"\p{L}", "[A-Za-z]").replace(r"\p{N}", "[0-9]"), re.ASCII)


_SHADOW = _Shadow()
# Only patterns that are known are run: one from outside could take for ever
_PATTERNS = {pattern: _on_shadow(pattern) for pattern in (_GPT2, _QWEN2, _LLAMA3)}


def _isolate(pattern: re.Pattern, text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    at = start
    for match in pattern.finditer(text, start, end):
        if match.start() > at:
            yield at, match.start()
        if match.end() > match.start():
            yield match.span()
        at = match.end()
    if at < end:
        yield at, end


# The components of a tokenizer.json --------------------------------------------------------------------------------


def need(config: dict, **values: object) -> None:
    """Raises Unsupported where an option is set to something else than `values`."""
    if any(config.get(name) not in (value, None) for name, value in values.items()):
        raise Unsupported


def _parts(config: dict | None, name: str) -> list[dict]:
    """What a component is made of; `name` is the key of a sequence."""
    if config is None:
        return []
    if config["type"] != "Sequence":
        return [config]
    return [part for inner in config[name] for part in _parts(inner, name)]


def added_token(entry: dict) -> tuple[str, int, bool, bool]:
    """(content, id, carries no text, is looked for in normalized text)."""
    content = entry["content"]
    if not isinstance(content, str) or not content:
        raise TypeError("an added token is not a text")
    need(entry, single_word=False, lstrip=False, rstrip=False)
    return content, entry["id"], bool(entry.get("special")), bool(entry.get("normalized"))


def normalizer(config: dict | None) -> tuple[Callable[[str], str], bool]:
    """The normalizer, and whether it leaves no spaces."""
    steps: list[Callable[[str], str]] = []
    parts = _parts(config, "normalizers")
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    for part in parts:
        if part == {"type": "NFC"}:
            steps.append(lambda text: unicodedata.normalize("NFC", text))
        elif part == spaces:
            steps.append(lambda text: text.replace(" ", "▁"))
        elif part == {"type": "Prepend", "prepend": "▁"}:
            steps.append(lambda text: "▁" + text if text else text)
        else:
            raise Unsupported

    def normalize(text: str) -> str:
        for step in steps:
            text = step(text)
        return text

    return normalize, spaces in parts


def pre_tokenizer(config: dict | None, spaceless: bool) -> tuple[Cutter, bool]:
    """How text is cut, and whether tokens spell bytes. Without spaces, cutting at spaces is no cut."""
    parts = _parts(config, "pretokenizers")
    if spaceless and all(part["type"] == "Split" and part["pattern"] == {"String": " "} for part in parts):
        return Cutter([]), False
    if not parts or parts[-1]["type"] != "ByteLevel" or parts[-1].get("add_prefix_space", True):
        raise Unsupported
    patterns = []
    for part in parts[:-1]:
        if part["type"] == "Digits":
            patterns.append(re.compile("[0-9]" if part["individual_digits"] else "[0-9]+"))
        elif part["type"] == "Split" and part["behavior"] == "Isolated" and part["pattern"].get("Regex") in _PATTERNS:
            need(part, invert=False)
            patterns.append(_PATTERNS[part["pattern"]["Regex"]])
        else:
            raise Unsupported
    if parts[-1].get("use_regex", True):
        patterns.append(_PATTERNS[_GPT2])
    return Cutter(patterns), True


def decoder(config: dict | None, byte_level: bool) -> bool:
    """Checks that decoding joins what tokens stand for; returns whether the first space of a text is dropped."""
    parts = _parts(config, "decoders")
    kinds = [part["type"] for part in parts]
    if kinds == (["ByteLevel"] if byte_level else ["Replace", "ByteFallback", "Fuse"]):
        return False
    if not byte_level and kinds == ["Replace", "ByteFallback", "Fuse", "Strip"] and parts[3]["start"] == 1:
        return True
    raise Unsupported


def template(config: dict | None) -> tuple[list[int], list[int]]:
    """Ids that go before and after a single text."""
    sides: tuple[list[int], list[int]] = ([], [])
    for part in _parts(config, "processors"):
        if part["type"] == "TemplateProcessing":
            after = False
            for item in part["single"]:
                if "Sequence" in item:
                    after = True
                else:
                    sides[after].extend(part["special_tokens"][item["SpecialToken"]["id"]]["ids"])
        elif part["type"] != "ByteLevel":  # that one changes offsets only
            raise Unsupported
    return sides
