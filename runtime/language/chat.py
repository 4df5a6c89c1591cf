"""From chat messages to the text that a model was trained to continue.

Messages are checked and made plain (texts, numbers, lists, dicts) before a template sees them; the template runs in
template.py. The form of messages and tools is that of OpenAI's API, which chat templates expect. It knows nothing about
tokens or models.
"""

import json
import math
from collections.abc import Sequence
from typing import Any

from ..errors import UsageError
from . import template as templates

_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_DEEPEST = 64


def render(
    template: str,
    messages: Sequence[dict],
    add_generation_prompt: bool = True,
    tools: Sequence[dict] | None = None,
    **values: Any,
) -> str:
    """The prompt that a chat template makes of `messages`.

    A message is {"role", "content"}; content is a text or parts {"type": "text", "text"}, which are joined by line
    breaks. An assistant's may have "tool_calls", whose arguments are a JSON text or an object. `tools` are
    {"type": "function", "function": {"name", …}}. `values` are what else the template reads: bos_token, eos_token, ….
    Raises UsageError naming the message that is wrong, or with the template's own words where that refuses them;
    BundleError where the template fails or goes past its limits.
    """
    if not template:
        raise UsageError(
            "This model has no chat template.", "Nobody said how it is to be addressed.", "Give the prompt as a text."
        )
    if not isinstance(messages, (list, tuple)) or not messages:
        raise UsageError("There are no messages.", "They are a list with at least one.", "Give one.")
    plain = [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]
    if tools and not knows_tools(template):
        raise UsageError(
            "This model's chat template knows no tools.",
            "They would be left out.",
            "Describe them in a system message.",
        )
    return templates.render(
        template,
        messages=plain,
        tools=[_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools)] if tools else None,
        documents=None,
        add_generation_prompt=add_generation_prompt,
        **{name: _plain(value, name) for name, value in values.items()},
    )


def knows_tools(template: str) -> bool:
    """Whether a chat template reads `tools`."""
    return "tools" in templates.variables(template)


def _message(message: Any, where: str) -> dict:
    if not isinstance(message, dict):
        raise _wrong(where, f"is of type {type(message).__name__}", "Give a dict with role and content.")
    plain = _plain(message, where)
    if plain.get("role") not in _ROLES:
        raise _wrong(f"{where}.role", f"is {plain.get('role')!r:.40}", f"Use one of {', '.join(_ROLES)}.")
    content = plain.get("content")
    if isinstance(content, list):
        content = "\n".join(_part(part, f"{where}.content[{index}]") for index, part in enumerate(content))
    calls = plain.get("tool_calls") or []
    if content is None and calls:
        content = ""
    if not isinstance(content, str):
        raise _wrong(f"{where}.content", f"is of type {type(content).__name__}", "Give a text or text parts.")
    plain["content"] = content
    if calls:
        if not isinstance(calls, list):
            raise _wrong(f"{where}.tool_calls", "is not a list", "Give a list.")
        plain["tool_calls"] = [_call(call, f"{where}.tool_calls[{index}]") for index, call in enumerate(calls)]
    return plain


def _part(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind != "text":
        raise _wrong(f"{where}.type", f"is {kind!r:.40}, which this model does not take", "Send text parts only.")
    if not isinstance(part.get("text"), str):
        raise _wrong(f"{where}.text", "is not a text", "Give a text.")
    return part["text"]


def _call(call: Any, where: str) -> dict:
    """A tool call whose arguments are an object, which templates print as JSON."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise _wrong(f"{where}.function", "has no name", "Give the name and the arguments of what was called.")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            function["arguments"] = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            pass  # a model's own call may be broken; it is shown as it was
    return call


def _tool(tool: Any, where: str) -> dict:
    plain = _plain(tool, where)
    function = plain.get("function") if isinstance(plain, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise _wrong(f"{where}.function", "has no name", 'Give {"type": "function", "function": {"name", …}}.')
    return plain


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """A copy made of plain types, so that a template meets no method of the caller's objects."""
    if depth > _DEEPEST:
        raise _wrong(where, f"is nested more than {_DEEPEST} deep", "Make it simpler.")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{index}]", depth + 1) for index, item in enumerate(value)]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {str(key): _plain(item, f"{where}.{key:.40}", depth + 1) for key, item in value.items()}
    raise _wrong(where, f"is of type {type(value).__name__}, which is not JSON", "Give plain values.")


def _wrong(where: str, why: str, fix: str) -> UsageError:
    return UsageError(f"{where} cannot be used.", f"It {why}.", fix)
