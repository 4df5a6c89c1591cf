"""An OpenAI-compatible server over loaded models: chat, completions, embeddings, models, health and metrics.

It promises: a parameter that is not honoured is refused by name (server_schema); a client that goes away frees its
slot within one step; every wait has a deadline; more work than the slots and the queue hold is refused at once with
429. Who may ask is decided before it, in server_gate. It knows nothing about bundles, graphs or the command line.
"""

import asyncio
import base64
import contextlib
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from shoal.runtime.errors import BusyError, ContextError, ShoalError, UsageError
from shoal.runtime.language.chat import knows_tools
from shoal.runtime.language.sampling import Sampling
from shoal.runtime.language.tools import ToolCallParser, call_grammar

from .server_jobs import Admission, Ended, Job, Source
from .server_metrics import Metrics
from .server_reply import Answer, ChatForm, CompletionForm, Envelope, Form, entry, usage
from .server_schema import (
    ChatRequest,
    Options,
    RequestError,
    parse_body,
    parse_chat,
    parse_completion,
    parse_embedding,
)
from .server_tools import without_tools

log = logging.getLogger("shoal.server")

_PING_SECONDS = 15.0  # of silence in a stream, after which a comment keeps proxies from closing it
_BODY_SECONDS = 30.0  # for a body to arrive
_PATIENCE = 16  # times the limit that is read and dropped, so that a client hears why; beyond, it is cut off
_LAST_SECONDS = 10.0  # for a stalled client to take what was sent, after the deadline
_EMBED_AT_ONCE = 16  # texts between two looks at whether the client is still there
_GONE = 499  # nginx's status for a client that did not wait


@dataclass(frozen=True)
class Limits:
    """Seconds and bytes. `queue` is how many requests may wait for each model."""

    queue: int = 16
    request_seconds: float = 600.0  # from a request's arrival to its last byte
    body_bytes: int = 4 << 20


class Served:
    """A model under the name that requests use."""

    def __init__(self, name: str, model: Any, queue: int):
        self.name, self.model = name, model
        self.admission = Admission(model.plan.slots if model.card.task == "generate" else 1, queue)
        self.created = int(time.time())
        self.fingerprint = f"shoal-{model.bundle.digest[:12]}"

    def job(self, starts: Sequence[Callable[[], Source]]) -> Job:
        """Admits the sources of one request, or refuses with 429 and a time to come back."""
        try:
            return Job(starts, self.admission)
        except BusyError as error:
            wait = self.admission.seconds_to_wait()
            raise RequestError(None, "queue_full", error.why, f"Try again in {wait} s.", 429, wait) from None


class Service:
    """The endpoints. `app` is the ASGI application, without any check of who asks."""

    def __init__(self, models: dict[str, Any], limits: Limits):
        """`models` are loaded models by name; they stay the caller's to close."""
        self.limits, self.metrics = limits, Metrics()
        self.served = {name: Served(name, model, limits.queue) for name, model in models.items()}
        self.app = Starlette(
            routes=[
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/v1/completions", self.completions, methods=["POST"]),
                Route("/v1/embeddings", self.embeddings, methods=["POST"]),
                Route("/v1/models", self.models, methods=["GET"]),
                Route("/v1/models/{name}", self.one_model, methods=["GET"]),
                Route("/health", self.health, methods=["GET"]),
                Route("/metrics", self.show_metrics, methods=["GET"]),
            ],
            exception_handlers=dict.fromkeys((ShoalError, HTTPException, ClientDisconnect, Exception), _refusal),
        )
        self.paths = {route.path for route in self.app.routes if isinstance(route, Route)}

    # What is there ----------------------------------------------------------------------------------------------------

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_describe(served) for served in self.served.values()]})

    async def one_model(self, request: Request) -> Response:
        return JSONResponse(_describe(self._find(request.path_params["name"])))

    async def show_metrics(self, request: Request) -> Response:
        gauges: list[tuple[str, dict[str, str], float]] = []
        for served in self.served.values():
            desk, label = served.admission, {"model": served.name}
            for name, value in (("slots", desk.slots), ("slots_busy", desk.used - desk.waiting),
                                ("queue_depth", desk.waiting), ("queue_limit", desk.queue)):  # fmt: skip
                gauges.append((f"shoal_{name}", label, value))
            if stack := served.model.stack:
                for name, value in (("stack_entries", stack.entries), ("stack_bytes", stack.bytes),
                                    ("stack_entries_limit", len(stack.index.order))):  # fmt: skip
                    gauges.append((f"shoal_{name}", label, value))
        return PlainTextResponse(self.metrics.render(gauges), media_type="text/plain; version=0.0.4")

    # What is asked ----------------------------------------------------------------------------------------------------

    async def chat(self, request: Request) -> Response:
        wanted = parse_chat(await self._body(request))
        served = self._find(wanted.options.model, "generate")
        tools = wanted.tools if wanted.tool_choice != "none" else []
        names = [tool["function"]["name"] for tool in tools]

        def start(index: int) -> Source:
            more = _conversation(served.model, wanted, tools)
            constraint = _constraint(served.model, wanted, tools)
            return _generate(served.model, wanted.options, index, "messages", constraint=constraint, **more)

        answers = [
            Answer(index, ToolCallParser(names) if tools else None, wanted.parallel_tool_calls)
            for index in range(wanted.options.n)
        ]
        form = ChatForm(wanted.options.logprobs is not None)
        return await self._reply(request, served, form, wanted.options, answers, start)

    async def completions(self, request: Request) -> Response:
        wanted = parse_completion(await self._body(request))
        served, n = self._find(wanted.options.model, "generate"), wanted.options.n

        def start(index: int) -> Source:
            prompt, choice = wanted.prompts[index // n], index % n
            return _generate(served.model, wanted.options, choice, "prompt", prompt=prompt, raw=True)

        answers = [Answer(index) for index in range(len(wanted.prompts) * n)]
        form = CompletionForm(wanted.options.logprobs is not None)
        return await self._reply(request, served, form, wanted.options, answers, start)

    async def embeddings(self, request: Request) -> Response:
        wanted = parse_embedding(await self._body(request))
        served = self._find(wanted.model, "embed")
        rows: list[np.ndarray] = []
        deadline = asyncio.get_running_loop().time() + self.limits.request_seconds
        source = _Embedding(served.model, wanted.texts)
        async with _Watched(served.job([lambda: source]), request) as job:
            async with _by(deadline):
                while (item := await job.next()) is not None:
                    rows += [] if isinstance(item[1], Ended) else [item[1]]
            if job.gone:
                raise ClientDisconnect
        self.metrics.count("shoal_prompt_tokens_total", source.tokens, model=served.name)
        vectors = np.concatenate(rows).astype("<f4")
        data = [
            {"object": "embedding", "index": index,
             "embedding": base64.b64encode(row.tobytes()).decode() if wanted.base64 else row.tolist()}
            for index, row in enumerate(vectors)
        ]  # fmt: skip
        counts = {"prompt_tokens": source.tokens, "total_tokens": source.tokens}
        return JSONResponse({"object": "list", "model": served.name, "data": data, "usage": counts})

    # How it is answered -----------------------------------------------------------------------------------------------

    async def _body(self, request: Request) -> dict[str, Any]:
        """The JSON object of a request, or a refusal before more than the limit is held."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # also what keeps a form of a foreign web page out
            raise RequestError(None, "unsupported_media_type", f"Its content type is {kind[:40]!r}.",
                               "Send application/json.", 415)  # fmt: skip
        most, body, received = self.limits.body_bytes, bytearray(), 0
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                async for part in request.stream():
                    received += len(part)
                    if received <= most:
                        body += part
                    elif received > _PATIENCE * most:
                        break
        except TimeoutError:
            why = f"Its body did not arrive within {_BODY_SECONDS:g} seconds."
            raise RequestError(None, "timeout", why, "Send it faster.", 408) from None
        if received > most:
            raise RequestError(None, "body_too_large", f"It is larger than {most} bytes.", "Send less.", 413)
        return parse_body(bytes(body))

    def _find(self, name: str, task: str | None = None) -> Served:
        served = self.served.get(name)
        if served is None:
            known = ", ".join(self.served)
            raise RequestError("model", "model_not_found", "No such model is loaded.", f"Use one of: {known}.", 404)
        if task and served.model.card.task != task:
            why = f"This model's task is {served.model.card.task}, not {task}."
            raise RequestError("model", "model_not_suitable", why, "Use another model or endpoint.")
        return served

    async def _reply(
        self, request: Request, served: Served, form: Form, options: Options, answers: list[Answer],
        start: Callable[[int], Source],
    ) -> Response:  # fmt: skip
        """Runs one generation for each answer and sends them whole or as a stream."""
        deadline = asyncio.get_running_loop().time() + self.limits.request_seconds
        if len(answers) > served.admission.slots + served.admission.queue:
            why = f"{len(answers)} answers are more than the slots and the queue of this server hold."
            raise RequestError("n", "invalid_value", why, "Ask for fewer.")
        if options.logprobs is not None:
            tokens, ends = served.model.tokenizer, frozenset(served.model.card.eos)
            for answer in answers:
                answer.describe = lambda token: None if token.id in ends else entry(token, tokens.token_bytes)
        starts = [lambda index=index: start(index) for index in range(len(answers))]
        watched = _Watched(served.job(starts), request)
        envelope = Envelope(form, served.name, served.fingerprint)
        async with contextlib.AsyncExitStack() as stack:
            job = await stack.enter_async_context(watched)
            async with _by(deadline):
                await job.started()  # what refuses an argument does so before the headers go out
                if not options.stream:
                    async for _ in self._pieces(job, answers, served):
                        pass
                    if job.gone:
                        raise ClientDisconnect
                    return JSONResponse(envelope.whole(answers, usage(answers, options.n)))
            stack.pop_all()  # the stream ends the job itself
        return _EventStream(self._events(watched, envelope, options, answers, served, deadline), deadline)

    async def _pieces(self, job: "_Watched", answers: Sequence[Answer], served: Served) -> AsyncGenerator[tuple, None]:
        """(answer, piece) as they come, () now and then while nothing does. An answer that ended has its `finish`."""
        while True:
            try:
                async with asyncio.timeout(_PING_SECONDS):
                    item = await job.next()
            except TimeoutError:
                yield ()
                continue
            if item is None:
                return
            index, value = item
            answer = answers[index]
            if isinstance(value, Ended):
                yield answer, answer.end(value.source.stats)
                continue
            self._count(served, value.stats, first=not answer.begun)
            yield answer, answer.push(value)
            if answer.complete:
                job.cancel(index)

    def _count(self, served: Served, stats: Any, first: bool) -> None:
        if first:
            self.metrics.count("shoal_prompt_tokens_total", stats.prompt_tokens, model=served.name)
            self.metrics.count("shoal_cached_tokens_total", stats.reused_tokens, model=served.name)
            self.metrics.observe("shoal_first_token_seconds", stats.time_to_first_token_s, model=served.name)
        self.metrics.count("shoal_generated_tokens_total", model=served.name)

    async def _events(
        self, watched: "_Watched", envelope: Envelope, options: Options, answers: list[Answer], served: Served,
        deadline: float,
    ) -> AsyncGenerator[bytes, None]:  # fmt: skip
        """The server-sent events of one stream; an error after the headers is an event of its own."""
        form, counted = envelope.form, options.include_usage
        async with watched as job:
            try:
                opening = [chunk for answer in answers if (chunk := form.opening(answer))]
                for chunk in opening:
                    yield _event(envelope.chunk(chunk, counted=counted))
                async with contextlib.aclosing(self._pieces(job, answers, served)) as pieces:
                    while True:
                        async with _by(deadline):
                            found = await anext(pieces, None)
                        if found is None:
                            break
                        if not found:
                            yield b": waiting\n\n"
                            continue
                        answer, piece = found
                        if piece:
                            yield _event(envelope.chunk(form.piece(answer, piece), counted=counted))
                        if answer.finish:
                            yield _event(envelope.chunk(form.closing(answer), counted=counted))
                if counted:
                    yield _event(envelope.chunk(counts=usage(answers, options.n), counted=True))
                yield b"data: [DONE]\n\n"
            except Exception as error:
                status, body, _ = _explain(error)
                log.warning("a stream ended with %d: %s", status, error)
                yield _event(body)


class _Watched:
    """A job that ends when its client goes away, or when the block is left."""

    def __init__(self, job: Job, request: Request):
        self.gone = False
        self.started, self.next, self.cancel = job.started, job.next, job.cancel
        self._watch = asyncio.create_task(self._look(request))

    async def _look(self, request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.gone = True
        self.cancel()

    async def __aenter__(self) -> "_Watched":
        return self

    async def __aexit__(self, *error: object) -> None:
        self._watch.cancel()
        self.cancel()


class _Embedding:
    """Texts become vectors a few at a time, so that a client that goes away is noticed."""

    def __init__(self, model: Any, texts: list[str]):
        self.model, self.texts, self.tokens, self._cancelled = model, texts, 0, False

    def cancel(self) -> None:
        self._cancelled = True

    def __iter__(self) -> Iterator[np.ndarray]:
        most = self.model.plan.context
        lengths = [len(self.model.tokenizer.encode(text)) for text in self.texts]
        if max(lengths) > most:
            why = f"Text {int(np.argmax(lengths))} has {max(lengths)} tokens; the model takes {most}."
            raise RequestError("input", "context_length_exceeded", why, "Split it.")
        self.tokens = sum(lengths)
        for start in range(0, len(self.texts), _EMBED_AT_ONCE):
            if self._cancelled:
                return
            yield self.model.embed(self.texts[start : start + _EMBED_AT_ONCE])


class _EventStream(Response):
    """Sends events as they come and closes them whatever happens; a client that stops reading meets the deadline."""

    def __init__(self, events: AsyncGenerator[bytes, None], deadline: float):
        super().__init__(headers={"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"})
        del self.headers["content-length"]
        self._events, self._deadline = events, deadline

    async def __call__(self, scope, receive, send) -> None:
        async with contextlib.aclosing(self._events) as events, asyncio.timeout_at(self._deadline + _LAST_SECONDS):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for event in events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b""})


class Penalties:
    """A logit processor: OpenAI's frequency and presence penalties, over what was generated, and logit_bias."""

    def __init__(self, options: Options):
        self.frequency, self.presence = options.frequency_penalty, options.presence_penalty
        self.ids = np.array(list(options.logit_bias), np.int64)
        self.bias = np.array(list(options.logit_bias.values()), np.float32)
        self.counts: dict[int, int] = {}
        self._seen = -1  # tokens of the history that were counted, the prompt included

    def __call__(self, history: Sequence[int], logits: np.ndarray) -> np.ndarray:
        self._seen = len(history) if self._seen < 0 else self._seen
        for token in history[self._seen :]:
            self.counts[token] = self.counts.get(token, 0) + 1
        self._seen = len(history)
        logits = logits.copy()
        if self.counts and (self.frequency or self.presence):
            seen, times = np.array([*self.counts]), np.array([*self.counts.values()], np.float32)
            logits[seen] -= self.frequency * times + self.presence
        logits[self.ids] += self.bias
        return logits


def _conversation(model: Any, wanted: ChatRequest, tools: list[dict[str, Any]]) -> dict[str, Any]:
    """The messages, and the tools, as the model's own template takes them."""
    if not model.chat_template:
        why = "This model has no chat template."
        raise RequestError("model", "model_not_suitable", why, "Use /v1/completions.")
    if knows_tools(model.chat_template):
        return {"prompt": wanted.messages, "tools": tools or None}
    return {"prompt": without_tools(wanted.messages, tools)}


def _constraint(model: Any, wanted: ChatRequest, tools: list[dict[str, Any]]) -> Any:
    """What keeps the answer to a schema or to one call; None where it is free."""
    called = wanted.tool_choice.removeprefix("function:") if wanted.tool_choice.startswith("function:") else None
    try:
        if tools and wanted.tool_choice != "auto":
            return model.constrain(lark=call_grammar(tools, called))
        if wanted.schema is None:
            return None
        return model.constrain(json_schema=wanted.schema) if wanted.schema else model.constrain(json_object=True)
    except UsageError as error:
        name = "tools" if tools else "response_format"
        raise RequestError(name, "invalid_value", f"{error.what} {error.why}", error.fix) from None


def _generate(model: Any, options: Options, choice: int, name: str, **more: Any) -> Source:
    """Starts one generation; what it refuses of the prompt is the client's parameter `name`."""
    if wrong := [token for token in options.logit_bias if token >= model.card.vocab]:
        raise RequestError(f"logit_bias.{wrong[0]}", "invalid_value", "The model has no such token.", "Correct it.")
    penal = options.frequency_penalty or options.presence_penalty or options.logit_bias
    sampling = Sampling(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=max(options.top_p, 1e-6),  # 0 means the likeliest token alone
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        seed=None if options.seed is None else (options.seed + choice) % (1 << 63),
        processors=(Penalties(options),) if penal else (),
    )
    try:
        return model.generate(
            max_tokens=options.max_tokens, stop=options.stop, sampling=sampling,
            logprobs=options.logprobs or 0, **more,
        )  # fmt: skip
    except ContextError as error:
        why, fix = f"{error.what} {error.why}", "Shorten it or ask for fewer tokens."
        raise RequestError(name, "context_length_exceeded", why, fix) from None
    except RequestError:
        raise
    except UsageError as error:
        raise RequestError(name, "invalid_value", f"{error.what} {error.why}", error.fix) from None


def _describe(served: Served) -> dict[str, Any]:
    return {"id": served.name, "object": "model", "created": served.created, "owned_by": "shoal"}


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":"), allow_nan=False).encode() + b"\n\n"


@contextlib.asynccontextmanager
async def _by(deadline: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout_at(deadline):
            yield
    except TimeoutError:
        why = "The request's time is over."
        raise RequestError(None, "timeout", why, "Ask for fewer tokens, or later.", 504) from None


async def _refusal(request: Request, error: Exception) -> Response:
    status, body, headers = _explain(error)
    if status == 500 and isinstance(error, ShoalError):  # any other goes on, and is logged by the gate
        log.error("%s %s: %d", request.method, request.url.path, status, exc_info=error)
    return JSONResponse(body, status, headers)


def _explain(error: Exception) -> tuple[int, dict[str, Any], dict[str, str]]:
    """(status, body, headers) of a failure, in OpenAI's error shape. A fault of ours shows no more than its name."""
    status, kind = 500, "server_error"
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = {}
    message = "The server failed; its log says why."
    if isinstance(error, HTTPException):
        status, message = error.status_code, str(error.detail)
        headers = dict(error.headers or {})
    elif isinstance(error, ClientDisconnect):
        status, message = _GONE, "The client went away."
    elif isinstance(error, RequestError):
        status, param, code = error.status, error.param, error.error_code
        message = f"{error.what} {error.why} {error.fix}"
        if error.retry_after:
            headers["retry-after"] = str(error.retry_after)
        if status == 504:
            headers["x-should-retry"] = "false"  # clients of OpenAI's would double the load
    elif isinstance(error, BusyError):
        status, code, message = 429, "queue_full", f"{error.what} {error.why} {error.fix}"
    elif isinstance(error, UsageError | ContextError):  # while it ran: a grammar too complex, a context that shrank
        status, message = 400, f"{error.what} {error.why} {error.fix}"
        code = "invalid_value" if isinstance(error, UsageError) else "context_length_exceeded"
    elif isinstance(error, ShoalError):
        code, message = type(error).__name__, error.what
    if 400 <= status < 500:
        kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}.get(
            status, "invalid_request_error"
        )
    return status, {"error": {"message": message, "type": kind, "param": param, "code": code}}, headers
