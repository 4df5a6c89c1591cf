import random

import pytest

from shoal.server_tools import CallReader, call_schema, knows_tools, without_tools

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CLOCK = {
    "type": "function",
    "function": {"name": "clock", "parameters": {"$ref": "#/$defs/Zone", "$defs": {"Zone": {"type": "object"}}}},
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


def read(text: str, pieces: random.Random | None = None) -> tuple[str, list[tuple[str, str]]]:
    reader, shown, calls = CallReader(["weather", "clock"]), "", []
    while text:
        size = pieces.randint(1, 5) if pieces else len(text)
        new, found = reader.push(text[:size])
        text, shown, calls = text[size:], shown + new, calls + found
    new, found = reader.flush()
    return shown + new, [(call.name, call.arguments) for call in calls + found]


@pytest.mark.parametrize(
    ("text", "shown", "names"),
    [
        ("Just text, 1 < 2.", "Just text, 1 < 2.", []),
        (CALL, "", ["weather"]),
        (f"Let me look. {CALL}\n{CALL}\n", "Let me look. ", ["weather", "weather"]),
        ('{"name": "clock", "arguments": {}}', "", ["clock"]),
        ('{"answer": 42}', '{"answer": 42}', []),
        ("  {broken", "  {broken", []),
        (CALL.removesuffix("</tool_call>"), "", ["weather"]),
        ('<tool_call>{"name": "other", "arguments": {}}</tool_call>', None, []),
        ('<tool_call>{"name": ["weather"], "arguments": {}}</tool_call>', None, []),
        ("<tool_call>[1", None, []),
        ("a <tool_cal", "a <tool_cal", []),
        ("<tool_call></tool_call>", None, []),
    ],
)
def test_calls_are_found_however_the_text_is_cut(text, shown, names):
    whole = read(text)
    assert whole[0] == (text if shown is None else shown)
    assert [name for name, _ in whole[1]] == names
    for seed in range(20):
        assert read(text, random.Random(seed)) == whole


def test_text_that_cannot_be_a_call_is_not_held_back():
    reader = CallReader(["weather"])
    assert reader.push("Hello <b") == ("Hello <b", [])
    assert reader.push("old> <tool") == ("old> ", [])
    assert reader.push("box>") == ("<toolbox>", [])


def test_arguments_stay_a_json_text():
    assert read(CALL)[1] == [("weather", '{"city": "Oslo"}')]
    assert read('{"name": "clock", "arguments": "{\\"zone\\": 1}"}')[1] == [("clock", '{"zone": 1}')]


def test_schema_of_a_required_call():
    assert call_schema([WEATHER, CLOCK], "function:weather")["properties"]["name"] == {"const": "weather"}
    both = call_schema([WEATHER, CLOCK], "required")
    assert len(both["anyOf"]) == 2 and both["$defs"] == {"Zone": {"type": "object"}}


def test_a_template_without_tools_is_told_in_words():
    assert knows_tools("{% if tools %}") and not knows_tools("{{ toolset }} {{ messages }}")
    call = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Oslo?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "rain", "tool_call_id": "c"},
    ]
    system, user, assistant, result = without_tools(messages, [WEATHER])
    assert system["content"].startswith("Be brief.\n\n# Tools") and '"name": "weather"' in system["content"]
    assert user == messages[1]
    assert read(assistant["content"])[1] == [("weather", '{"city": "Oslo"}')]
    assert result == {"role": "user", "content": "<tool_response>\nrain\n</tool_response>"}
    assert without_tools([messages[1]], [WEATHER])[0]["role"] == "system"
    assert without_tools([messages[1]], []) == [messages[1]]
