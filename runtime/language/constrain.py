"""Answers that obey a grammar: llguidance as a mask over logits.

A `Constrainer` holds what belongs to a model's vocabulary (a trie of its token bytes, about 100 bytes a token, made at
first use) and is shared; a `Constraint` is one answer's state and cheap. What a grammar cannot say is refused when it
is given, not while it runs. It knows nothing about sampling, chats or tools.
"""

import json
from collections.abc import Iterable
from typing import Any

import numpy as np

from ..errors import MissingPackageError, UsageError
from .tokens import Tokenizer

_LONGEST = 1 << 20  # characters of a grammar
# Between JSON's parts a space, or a line break and what indents the next line: as people print it. Left free, a small
# model spends its tokens on empty lines and answers worse, or goes on with them for ever
_JSON: Any = {"whitespace_pattern": r" |\n {0,24}|\n\t{0,12}"}


class Constraint:
    """One answer's grammar. Before each token `mask` the logits, then `accept` what was chosen, until `finished`."""

    def __init__(self, matcher, vocab: int):
        self._matcher, self._vocab = matcher, vocab
        self._bits = np.zeros(-(-vocab // 32), np.int32)

    @property
    def finished(self) -> bool:
        """Whether the answer is complete and nothing may follow."""
        return self._matcher.is_stopped()

    @property
    def complete(self) -> bool:
        """Whether the answer may end here; more may follow."""
        return self._matcher.is_accepting()

    def mask(self, logits: np.ndarray) -> None:
        """Sets the logits [vocab] of tokens that the grammar does not allow next to minus infinity, in place.

        The tokens that end an answer are allowed where it may end. Raises UsageError where `logits` is of another
        shape and where the grammar proves too complex to follow.
        """
        if logits.shape != (self._vocab,):
            raise UsageError(
                "The constraint does not fit the logits.", f"They are {logits.shape}.", f"Give {self._vocab}."
            )
        self._allow()
        allowed = np.unpackbits(self._bits.view(np.uint8), count=self._vocab, bitorder="little")
        np.copyto(logits, -np.inf, where=allowed == 0)

    def _allow(self) -> None:
        """Finds the tokens that may come next, a bit each."""
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        if self._matcher.is_error():
            why = f"It leads nowhere or is too complex ({_reason(self._matcher.get_error())})."
            raise UsageError("The grammar cannot be followed.", why, "Correct or simplify it.")

    def accept(self, token: int) -> None:
        """Takes the token that was chosen. Raises UsageError for one that the grammar does not allow."""
        if not self._matcher.consume_token(token):
            why = _reason(self._matcher.get_error())
            raise UsageError(f"Token {token} does not fit the constraint.", why, "Mask the logits before choosing.")


class Constrainer:
    """Makes constraints for one model: `vocab` logits, `ends` the ids that end an answer.

    Raises MissingPackageError without llguidance. Any thread may call it.
    """

    def __init__(self, tokenizer: Tokenizer, vocab: int, ends: Iterable[int]):
        try:
            import llguidance
        except ImportError as error:
            raise MissingPackageError(
                "Constrained answers need a package that is not here.",
                str(error),
                "Run: pip install 'shoal[structured]'",
            ) from None
        self._vocab, self._package = vocab, llguidance
        words = _Vocabulary(tokenizer, vocab, [end for end in ends if 0 <= end < vocab])
        wrapped = llguidance.TokenizerWrapper(words)
        # Slices make rare masks of wide grammars faster, for twice the memory: not worth it here
        self._tokens = llguidance.LLTokenizer(wrapped, n_vocab=vocab, eos_token=words.ends, slices=[])
        del words.tokens, wrapped.tokens

    def constrain(
        self, *, json_schema: "dict | str | None" = None, regex: str | None = None, lark: str | None = None,
        json_object: bool = False,
    ) -> Constraint:  # fmt: skip
        """A constraint for one answer: a JSON schema (as dict or text), a regular expression for the whole answer, a
        grammar in llguidance's Lark dialect, or any JSON object. Raises UsageError with the reason where it is wrong.
        """
        given = [
            name
            for name, value in (("json_schema", json_schema), ("regex", regex), ("lark", lark))
            if value is not None
        ]
        given += ["json_object"] * bool(json_object)
        if len(given) != 1:
            why = f"Given are {', '.join(given) or 'none'}."
            raise UsageError("A constraint is of one kind.", why, "Give json_schema, regex, lark or json_object.")
        matcher = self._package.LLMatcher
        what = f"The {given[0]} cannot be used."
        try:
            if regex is not None:
                grammar = matcher.grammar_from_regex(_checked("regex", regex))
            elif lark is not None:
                grammar = matcher.grammar_from_lark(_checked("lark", lark))
            else:
                schema = '{"type": "object"}' if json_schema is None else _schema(json_schema)
                grammar = matcher.grammar_from_json_schema(schema, defaults=_JSON)
        except ValueError as error:  # nested deeper than the package's own reader goes
            raise UsageError(what, _reason(str(error)), "Simplify it.") from None
        made = matcher(self._tokens, grammar, log_level=0, limits=self._package.LLParserLimits(verbose_errors=False))
        if made.is_error():
            raise UsageError(what, _reason(made.get_error()), "Correct or simplify it.")
        constraint = Constraint(made, self._vocab)
        constraint._allow()  # what leads nowhere (a schema that is its own $ref) is found here, not at the first token
        return constraint


class _Vocabulary:
    """The tokenizer as llguidance reads it."""

    def __init__(self, tokenizer: Tokenizer, vocab: int, ends: list[int]):
        self._tokenizer = tokenizer
        self.ends = ends or [vocab - 1]  # it must have one
        self.eos_token_id, self.bos_token_id = self.ends[0], None
        self.tokens = [tokenizer.token_bytes(number) for number in range(vocab)]
        self.special_token_ids = sorted(number for number in {*tokenizer.special, *self.ends} if number < vocab)

    def __call__(self, text: "bytes | str") -> list[int]:
        return self._tokenizer.encode(text if isinstance(text, str) else text.decode("utf-8", "replace"), special=False)


def _schema(schema: "dict | str") -> str:
    try:
        text = schema if isinstance(schema, str) else json.dumps(schema)
        if isinstance(json.loads(_checked("json_schema", text)), dict):
            return text
    except (ValueError, TypeError, RecursionError) as error:
        raise UsageError("The json_schema cannot be used.", str(error)[:300], "Give a JSON schema.") from None
    raise UsageError("The json_schema cannot be used.", "It is no JSON object.", "Give a JSON schema.")


def _checked(name: str, text: object) -> str:
    if not isinstance(text, str) or not text or len(text) > _LONGEST:
        raise UsageError(f"The {name} cannot be used.", f"It is no text of 1 to {_LONGEST} characters.", "Correct it.")
    return text


def _reason(message: str) -> str:
    return " ".join(message.split())[:300] or "no reason is known"
