from shoal.runtime.language.tools import ToolCallParser
from shoal.server_tools import without_tools

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def test_a_template_without_tools_is_told_in_words():
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
    assert result == {"role": "user", "content": "<tool_response>\nrain\n</tool_response>"}
    assert without_tools([messages[1]], [WEATHER])[0]["role"] == "system"
    assert without_tools([messages[1]], []) == [messages[1]]
    # what the model is shown of its own call is what is read as a call
    text, calls = ToolCallParser(["weather"]).push(assistant["content"])
    assert not text and [(found.name, found.arguments) for found in calls] == [("weather", {"city": "Oslo"})]
