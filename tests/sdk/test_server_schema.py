import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.server_schema import RequestError, parse_body, parse_chat, parse_completion, parse_embedding

USER = {"role": "user", "content": "Hello"}
CHAT = {"model": "m", "messages": [USER]}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def refused(parse, body) -> RequestError:
    with pytest.raises(RequestError) as caught:
        parse(body)
    assert caught.value.what and caught.value.why and caught.value.fix
    return caught.value


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"colour": 1}, "colour", "unknown_parameter"),
        ({"colour": None}, "colour", "unknown_parameter"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "unsupported_parameter"),
        ({"store": True}, "store", "unsupported_parameter"),
        ({"audio": {"voice": "x"}}, "audio", "unsupported_parameter"),
        ({"model": None}, "model", "missing_required_parameter"),
        ({"model": 1}, "model", "invalid_type"),
        ({"messages": None}, "messages", "missing_required_parameter"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": "Hello"}, "messages", "invalid_type"),
        ({"messages": ["Hello"]}, "messages[0]", "invalid_type"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "missing_required_parameter"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
        ({"messages": [{**USER, "mood": "good"}]}, "messages[0].mood", "unknown_parameter"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id", "missing_required_parameter"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].type",
            "invalid_value",
        ),
        ({"temperature": 2.1}, "temperature", "invalid_value"),
        ({"temperature": 1e999}, "temperature", "invalid_value"),
        ({"temperature": 10**400}, "temperature", "invalid_value"),
        ({"temperature": "1"}, "temperature", "invalid_type"),
        ({"temperature": True}, "temperature", "invalid_type"),
        ({"top_p": -0.1}, "top_p", "invalid_value"),
        ({"top_k": 1.0}, "top_k", "invalid_type"),
        ({"min_p": 2}, "min_p", "invalid_value"),
        ({"repetition_penalty": 0}, "repetition_penalty", "invalid_value"),
        ({"frequency_penalty": 3}, "frequency_penalty", "invalid_value"),
        ({"presence_penalty": []}, "presence_penalty", "invalid_type"),
        ({"logit_bias": {"cat": 1}}, "logit_bias.cat", "invalid_value"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1", "invalid_value"),
        ({"logit_bias": [1]}, "logit_bias", "invalid_type"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_completion_tokens": "5"}, "max_completion_tokens", "invalid_type"),
        ({"max_tokens": 5, "max_completion_tokens": 5}, "max_tokens", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": True}, "n", "invalid_type"),
        ({"seed": 1 << 64}, "seed", "invalid_value"),
        ({"stop": ""}, "stop", "invalid_value"),
        ({"stop": ["a", 1]}, "stop", "invalid_type"),
        ({"stop": ["a"] * 17}, "stop", "invalid_value"),
        ({"stream": "yes"}, "stream", "invalid_type"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "unknown_parameter"),
        ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"logprobs": 3}, "logprobs", "invalid_type"),
        ({"tools": [{"type": "custom"}]}, "tools[0].type", "invalid_value"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "invalid_value"),
        ({"tools": [TOOL, TOOL]}, "tools", "invalid_value"),
        ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
        ({"tools": [TOOL], "tool_choice": "maybe"}, "tool_choice", "invalid_value"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "other"}}},
            "tool_choice.function.name",
            "invalid_value",
        ),
        ({"tools": [TOOL], "response_format": {"type": "json_object"}}, "response_format", "invalid_value"),
        ({"response_format": {"type": "yaml"}}, "response_format.type", "invalid_value"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing_required_parameter"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
            "missing_required_parameter",
        ),
    ],
)
def test_chat_refuses_by_name(change, param, code):
    error = refused(parse_chat, {**CHAT, **change})
    assert (error.param, error.error_code, error.status) == (param, code, 400)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [[1], []]}, "prompt"),
        ({"prompt": [1, True]}, "prompt"),
        ({"prompt": {"text": "x"}}, "prompt"),
        ({"echo": True}, "echo"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "end"}, "suffix"),
        ({"logprobs": True}, "logprobs"),
        ({"messages": [USER]}, "messages"),
    ],
)
def test_completion_refuses_by_name(change, param):
    assert refused(parse_completion, {"model": "m", "prompt": "x", **change}).param == param


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input": []}, "input"),
        ({"input": ""}, "input"),
        ({"input": [1, 2]}, "input"),
        ({"input": ["x"] * 2049}, "input"),
        ({"encoding_format": "hex"}, "encoding_format"),
        ({"dimensions": 8}, "dimensions"),
    ],
)
def test_embedding_refuses_by_name(change, param):
    assert refused(parse_embedding, {"model": "m", "input": "x", **change}).param == param


def test_null_and_idle_values_are_as_good_as_absent():
    plain = parse_chat(CHAT)
    idle = {"temperature": None, "stop": None, "tools": None, "audio": None, "store": False, "user": "u", "n": 1,
            "modalities": ["text"], "service_tier": "auto", "response_format": {"type": "text"}}  # fmt: skip
    assert parse_chat({**CHAT, **idle}) == plain
    assert plain.options.temperature == 1 and plain.options.max_tokens is None and plain.tool_choice == "none"


def test_messages_become_what_templates_read():
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "How is"}, {"type": "text", "text": "Oslo?"}]},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
    ]
    system, user, assistant, tool = parse_chat({"model": "m", "messages": messages}).messages
    assert system == {"role": "system", "content": "Be brief."}
    assert user["content"] == "How is\nOslo?"
    assert assistant["content"] == "" and assistant["tool_calls"][0]["function"]["arguments"] == {"city": "Oslo"}
    assert tool == {"role": "tool", "content": "rain", "tool_call_id": "c1"}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", None),
        (b"[]", None),
        (b"\xff", None),
        (b'{"model": NaN}', None),
        (b"[" * 200_000, None),
        (b'{"messages": ' + b"[" * 500 + b"]" * 500 + b"}", "messages"),
        (b'{"a": ' + b'{"a": ' * 100 + b"1" + b"}" * 101, "a"),
        (b'{"model": "\\ud800"}', "model"),
        (b'{"\\ud800": 1}', "?"),
        (b'{"seed": ' + b"9" * 5000 + b"}", None),
    ],
)
def test_hostile_bodies_are_refused(body, param):
    assert refused(parse_body, body).param == param


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from(
    ["temperature", "n", "stop", "tools", "tool_choice", "response_format", "logit_bias", "stream_options", "stream",
     "messages", "seed", "logprobs", "top_logprobs", "max_tokens", "user", "prompt", "input"]
)  # fmt: skip


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.dictionaries(NAMES, JSON, max_size=4), st.sampled_from([parse_chat, parse_completion, parse_embedding]))
def test_any_json_is_a_request_or_a_named_refusal(change, parse):
    body = json.dumps({"model": "m", "messages": [USER], **change}).encode()
    try:
        parse(parse_body(body))
    except RequestError as error:
        assert error.param
