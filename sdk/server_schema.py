"""What a request to the server may say: JSON bytes in, a frozen request out, or a refusal that names the parameter.

The shapes are those of the OpenAI API reference (chat completions, completions, embeddings) plus three extensions
(`top_k`, `min_p`, `repetition_penalty`). The rule is strict: a parameter that this server does not honour is refused
unless its value asks for what happens anyway, so no request is answered with less than it asked for. `null` is the
same as absent. This module knows nothing about HTTP, models or threads.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

from shoal.runtime.errors import UsageError

_DEPTH = 64  # nesting of a body; templates and JSON writers recurse
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_ANY = object()  # every value of this parameter asks for nothing


class RequestError(UsageError):
    """A request that is refused: `status` is HTTP's, `param` and `code` go into OpenAI's error object."""

    def __init__(self, param: str | None, code: str, why: str, fix: str, status: int = 400, retry_after: int = 0):
        super().__init__(f"Parameter {param!r} was refused." if param else "The request was refused.", why, fix)
        self.param, self.error_code, self.status, self.retry_after = param, code, status, retry_after


@dataclass(frozen=True)
class Options:
    """How to generate, for chat and plain completions alike. Ranges are checked; see `_options`."""

    model: str
    max_tokens: int | None  # None: as many as the context still holds
    stop: tuple[str, ...]
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    logit_bias: dict[int, float]
    seed: int | None
    n: int
    stream: bool
    include_usage: bool
    logprobs: int | None  # None: not wanted; otherwise the number of alternatives for each token


@dataclass(frozen=True)
class ChatRequest:
    """`messages` are plain dicts as chat templates read them: content is a string, arguments are objects."""

    options: Options
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    tool_choice: str  # "none", "auto", "required" or, after "function:", the name of the one to call
    parallel_tool_calls: bool
    schema: dict[str, Any] | None  # the answer's JSON schema; {} is any object; None is free text


@dataclass(frozen=True)
class CompletionRequest:
    """`prompts` holds strings or lists of token ids, one or more."""

    options: Options
    prompts: list[str | list[int]]


@dataclass(frozen=True)
class EmbeddingRequest:
    """`texts` holds 1 to 2048 non-empty strings."""

    model: str
    texts: list[str]
    base64: bool


def parse_body(body: bytes) -> dict[str, Any]:
    """The JSON object of an untrusted body: finite numbers, whole Unicode, at most 64 levels deep. RequestError."""

    def constant(name: str) -> float:
        raise ValueError(f"{name} is not JSON")

    try:
        value = json.loads(body, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        why = "It is nested too deeply" if isinstance(error, RecursionError) else f"It is not valid JSON: {error}"
        raise RequestError(None, "invalid_json", f"{why}.", "Send one JSON object.") from None
    if not isinstance(value, dict):
        raise RequestError(None, "invalid_json", "The body is not a JSON object.", "Send one JSON object.")
    for name, part in value.items():
        _check_tree(name, part)
    return value


def _check_tree(name: str, value: Any) -> None:
    """Walks without recursion, so depth is bounded before anything else recurses."""
    levels: list[Iterator[Any]] = [iter((name, value))]
    while levels:
        for item in levels[-1]:
            if isinstance(item, str):
                try:
                    item.encode()
                except UnicodeEncodeError:
                    why = "It holds half of a surrogate pair, which is not Unicode text."
                    raise RequestError(_printable(name), "invalid_value", why, "Send whole characters.") from None
            elif isinstance(item, list | dict):
                levels.append(iter(item if isinstance(item, list) else chain.from_iterable(item.items())))
                break
        else:
            levels.pop()
        if len(levels) > _DEPTH:
            raise RequestError(_printable(name), "invalid_value", f"It is nested deeper than {_DEPTH}.", "Flatten it.")


def _printable(name: str) -> str:
    return name.encode("utf-8", "replace").decode()[:80]


class Fields:
    """One JSON object whose values are taken by name; `end` refuses what nobody took."""

    def __init__(self, value: Any, where: str = ""):
        self.where = where
        if not isinstance(value, dict):
            raise self._wrong("", "an object", value)
        self._left: dict[str, Any] = dict(value)

    def path(self, name: str) -> str:
        """The name as it stands in `error.param`: messages[0].content."""
        return f"{self.where}.{name}" if self.where and name else self.where or name

    def refuse(self, name: str, why: str, fix: str = "Change it.", code: str = "invalid_value") -> RequestError:
        return RequestError(_printable(self.path(name)), code, why, fix)

    def _wrong(self, name: str, wanted: str, value: Any) -> RequestError:
        found = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", int: "an integer",
                 float: "a number", type(None): "null"}[type(value)]  # fmt: skip
        return self.refuse(name, f"It is {found}.", f"Send {wanted}.", "invalid_type")

    def take(self, name: str, default: Any = None) -> Any:
        """Any value; `default` where it is absent or null."""
        value = self._left.pop(name, None)
        return default if value is None else value

    def need(self, name: str) -> Any:
        value = self.take(name)
        if value is None:
            raise self.refuse(name, "It is missing.", "Add it.", "missing_required_parameter")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        value = self.need(name) if default is None else self.take(name, default)
        if not isinstance(value, str):
            raise self._wrong(name, "a string", value)
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.take(name, default)
        if not isinstance(value, bool):
            raise self._wrong(name, "a boolean", value)
        return value

    def integer(self, name: str, low: int, high: int, default: int) -> int:
        value = self.optional_integer(name, low, high)
        return default if value is None else value

    def optional_integer(self, name: str, low: int, high: int) -> int | None:
        value = self.take(name)
        if value is None:
            return None
        if type(value) is not int:
            raise self._wrong(name, "an integer", value)
        if not low <= value <= high:
            raise self.refuse(name, "It is out of range.", f"Send an integer from {low} to {high}.")
        return value

    def number(self, name: str, low: float, high: float, default: float) -> float:
        value = self.take(name, default)
        if type(value) not in (int, float):
            raise self._wrong(name, "a number", value)
        if not (low <= value <= high and math.isfinite(value)):
            raise self.refuse(name, "It is out of range.", f"Send a number from {low:g} to {high:g}.")
        return float(value)

    def choice(self, name: str, options: Iterable[str], default: str | None = None) -> str:
        value = self.text(name, default)
        if value not in options:
            raise self.refuse(name, f"{value[:40]!r} is not supported.", f"Send one of: {', '.join(options)}.")
        return value

    def items(self, name: str, most: int, least: int = 0, required: bool = False) -> list[Any]:
        value = self.need(name) if required else self.take(name, [])
        if not isinstance(value, list):
            raise self._wrong(name, "an array", value)
        if not (least if required else 0) <= len(value) <= most:
            raise self.refuse(name, f"It has {len(value)} entries.", f"Send {least} to {most} entries.")
        return value

    def object(self, name: str, required: bool = False) -> dict[str, Any] | None:
        value = self.need(name) if required else self.take(name)
        if value is not None and not isinstance(value, dict):
            raise self._wrong(name, "an object", value)
        return value

    def strings(self, name: str, most: int, required: bool = False) -> list[str]:
        """A string or an array of strings, none of them empty."""
        value = self.need(name) if required else self.take(name, [])
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(item, str) for item in values):
            raise self._wrong(name, "a string or an array of strings", value)
        if len(values) > most or (required and not values) or not all(values):
            raise self.refuse(name, f"It has {len(values)} entries or an empty one.", f"Send 1 to {most} texts.")
        return values

    def end(self, idle: dict[str, Any] | None = None) -> None:
        """Refuses every name left. `idle` lists known parameters with the values that change nothing."""
        for name, value in self._left.items():
            if idle is None or name not in idle:
                raise self.refuse(name, "It is unknown.", "Remove it.", "unknown_parameter")
            if value is not None and idle[name] is not _ANY and value not in idle[name]:
                raise self.refuse(name, "This server does not support it.", "Remove it.", "unsupported_parameter")


_IDLE = {"user": _ANY, "metadata": _ANY}
_IDLE_CHAT = {
    **_IDLE, "safety_identifier": _ANY, "prompt_cache_key": _ANY, "store": (False,), "modalities": (["text"],),
    "service_tier": ("auto", "default"), "audio": (), "function_call": ("none",), "functions": ([],),
    "moderation": (), "prediction": (), "prompt_cache_options": (), "prompt_cache_retention": (),
    "reasoning_effort": ("none",), "verbosity": (), "web_search_options": (),
}  # fmt: skip
_IDLE_COMPLETION = {**_IDLE, "best_of": (1,), "echo": (False,), "suffix": ("",)}
_IDLE_EMBEDDING = {"user": _ANY, "dimensions": ()}


def _options(fields: Fields, logprobs: int | None, max_tokens: int | None) -> Options:
    stream = fields.flag("stream")
    include_usage = False
    if (raw := fields.object("stream_options")) is not None:
        if not stream:
            raise fields.refuse("stream_options", "It only goes with 'stream': true.", "Remove it.")
        inner = Fields(raw, "stream_options")
        include_usage = inner.flag("include_usage")
        inner.end({"include_obfuscation": (False,)})
    return Options(
        model=fields.text("model"),
        max_tokens=max_tokens,
        stop=tuple(fields.strings("stop", 16)),
        temperature=fields.number("temperature", 0, 2, 1),
        top_p=fields.number("top_p", 0, 1, 1),
        top_k=fields.integer("top_k", 0, 1 << 30, 0),
        min_p=fields.number("min_p", 0, 1, 0),
        repetition_penalty=fields.number("repetition_penalty", 0.01, 10, 1),
        frequency_penalty=fields.number("frequency_penalty", -2, 2, 0),
        presence_penalty=fields.number("presence_penalty", -2, 2, 0),
        logit_bias=_bias(fields),
        seed=fields.optional_integer("seed", -(1 << 63), (1 << 63) - 1),
        n=fields.integer("n", 1, 128, 1),
        stream=stream,
        include_usage=include_usage,
        logprobs=logprobs,
    )


def _bias(fields: Fields) -> dict[int, float]:
    raw = fields.object("logit_bias") or {}
    if len(raw) > 1024:
        raise fields.refuse("logit_bias", "It has more than 1024 entries.", "Send fewer.")
    inner = Fields(raw, "logit_bias")
    for wrong in (key for key in raw if not re.fullmatch(r"[0-9]{1,9}", key)):
        raise inner.refuse(wrong, "The key is not a token id.", "Use token ids as keys.")
    return {int(key): inner.number(key, -100, 100, 0) for key in raw}


def parse_chat(raw: dict[str, Any]) -> ChatRequest:
    """A body of /v1/chat/completions. RequestError."""
    fields = Fields(raw)
    wanted, top = fields.flag("logprobs"), fields.optional_integer("top_logprobs", 0, 20)
    if top is not None and not wanted:
        raise fields.refuse("top_logprobs", "It only goes with 'logprobs': true.", "Remove it or add that.")
    longest, old = (fields.optional_integer(name, 1, 1 << 30) for name in ("max_completion_tokens", "max_tokens"))
    if longest is not None and old is not None:
        raise fields.refuse("max_tokens", "'max_completion_tokens' is there too.", "Send one of the two.")
    options = _options(fields, (top or 0) if wanted else None, longest if longest is not None else old)
    tools = [_tool(entry, f"tools[{i}]") for i, entry in enumerate(fields.items("tools", 128))]
    choice = _tool_choice(fields, [tool["function"]["name"] for tool in tools])
    parallel = fields.flag("parallel_tool_calls", True)
    schema = _response_format(fields)
    if schema is not None and tools and choice != "none":
        raise fields.refuse("response_format", "An answer is either JSON or a tool call.", "Remove it or 'tools'.")
    messages = fields.items("messages", 1 << 16, 1, required=True)
    fields.end(_IDLE_CHAT)
    chat = [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
    return ChatRequest(options, chat, tools, choice, parallel, schema)


def _message(raw: Any, where: str) -> dict[str, Any]:
    fields = Fields(raw, where)
    role = fields.choice("role", ("system", "developer", "user", "assistant", "tool"))
    message: dict[str, Any] = {"role": "system" if role == "developer" else role}
    content = fields.take("content")
    calls = fields.items("tool_calls", 128) if role == "assistant" else []
    if content is None and not calls:
        raise fields.refuse("content", "It is missing.", "Add it.", "missing_required_parameter")
    if isinstance(content, list):
        content = "\n".join(_text_part(part, f"{where}.content[{i}]") for i, part in enumerate(content))
    elif not isinstance(content, str | None):
        raise fields.refuse("content", "It is no text.", "Send a string or an array of text parts.", "invalid_type")
    message["content"] = content or ""
    if calls:
        message["tool_calls"] = [_past_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]
    if role == "tool":
        message["tool_call_id"] = fields.text("tool_call_id")
    if name := fields.text("name", ""):
        message["name"] = name
    fields.end({"refusal": (), "audio": (), "function_call": ()} if role == "assistant" else None)
    return message


def _text_part(raw: Any, where: str) -> str:
    fields = Fields(raw, where)
    fields.choice("type", ("text",))
    text = fields.text("text")
    fields.end()
    return text


def _past_call(raw: Any, where: str) -> dict[str, Any]:
    fields = Fields(raw, where)
    identity = fields.text("id", "")
    fields.choice("type", ("function",), "function")
    inner = Fields(fields.object("function", required=True), f"{where}.function")
    name, arguments = inner.text("name"), inner.text("arguments", "{}")
    inner.end()
    fields.take("index")  # what a client that folded stream deltas sends back
    fields.end()
    try:
        value = json.loads(arguments)
        _check_tree(f"{where}.function.arguments", value)
    except (ValueError, RecursionError):
        raise inner.refuse("arguments", "It is not a JSON text.", "Send the call's arguments back.") from None
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": value}}


def _tool(raw: Any, where: str) -> dict[str, Any]:
    fields = Fields(raw, where)
    fields.choice("type", ("function",))
    inner = Fields(fields.object("function", required=True), f"{where}.function")
    fields.end()
    function: dict[str, Any] = {"name": inner.text("name")}
    if not _NAME.fullmatch(function["name"]):
        raise inner.refuse("name", "It is not a function name.", "Use 1 to 64 of a-z, A-Z, 0-9, _ and -.")
    if description := inner.text("description", ""):
        function["description"] = description
    function["parameters"] = inner.object("parameters") or {"type": "object", "properties": {}}
    inner.flag("strict")
    inner.end()
    return {"type": "function", "function": function}


def _tool_choice(fields: Fields, names: list[str]) -> str:
    if len(set(names)) != len(names):
        raise fields.refuse("tools", "Two tools have one name.", "Rename one.")
    value = fields.take("tool_choice", "auto" if names else "none")
    if isinstance(value, dict):
        outer = Fields(value, "tool_choice")
        outer.choice("type", ("function",))
        inner = Fields(outer.object("function", required=True), "tool_choice.function")
        name = inner.text("name")
        inner.end()
        outer.end()
        if name not in names:
            raise inner.refuse("name", "No tool has this name.", "Name one of 'tools'.")
        return f"function:{name}"
    if value not in ("none", "auto", "required"):
        raise fields.refuse("tool_choice", "It is not supported.", "Send none, auto, required or a named function.")
    if value == "required" and not names:
        raise fields.refuse("tool_choice", "There are no 'tools' to call.", "Add 'tools'.")
    return value


def _response_format(fields: Fields) -> dict[str, Any] | None:
    raw = fields.object("response_format")
    if raw is None:
        return None
    outer = Fields(raw, "response_format")
    kind = outer.choice("type", ("text", "json_object", "json_schema"))
    schema: dict[str, Any] | None = {} if kind == "json_object" else None
    if kind == "json_schema":
        inner = Fields(outer.object("json_schema", required=True), "response_format.json_schema")
        if not _NAME.fullmatch(inner.text("name")):
            raise inner.refuse("name", "It is not a name.", "Use 1 to 64 of a-z, A-Z, 0-9, _ and -.")
        inner.text("description", "")
        inner.flag("strict")
        schema = inner.object("schema", required=True)
        inner.end()
    outer.end()
    return schema


def parse_completion(raw: dict[str, Any]) -> CompletionRequest:
    """A body of /v1/completions. RequestError."""
    fields = Fields(raw)
    logprobs = fields.optional_integer("logprobs", 0, 20)
    options = _options(fields, logprobs, fields.integer("max_tokens", 1, 1 << 30, 16))
    prompt = fields.need("prompt")
    fields.end(_IDLE_COMPLETION)
    one = isinstance(prompt, str) or (isinstance(prompt, list) and prompt and type(prompt[0]) is int)
    prompts = [prompt] if one else prompt
    if not isinstance(prompts, list) or not 1 <= len(prompts) <= 128 or not all(map(_is_prompt, prompts)):
        raise fields.refuse("prompt", "It is no text.", "Send a string, token ids, or an array of either.")
    return CompletionRequest(options, prompts)


def _is_prompt(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and bool(value) and all(type(i) is int for i in value))


def parse_embedding(raw: dict[str, Any]) -> EmbeddingRequest:
    """A body of /v1/embeddings. RequestError."""
    fields = Fields(raw)
    model, texts = fields.text("model"), fields.strings("input", 2048, required=True)
    base64 = fields.choice("encoding_format", ("float", "base64"), "float") == "base64"
    fields.end(_IDLE_EMBEDDING)
    return EmbeddingRequest(model, texts, base64)
