"""Tool calls as text: how a model is told about tools, and how its calls are found in what it writes.

The form is the Hermes one that Qwen, SmolLM and many others are trained on: `<tool_call>{"name": …, "arguments":
{…}}</tool_call>`. A chat template that knows `tools` renders them itself; for one that does not, `without_tools` says
the same in a system message. Pure functions over values: it knows nothing about HTTP or models.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"

_INSTRUCTIONS = """# Tools

You may call one or more functions. You are provided with function signatures within <tools></tools> XML tags:
<tools>
{signatures}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


@dataclass(frozen=True)
class Call:
    """One call: `arguments` is a JSON text, as OpenAI sends it."""

    name: str
    arguments: str


def knows_tools(template: str) -> bool:
    """Whether a Jinja chat template reads `tools`."""
    return re.search(r"\btools\b", template) is not None


def without_tools(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same conversation for a template that knows neither tools, nor calls, nor the role of their results."""
    plain: list[dict[str, Any]] = []
    for message in messages:
        content = message["content"]
        for call in message.get("tool_calls", ()):
            body = json.dumps(call["function"], ensure_ascii=False)
            content += f"\n{_OPEN}\n{body}\n{_CLOSE}" if content else f"{_OPEN}\n{body}\n{_CLOSE}"
        if message["role"] == "tool":
            plain.append({"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"})
        else:
            plain.append({"role": message["role"], "content": content})
    if tools:
        lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        text = _INSTRUCTIONS.format(signatures=lines)
        if plain and plain[0]["role"] == "system":
            plain[0] = {"role": "system", "content": f"{plain[0]['content']}\n\n{text}"}
        else:
            plain.insert(0, {"role": "system", "content": text})
    return plain


def call_schema(tools: list[dict[str, Any]], choice: str) -> dict[str, Any]:
    """The JSON schema of exactly one call: of any tool for "required", of one for "function:NAME"."""
    wanted = choice.removeprefix("function:") if choice.startswith("function:") else None
    forms, definitions = [], {}
    for function in (tool["function"] for tool in tools):
        if wanted in (None, function["name"]):
            parameters = {key: value for key, value in function["parameters"].items() if key != "$defs"}
            definitions.update(function["parameters"].get("$defs", {}))  # "#/$defs/…" is looked up at the root
            properties = {"name": {"const": function["name"]}, "arguments": parameters}
            forms.append({"type": "object", "properties": properties, "required": ["name", "arguments"],
                          "additionalProperties": False})  # fmt: skip
    root = dict(forms[0]) if len(forms) == 1 else {"anyOf": forms}
    return {**root, "$defs": definitions} if definitions else root


class CallReader:
    """Splits an answer that arrives in pieces into text for the reader and finished calls.

    Text that may still turn out to be a call is held back. An answer that opens with a brace is held to its end: small
    models leave the tags out. What looks like a call and is none (broken JSON, an unknown name) is text.
    """

    def __init__(self, names: list[str]):
        self._names = frozenset(names)
        self._held = ""
        self._begun = False  # something other than white space has been let through or recognised
        self._bare = False  # a call came last: white space between calls is not text

    def push(self, piece: str) -> tuple[str, list[Call]]:
        """(text that is certainly text, calls that are complete) after one more piece."""
        self._held += piece
        text, calls = "", []
        while self._begun or self._held.lstrip()[:1] not in ("", "{"):
            self._begun = True
            start = self._held.find(_OPEN)
            if start < 0:
                text += self._shown(len(self._held) - _overlap(self._held, _OPEN))
                break
            text += self._shown(start)
            end = self._held.find(_CLOSE)
            if end < 0:
                break
            call = self._call(self._held[len(_OPEN) : end])
            end += len(_CLOSE)
            if call:
                calls.append(call)
                self._held, self._bare = self._held[end:], True
            else:
                text += self._shown(end)
        return text, calls

    def flush(self) -> tuple[str, list[Call]]:
        """What was held back, at the end of the answer. A call whose closing tag is missing still counts."""
        if call := self._call(self._held.strip().removeprefix(_OPEN)):
            self._held = ""
            return "", [call]
        return self._shown(len(self._held)), []

    def _shown(self, count: int) -> str:
        """Takes `count` characters out of what is held, as text."""
        text, self._held = self._held[:count], self._held[count:]
        if self._bare:
            text = text.lstrip()
            self._bare = not text
        return text

    def _call(self, body: str) -> Call | None:
        try:
            value = json.loads(body)
        except (ValueError, RecursionError):
            return None
        if not isinstance(value, dict) or str(value.get("name")) not in self._names:
            return None
        arguments = value.get("arguments", value.get("parameters", {}))
        if isinstance(arguments, str):  # some models quote it twice
            return Call(value["name"], arguments)
        return Call(value["name"], json.dumps(arguments, ensure_ascii=False))


def _overlap(text: str, mark: str) -> int:
    """How many of the last characters of `text` may be the beginning of `mark`."""
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:n])), 0)
