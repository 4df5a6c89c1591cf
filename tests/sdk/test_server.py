"""The server as its users meet it: `shoal serve` in a process of its own, real bundles, OpenAI's own client."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import numpy as np
import openai
import pytest

CAPITAL = [{"role": "user", "content": "What is the capital of France? Answer briefly."}]
ENDLESS = {"2": -100, "0": -100}  # answers are drawn, and may end early
STORY = [{"role": "user", "content": "Tell me a very long story about a ship."}]
CITY = {
    "type": "object",
    "properties": {"name": {"enum": ["Paris", "Oslo"]}, "rivers": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["name", "rivers"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "look_up", "description": "Facts of a city", "parameters": CITY}}


class Server:
    """A `shoal serve` process; `url` ends in /v1, `said` is its stderr so far."""

    def __init__(self, *arguments: str, **environment: str):
        command = [sys.executable, "-m", "shoal", "serve", *arguments, "--port", "0"]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
        )
        self.said: list[str] = []
        assert self.process.stdout and self.process.stderr
        threading.Thread(target=self.said.extend, args=(self.process.stderr,), daemon=True).start()
        watchdog = threading.Timer(120, self.process.kill)
        watchdog.start()
        line = self.process.stdout.readline()
        watchdog.cancel()
        found = re.search(r"https?://\S+", line)
        assert found, f"{line}{''.join(self.said)}"
        self.url = found[0].replace("0.0.0.0", "127.0.0.1")

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key=key, max_retries=0, timeout=60)

    def metric(self, name: str, model: str = "smollm2") -> float:
        text = urllib.request.urlopen(self.url.replace("/v1", "/metrics"), timeout=10).read().decode()
        found = re.search(rf'^{name}{{model="{model}"}} (\S+)$', text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    def wait_for(self, name: str, value: float) -> None:
        until = time.monotonic() + 20
        while self.metric(name) != value:
            assert time.monotonic() < until, f"{name} is {self.metric(name)}"
            time.sleep(0.02)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(30)
        finally:
            self.process.kill()


@pytest.fixture(scope="module")
def server(smollm2_bundle, minilm_bundle) -> Iterator[Server]:
    server = Server(
        str(smollm2_bundle), str(minilm_bundle), "--slots", "2", "--queue", "1", "--context", "1024", "--log-requests"
    )
    yield server
    assert server.stop() == 0
    assert "Traceback" not in "".join(server.said)


@pytest.fixture
def client(server) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client


def test_prompts_go_through_static_graphs_where_asked(static_bundle):
    server = Server(str(static_bundle), "--context", "64", "--prefill", "static", "--backend", "cpu")
    with server.client() as client:
        name = client.models.list().data[0].id
        reply = client.completions.create(model=name, prompt="hello there", max_tokens=4)
    assert reply.usage.completion_tokens == 4 and server.stop() == 0
    assert any(line.startswith(f"{name}: ") and "nodes on CPUExecutionProvider" in line for line in server.said)


def refusal(call, **arguments) -> dict:
    with pytest.raises(openai.APIStatusError) as caught:
        call(**arguments)
    assert set(caught.value.body) == {"message", "type", "param", "code"}
    return {"status": caught.value.status_code, **caught.value.body}


def test_models_and_health(server, client):
    assert {model.id for model in client.models.list()} == {"smollm2", "minilm"}
    assert client.models.retrieve("minilm").owned_by == "shoal"
    assert json.load(urllib.request.urlopen(server.url.replace("/v1", "/health"))) == {"status": "ok"}


def test_chat_whole_and_streamed_are_the_same(client):
    asked = {"model": "smollm2", "messages": CAPITAL, "temperature": 0, "max_completion_tokens": 24}
    whole = client.chat.completions.create(**asked)
    assert "Paris" in whole.choices[0].message.content
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert all(chunk.usage is None for chunk in chunks[:-1]) and not chunks[-1].choices
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens > 0


def test_a_seed_repeats_and_choices_differ(client):
    asked = {"model": "smollm2", "messages": STORY, "seed": 7, "max_tokens": 12, "temperature": 1.0, "top_p": 0.95}
    client.chat.completions.create(**asked)  # a prompt that is computed and one that is reused differ by rounding
    first, again = (client.chat.completions.create(**asked, n=3) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert len(set(texts)) > 1
    assert [choice.finish_reason for choice in first.choices] == ["length"] * 3
    assert first.usage.completion_tokens == 36
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**asked, n=3, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


def test_logprobs(client):
    asked = {"model": "smollm2", "messages": CAPITAL, "temperature": 0, "max_tokens": 24}
    choice = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3).choices[0]
    tokens = choice.logprobs.content
    assert b"".join(bytes(token.bytes) for token in tokens).decode() == choice.message.content
    assert all(token.top_logprobs[0].token == token.token and len(token.top_logprobs) == 3 for token in tokens)
    assert all(token.logprob <= 0 for token in tokens)
    streamed = [
        entry
        for chunk in client.chat.completions.create(**asked, logprobs=True, stream=True)
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert [entry.token for entry in streamed] == [token.token for token in tokens]


def test_stop_bias_and_penalties_act(client):
    def text(**more) -> str:
        asked = {"model": "smollm2", "messages": CAPITAL, "temperature": 0, "max_tokens": 24, "logprobs": True, **more}
        choice = client.chat.completions.create(**asked).choices[0]
        return choice.message.content

    plain = text()
    assert text(stop=[" Paris"]) == plain.partition(" Paris")[0]
    assert text(stop="is Par") == plain.partition("is Par")[0]
    assert text(max_tokens=3) == "The capital of"
    forced = client.completions.create(
        model="smollm2", prompt="A", temperature=0, max_tokens=4, logit_bias={"28": 100, "29": 99.5},
        frequency_penalty=1,
    )  # fmt: skip
    same = client.completions.create(model="smollm2", prompt="A", temperature=0, max_tokens=4, logit_bias={"28": 100})
    assert len(set(same.choices[0].text)) == 1 < len(set(forced.choices[0].text))


def test_completions(client):
    asked = {"model": "smollm2", "temperature": 0, "max_tokens": 6}
    both = client.completions.create(**asked, prompt=["Once upon a", "The sky is"], logprobs=2)
    alone = client.completions.create(**asked, prompt="The sky is")
    assert [choice.index for choice in both.choices] == [0, 1]
    assert both.choices[1].text == alone.choices[0].text
    logprobs = both.choices[0].logprobs
    assert "".join(logprobs.tokens) == both.choices[0].text and logprobs.text_offset[0] == 0
    assert len(logprobs.top_logprobs[0]) == 2 and max(logprobs.top_logprobs[0].values()) == logprobs.token_logprobs[0]
    streamed = list(client.completions.create(**asked, prompt="The sky is", stream=True, logprobs=0))
    assert "".join(chunk.choices[0].text for chunk in streamed) == alone.choices[0].text
    offsets = [chunk.choices[0].logprobs.text_offset[0] for chunk in streamed if chunk.choices[0].logprobs]
    assert offsets == sorted(set(offsets)) and offsets[0] == 0
    ids = client.completions.create(**asked, prompt=[504, 5273, 314])
    assert ids.usage.prompt_tokens == 3


def test_embeddings(client):
    texts = ["A cat sleeps.", "A kitten naps.", "Tax law of 1913."]
    packed = client.embeddings.create(model="minilm", input=texts)  # the client asks for base64
    vectors = np.array([row.embedding for row in packed.data])
    likeness = vectors @ vectors.T
    assert likeness[0, 1] > likeness[0, 2] and np.allclose(np.diag(likeness), 1, atol=1e-3)
    plain = client.embeddings.create(model="minilm", input=texts[0], encoding_format="float")
    assert np.allclose(plain.data[0].embedding, vectors[0], atol=2e-2)
    assert packed.usage.prompt_tokens > plain.usage.prompt_tokens > 0
    assert refusal(client.embeddings.create, model="minilm", input="word " * 600)["param"] == "input"


def test_an_answer_keeps_to_its_schema(client):
    asked = {"model": "smollm2", "messages": CAPITAL, "max_tokens": 60}
    wanted = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}}
    for seed in range(3):
        choice = client.chat.completions.create(**asked, seed=seed, response_format=wanted).choices[0]
        value = json.loads(choice.message.content)
        assert choice.finish_reason == "stop"
        assert value["name"] in ("Paris", "Oslo") and 0 <= value["rivers"] <= 9 and len(value) == 2
    anything = client.chat.completions.create(
        **{**asked, "max_tokens": 200}, temperature=0, response_format={"type": "json_object"}
    ).choices[0]
    assert anything.finish_reason != "stop" or isinstance(json.loads(anything.message.content), dict)
    broken = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no such type"}}}
    error = refusal(client.chat.completions.create, **asked, response_format=broken)
    assert (error["status"], error["param"]) == (400, "response_format")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "look_up"}}])
def test_tool_calls(client, choice):
    asked = {"model": "smollm2", "messages": CAPITAL, "tools": [TOOL], "tool_choice": choice, "temperature": 0}
    whole = client.chat.completions.create(**asked, max_tokens=80).choices[0]
    assert whole.finish_reason == "tool_calls" and whole.message.content is None
    call = whole.message.tool_calls[0]
    assert call.function.name == "look_up" and set(json.loads(call.function.arguments)) == {"name", "rivers"}
    with client.chat.completions.stream(**asked, max_tokens=80) as events:
        streamed = events.get_final_completion().choices[0]
    assert streamed.finish_reason == "tool_calls"
    assert streamed.message.tool_calls[0].function.arguments == call.function.arguments
    result = {"role": "tool", "tool_call_id": call.id, "content": '{"rivers": 1}'}
    messages = [*CAPITAL, whole.message.model_dump(exclude_none=True), result]
    after = client.chat.completions.create(model="smollm2", messages=messages, tools=[TOOL], max_tokens=4)
    assert after.usage.completion_tokens == 4


def test_refusals_name_the_parameter(client):
    chat, asked = client.chat.completions.create, {"model": "smollm2", "messages": CAPITAL}

    def first(**more) -> tuple:
        error = refusal(chat, **{**asked, **more})
        return error["status"], error["param"], error["code"]

    assert first(extra_body={"colour": 1}) == (400, "colour", "unknown_parameter")
    assert first(reasoning_effort="high") == (400, "reasoning_effort", "unsupported_parameter")
    assert first(temperature="warm") == (400, "temperature", "invalid_type")
    assert first(model="other") == (404, "model", "model_not_found")
    assert first(model="minilm") == (400, "model", "model_not_suitable")
    assert first(n=4) == (400, "n", "invalid_value")
    assert first(logit_bias={"49152": 1}) == (400, "logit_bias.49152", "invalid_value")
    assert first(messages=[{"role": "user", "content": "word " * 1100}]) == (400, "messages", "context_length_exceeded")
    assert first(max_tokens=1020) == (400, "messages", "context_length_exceeded")
    error = refusal(client.completions.create, model="smollm2", prompt=[1, 99999])
    assert (error["status"], error["param"]) == (400, "prompt")
    assert refusal(client.completions.create, model="smollm2", prompt="x", max_tokens=2000)["param"] == "prompt"


def send(server: Server, body: bytes, kind: str = "application/json", **headers: str) -> tuple[int, dict]:
    request = urllib.request.Request(server.url + "/chat/completions", body, {"content-type": kind, **headers})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_what_is_no_request_is_refused(server):
    assert send(server, b"{")[0] == 400
    assert send(server, b"[" * 100_000)[0] == 400
    assert send(server, b'{"messages":' + b"[" * 900 + b"]" * 900 + b"}")[1]["error"]["param"] == "messages"
    assert send(server, b"{}", "text/plain")[0] == 415
    assert send(server, b" " * (4 << 20) + b"{}")[0] == 413
    assert send(server, b"{}", Host="evil.example")[0] == 403
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(server.url + "/nothing", timeout=30)
    with pytest.raises(urllib.error.HTTPError, match="405"):
        urllib.request.urlopen(server.url + "/chat/completions", timeout=30)


def test_a_client_that_goes_away_frees_its_slot(server, client):
    stream = client.chat.completions.create(model="smollm2", messages=STORY, stream=True, logit_bias=ENDLESS)
    for _ in range(3):
        next(stream)
    assert server.metric("shoal_slots_busy") == 1
    stream.close()
    server.wait_for("shoal_slots_busy", 0)
    # and one that does not stream: its whole answer would come at the end
    body = json.dumps({"model": "smollm2", "messages": STORY, "logit_bias": ENDLESS}).encode()
    address = server.url.removeprefix("http://").removesuffix("/v1").rsplit(":", 1)
    with socket.create_connection((address[0], int(address[1]))) as raw:
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        raw.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        server.wait_for("shoal_slots_busy", 1)
    server.wait_for("shoal_slots_busy", 0)
    answer = client.chat.completions.create(model="smollm2", messages=CAPITAL, temperature=0, max_tokens=24)
    assert "Paris" in answer.choices[0].message.content


def test_a_full_queue_says_so_and_empties(server, client):
    asked = {"model": "smollm2", "messages": STORY}
    with contextlib.ExitStack() as stack:
        streams = [client.chat.completions.create(**asked, stream=True) for _ in range(3)]
        for stream in streams:
            stack.callback(stream.close)
        assert (server.metric("shoal_slots_busy"), server.metric("shoal_queue_depth")) == (2, 1)
        with pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(**asked)
        assert caught.value.code == "queue_full"
        assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60
        # the one that waits gets its turn when another leaves
        waiting = streams.pop()
        streams[0].close()
        texts = (chunk.choices[0].delta.content for chunk in waiting)
        assert next(text for text in texts if text)
    server.wait_for("shoal_slots_busy", 0)
    assert client.chat.completions.create(**asked, max_tokens=2).usage.completion_tokens == 2


def test_metrics_count(server, client):
    before = server.metric("shoal_generated_tokens_total")
    client.completions.create(model="smollm2", prompt="A", max_tokens=5, logit_bias=ENDLESS)
    assert server.metric("shoal_generated_tokens_total") == before + 5
    assert server.metric("shoal_slots") == 2 and server.metric("shoal_slots", "minilm") == 1


def test_a_stack_is_counted(stacked_bundle):
    server = Server(str(stacked_bundle), "--follow-memory=1MB", "--memory", "200MB")
    try:
        entries = server.metric("shoal_stack_entries_limit", "tiny.stack")
        assert 0 < server.metric("shoal_stack_entries", "tiny.stack") <= entries
        assert server.metric("shoal_stack_bytes", "tiny.stack") > 0
    finally:
        assert server.stop() == 0


def test_reachable_from_outside_asks_for_a_key_and_keeps_its_deadlines(smollm2_bundle):
    server = Server(str(smollm2_bundle), "--host", "0.0.0.0", "--context", "512", "--timeout", "1", SHOAL_API_KEY="")
    try:
        shown = re.search(r"API key, shown this once: (\S+)", "".join(server.said))
        assert shown and "unencrypted" in "".join(server.said)
        with server.client("wrong") as stranger:
            with pytest.raises(openai.AuthenticationError):
                stranger.models.list()
        with server.client(shown[1]) as client:
            assert [model.id for model in client.models.list()] == ["smollm2"]
            late = refusal(client.chat.completions.create, model="smollm2", messages=STORY, logit_bias=ENDLESS)
            assert (late["status"], late["code"]) == (504, "timeout")
            with pytest.raises(openai.APIError, match="time is over"):
                asked = dict(model="smollm2", messages=STORY, logit_bias=ENDLESS)
                for _ in client.chat.completions.create(stream=True, **asked):
                    pass
    finally:
        assert server.stop() == 0


def test_stopping_lets_a_running_answer_end(smollm2_bundle):
    server = Server(str(smollm2_bundle), "--context", "512")
    with server.client() as client:
        stream = client.chat.completions.create(
            model="smollm2", messages=STORY, stream=True, max_tokens=40, logit_bias=ENDLESS
        )
        next(stream)
        server.process.send_signal(signal.SIGTERM)
        chunks = list(stream)
        assert chunks[-1].choices[0].finish_reason == "length"
    assert server.process.wait(30) == 0


def test_stopping_does_not_wait_for_ever(smollm2_bundle):
    server = Server(str(smollm2_bundle), "--context", "2048", "--drain", "1")
    with server.client() as client:
        stream = client.chat.completions.create(model="smollm2", messages=STORY, stream=True, logit_bias=ENDLESS)
        next(stream)
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIConnectionError):
            list(stream)
    assert server.process.wait(30) == 0
