"""Tool calls are found however an answer is cut into pieces, and what is none stays text, to the character."""

import json

import pytest

from shoal.runtime.errors import UsageError
from shoal.runtime.language.tools import ToolCallParser, call_schema

PARIS = '{"name": "weather", "arguments": {"city": "Paris"}}'
TAGGED = f"<tool_call>\n{PARIS}\n</tool_call>"
FENCED = f"```json\n{PARIS}\n```"


def parse(answer: str, size: int) -> tuple[str, list[tuple[str, dict]]]:
    parser, text, calls = ToolCallParser(["weather", "time"]), "", []
    pieces = [parser.push(answer[start : start + size]) for start in range(0, len(answer), size)]
    for shown, found in [*pieces, parser.flush()]:
        text += shown
        calls += [(call.name, call.arguments) for call in found]
    return text, calls


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(
    ("answer", "text", "cities"),
    [
        (TAGGED, "", ["Paris"]),
        (f"Let me see. {TAGGED}\n{TAGGED}", "Let me see. ", ["Paris", "Paris"]),
        (TAGGED.removesuffix("</tool_call>"), "", ["Paris"]),
        (PARIS, "", ["Paris"]),
        (f"[{PARIS}, {PARIS}]", "", ["Paris", "Paris"]),
        (FENCED, "", ["Paris"]),
        (f"\n```\n{PARIS}\n{PARIS}\n```\n", "", ["Paris", "Paris"]),
        (FENCED.removesuffix("```"), "", ["Paris"]),
        (TAGGED.replace("Paris", "</tool_call>"), "", ["</tool_call>"]),
        # what is none
        (TAGGED.replace("weather", "rm"), TAGGED.replace("weather", "rm"), []),
        (FENCED.replace("weather", "rm"), FENCED.replace("weather", "rm"), []),
        (f"{FENCED}\nThat is it.", f"{FENCED}\nThat is it.", []),
        ('{"population": 3}', '{"population": 3}', []),
        ("```python\nprint({})\n```", "```python\nprint({})\n```", []),
        ("`x` is {1}", "`x` is {1}", []),
        ("<tool_call>nonsense</tool_call>!", "<tool_call>nonsense</tool_call>!", []),
        ("a <tool_cal", "a <tool_cal", []),
        ("", "", []),
    ],
)
def test_calls_and_text_are_told_apart(answer, text, cities, size):
    assert parse(answer, size) == (text, [("weather", {"city": city}) for city in cities])


def test_code_in_a_fence_is_not_held_back():
    parser = ToolCallParser(["weather"])
    assert parser.push("```python\nfor")[0] == "```python\nfor"
    assert parser.push(" x in")[0] == " x in"


def test_nesting_that_would_overflow_is_text():
    deep = "[" * 100_000
    assert parse(deep, 1 << 20) == (deep, [])


def test_a_schema_moves_with_what_it_refers_to():
    node = {"type": "object", "properties": {"next": {"$ref": "#"}, "id": {"$ref": "#/$defs/id"}}, "$defs": {"id": {}}}
    tools = [{"type": "function", "function": {"name": name, "parameters": node}} for name in ("a", "b")]
    moved = json.dumps(call_schema(tools))
    assert all(f'"#/$defs/tool{i}{end}"' in moved for i in (0, 1) for end in ("", "/$defs/id")) and '"#"' not in moved
    with pytest.raises(UsageError, match="no tool"):
        call_schema(tools, "c")
