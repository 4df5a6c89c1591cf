"""Tool calls in the form that Hermes, Qwen and SmolLM models are trained on:

    <tool_call>
    {"name": "weather", "arguments": {"city": "Kiel"}}
    </tool_call>

`ToolCallParser` finds them in an answer as it streams; `call_schema` and `call_grammar` are for a constraint that makes
an answer nothing but calls. It knows nothing about templates, tokens or models.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import UsageError
from .stop import overlap

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_SPACE = " \t\r\n"
# What may yet become an answer of nothing but calls: JSON, bare or in a code fence, or the beginning of that
_BARE = re.compile(r"\s*(?:`{0,2}|(?:```(?:j|js|jso|json)?\s*)?(?:[\[{].*)?)", re.DOTALL)
_FENCED = re.compile(r"```(?:json)?\s*([\[{].*?)\s*(?:```)?", re.DOTALL)


@dataclass(frozen=True)
class ToolCall:
    """What a model wants called."""

    name: str
    arguments: dict[str, Any]


class ToolCallParser:
    """Splits an answer that comes in pieces into text and calls; the outcome does not depend on where they are cut.

    `names` are the tools there are; a call of another, or one that is not JSON, is text. Between the tags may be a list
    of calls. An answer that begins as JSON, bare or in a code fence, is held to its end: small models leave the tags
    out, and those trained on code write a fence instead.
    """

    def __init__(self, names: Sequence[str]):
        self._names = frozenset(names)
        self._held = ""
        self._begun = False  # something came that was not white space
        self._called = False  # a call came last: white space after it is not text

    def push(self, text: str) -> tuple[str, list[ToolCall]]:
        """(text that is certainly text, calls that are complete) after one more piece."""
        self._held += text
        return self._advance(final=False)

    def flush(self) -> tuple[str, list[ToolCall]]:
        """The rest, at the end of the answer. A call whose closing tag is missing counts."""
        if not self._begun and (calls := self._calls(self._held)):
            self._held = ""
            return "", calls
        self._begun = True
        return self._advance(final=True)

    def _advance(self, final: bool) -> tuple[str, list[ToolCall]]:
        shown, calls = "", []
        while self._begun or not _BARE.fullmatch(self._held):
            self._begun = True
            start = self._held.find(OPEN)
            if start < 0:
                shown += self._take(len(self._held) - (0 if final else overlap(self._held, OPEN)))
                break
            shown += self._take(start)
            found = self._enclosed(final)
            if found is None:
                break
            end, made = found
            if made:
                self._held, self._called = self._held[end:], True
                calls += made
            else:
                shown += self._take(end)
        return shown, calls

    def _enclosed(self, final: bool) -> tuple[int, list[ToolCall]] | None:
        """Where the enclosed part that `_held` begins with ends, and its calls; None while that is open."""
        body = self._held[len(OPEN) :]
        stop = first = body.find(CLOSE)
        while stop >= 0:
            end = len(OPEN) + stop + len(CLOSE)
            try:
                return end, self._made(json.loads(body[:stop]))
            except (ValueError, RecursionError) as error:
                if not str(error).startswith("Unterminated string"):
                    return end, []
            stop = body.find(CLOSE, stop + 1)  # that closing tag was in a string
        if not final:
            return None
        try:
            value, end = _DECODER.raw_decode(body, len(body) - len(body.lstrip(_SPACE)))
        except (ValueError, RecursionError):
            return len(OPEN) + (first + len(CLOSE) if first >= 0 else 0), []
        return len(OPEN) + end, self._made(value)

    def _calls(self, text: str) -> list[ToolCall]:
        """The calls that a whole answer is, one JSON value after the other; none where anything else is in it."""
        rest, calls = text.strip(_SPACE), []
        if fenced := _FENCED.fullmatch(rest):
            rest = fenced[1]
        while rest:
            try:
                value, stop = _DECODER.raw_decode(rest)
            except (ValueError, RecursionError):
                return []
            if not (made := self._made(value)):
                return []
            calls += made
            rest = rest[stop:].lstrip(_SPACE)
        return calls

    def _made(self, value: Any) -> list[ToolCall]:
        """The calls that a JSON value is; none where any part of it is something else."""
        calls = []
        for item in value if isinstance(value, list) else [value]:
            name = item.get("name") if isinstance(item, dict) else None
            arguments = item.get("arguments", item.get("parameters", {})) if isinstance(item, dict) else None
            if isinstance(arguments, str):  # some models quote them twice
                try:
                    arguments = json.loads(arguments or "{}")
                except (ValueError, RecursionError):
                    return []
            if not isinstance(name, str) or name not in self._names or not isinstance(arguments, dict):
                return []
            calls.append(ToolCall(name, arguments))
        return calls

    def _take(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        if self._called:
            text = text.lstrip(_SPACE)
            self._called = not text
        return text


_DECODER = json.JSONDecoder()
# The white space that json.dumps prints, and models are trained on
_PRINTED = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def call_schema(tools: Sequence[dict], name: str | None = None) -> dict[str, Any]:
    """The JSON schema of one call, of any of `tools` (in OpenAI's form) or of the one called `name`.

    Raises UsageError where there is no such tool.
    """
    forms, definitions = [], {}
    for index, tool in enumerate(tools):
        function = tool["function"]
        if name not in (None, function["name"]):
            continue
        key = f"tool{index}"  # each tool's schema moves whole, so what it refers to moves along
        definitions[key] = _moved(function.get("parameters") or {"type": "object"}, f"#/$defs/{key}")
        properties = {"name": {"const": function["name"]}, "arguments": {"$ref": f"#/$defs/{key}"}}
        forms.append(
            {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
        )
    if not forms:
        what = "There are no tools." if name is None else f"There is no tool {name!r:.60}."
        raise UsageError(what, "An answer that must be a call needs one.", "Name one of the tools.")
    return {**(forms[0] if len(forms) == 1 else {"anyOf": forms}), "$defs": definitions}


def call_grammar(tools: Sequence[dict], name: str | None = None, parallel: bool = False) -> str:
    """A Lark grammar of a call within its tags, or with `parallel` of one or more."""
    schema = json.dumps(call_schema(tools, name) | {"x-guidance": _PRINTED})
    one = f'one: "{OPEN}\\n" call "\\n{CLOSE}"\ncall: %json {schema}\n'
    return ('start: one ("\\n" one)*\n' if parallel else "start: one\n") + one


def _moved(schema: Any, root: str) -> Any:
    """A schema that lies at `root` of a document instead of being one."""
    if isinstance(schema, list):
        return [_moved(item, root) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: root + value[1:]
        if key == "$ref" and isinstance(value, str) and value.startswith("#")
        else _moved(value, root)
        for key, value in schema.items()
    }
