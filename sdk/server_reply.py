"""Answers in OpenAI's shapes: tokens in, JSON objects out, whole or as the chunks of a stream.

An `Answer` is one choice as it grows; a `Form` wraps answers for one of the two endpoints. Both shapes come from the
same pieces, so a streamed answer says what a whole one says. It knows nothing about HTTP, threads or models.
"""

import json
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from shoal.runtime.language.tools import ToolCall, ToolCallParser

_LOWEST = -9999.0  # JSON has no infinity; OpenAI writes this one


@dataclass(frozen=True)
class Piece:
    """What one step adds to an answer."""

    text: str = ""
    calls: tuple[ToolCall, ...] = ()
    entry: dict[str, Any] | None = None  # the token's log probability

    def __bool__(self) -> bool:
        return bool(self.text or self.calls or self.entry)


@dataclass
class Answer:
    """One choice. `calls` is there where tools may be called, `describe` where log probabilities are wanted."""

    index: int
    reader: ToolCallParser | None = None
    parallel: bool = True
    describe: Callable[[Any], dict[str, Any] | None] | None = None
    text: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    entries: list[dict[str, Any]] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    begun: bool = False
    finish: str | None = None

    def push(self, token: Any) -> Piece:
        """Takes a runtime Token."""
        self.begun = True
        entry = self.describe(token) if self.describe else None
        text, calls = self.reader.push(token.text) if self.reader else (token.text, [])
        return self._add(text, calls, entry)

    def end(self, stats: Any) -> Piece:
        """Takes a runtime Stats: the last piece, and the reason it ended."""
        piece = self._add(*self.reader.flush(), None) if self.reader else Piece()
        self.prompt_tokens, self.cached_tokens = stats.prompt_tokens, stats.reused_tokens
        self.generated_tokens = stats.generated_tokens
        self.finish = "tool_calls" if self.calls and stats.finish != "length" else stats.finish
        return piece

    @property
    def complete(self) -> bool:
        """Nothing more is wanted: the one call that was allowed is made."""
        return bool(self.calls) and not self.parallel

    def _add(self, text: str, calls: Sequence[ToolCall], entry: dict[str, Any] | None) -> Piece:
        if self.complete:
            return Piece()
        calls = calls if self.parallel else calls[:1]
        piece = Piece(text, tuple(calls), entry)
        self.text += text
        self.calls += calls
        self.entries += [entry] if entry else []
        return piece


def usage(answers: Sequence[Answer], n: int) -> dict[str, Any]:
    """Token counts; a prompt that was answered `n` times counts once."""
    prompt = sum(answer.prompt_tokens for answer in answers[::n])
    generated = sum(answer.generated_tokens for answer in answers)
    return {
        "prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": sum(answer.cached_tokens for answer in answers[::n])},
    }  # fmt: skip


def entry(token: Any, token_bytes: Callable[[int], bytes]) -> dict[str, Any]:
    """A token's log probability and those of the likeliest, as chat completions write them."""

    def one(identity: int, logprob: float) -> dict[str, Any]:
        raw = token_bytes(identity)
        return {"token": raw.decode("utf-8", "replace"), "logprob": max(float(logprob), _LOWEST), "bytes": list(raw)}

    return {**one(token.id, token.logprob), "top_logprobs": [one(*pair) for pair in token.top]}


class ChatForm:
    """chat.completion and chat.completion.chunk."""

    whole_object, chunk_object = "chat.completion", "chat.completion.chunk"

    def __init__(self, logprobs: bool):
        self._logprobs = logprobs
        self.prefix = "chatcmpl-"

    def opening(self, answer: Answer) -> dict[str, Any] | None:
        return self._choice(answer, {"role": "assistant", "content": ""})

    def piece(self, answer: Answer, piece: Piece) -> dict[str, Any]:
        delta: dict[str, Any] = {"content": piece.text} if piece.text or not piece.calls else {}
        if piece.calls:
            first = len(answer.calls) - len(piece.calls)
            delta["tool_calls"] = [{"index": first + i, **_call(call)} for i, call in enumerate(piece.calls)]
        choice = self._choice(answer, delta)
        if piece.entry:
            choice["logprobs"] = {"content": [piece.entry], "refusal": None}
        return choice

    def closing(self, answer: Answer) -> dict[str, Any]:
        return {**self._choice(answer, {}), "finish_reason": answer.finish}

    def whole(self, answer: Answer) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
        if answer.calls:
            message["content"] = answer.text or None
            message["tool_calls"] = [_call(call) for call in answer.calls]
        logprobs = {"content": answer.entries, "refusal": None} if self._logprobs else None
        return {"index": answer.index, "message": message, "logprobs": logprobs, "finish_reason": answer.finish}

    def _choice(self, answer: Answer, delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": answer.index, "delta": delta, "logprobs": None, "finish_reason": None}


class CompletionForm:
    """text_completion, whole and in chunks."""

    whole_object = chunk_object = "text_completion"

    def __init__(self, logprobs: bool):
        self._logprobs = logprobs
        self.prefix = "cmpl-"

    def opening(self, answer: Answer) -> dict[str, Any] | None:
        return None

    def piece(self, answer: Answer, piece: Piece) -> dict[str, Any]:
        before = sum(len(entry["token"]) for entry in answer.entries[: -1 if piece.entry else None])
        return self._choice(answer, piece.text, [piece.entry] if piece.entry else [], before, None)

    def closing(self, answer: Answer) -> dict[str, Any]:
        return self._choice(answer, "", [], 0, answer.finish)

    def whole(self, answer: Answer) -> dict[str, Any]:
        return self._choice(answer, answer.text, answer.entries if self._logprobs else [], 0, answer.finish)

    def _choice(self, answer: Answer, text: str, entries: list, offset: int, finish: str | None) -> dict[str, Any]:
        logprobs = None
        if entries:
            offsets = []
            for item in entries:
                offsets.append(offset)
                offset += len(item["token"])
            logprobs = {
                "tokens": [item["token"] for item in entries],
                "token_logprobs": [item["logprob"] for item in entries],
                "top_logprobs": [{top["token"]: top["logprob"] for top in item["top_logprobs"]} for item in entries],
                "text_offset": offsets,
            }
        return {"index": answer.index, "text": text, "logprobs": logprobs, "finish_reason": finish}


Form = ChatForm | CompletionForm


class Envelope:
    """What all objects of one response share: its id, its time, its model."""

    def __init__(self, form: Form, model: str, fingerprint: str):
        self.form = form
        self._fields = {
            "id": form.prefix + secrets.token_hex(12), "created": int(time.time()), "model": model,
            "system_fingerprint": fingerprint,
        }  # fmt: skip

    def chunk(self, *choices: dict[str, Any], counts: dict[str, Any] | None = None, counted: bool = False) -> dict:
        """One event of a stream; `counted` streams carry `usage` in every chunk, null but in the last."""
        return {
            "object": self.form.chunk_object,
            **self._fields,
            "choices": choices,
            **({"usage": counts} if counted else {}),
        }

    def whole(self, answers: Sequence[Answer], counts: dict[str, Any]) -> dict[str, Any]:
        choices = [self.form.whole(answer) for answer in answers]
        return {"object": self.form.whole_object, **self._fields, "choices": choices, "usage": counts}


def _call(call: ToolCall) -> dict[str, Any]:
    return {"id": "call_" + secrets.token_hex(12), "type": "function",
            "function": {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)}}  # fmt: skip
