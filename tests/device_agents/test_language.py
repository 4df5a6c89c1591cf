"""Text from a model in two parts, and from a whole one on the edge: the tokens of the whole model, whatever the link
does at whatever message, with sessions that are evicted, overtaken and resumed."""

import asyncio
import contextlib
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import shoal
from shoal.device_agents import split_model
from shoal.device_agents.language import Language
from shoal.device_agents.messages import Continue, Continued, Generate, decode, encode
from shoal.device_agents.sessions import Sessions
from shoal.device_agents.split_model import EdgeModel, SplitModel
from shoal.device_agents.store import Store
from shoal.runtime.errors import BusyError, ContextError, LinkError, ShoalError, UsageError
from shoal.runtime.language import streams
from shoal.runtime.language.part import load_part

GREEDY = json.loads((Path(__file__).resolve().parents[1] / "data" / "greedy.json").read_text())["smollm2"]["answers"]
PROMPT = [5, 99, 7, 201, 33, 8, 150]


class Link:
    """A connection in memory. Messages and pieces of bodies are counted both ways; the one numbered `cut` kills it,
    before it arrives, or with `late` after."""

    def __init__(self, language, owner="device", cut=None, late=False):
        self.language, self.owner, self.cut, self.late = language, owner, cut, late
        self.peer = SimpleNamespace(name="oak")
        self.dead, self.passed, self.bytes, self.calls, self.tasks = False, 0, 0, [], []

    def request(self, message, *, priority=None, timeout=10.0, body=None, more=False):
        call, other = End(self, message), End(self, decode(encode(message)))
        call.other, other.other = other, call
        self.calls.append((call, other))
        if self.step(len(encode(message))):
            self.tasks.append(asyncio.get_running_loop().create_task(self.serve(other)))
            if not more:
                call.finish(body)
        self.check()
        return call

    async def serve(self, call):
        try:
            await self.language.serve(call, self.owner)
            if not call.finished:
                call.finish(None)
        except ShoalError as error:
            call.other.fail(error)

    def step(self, size=0) -> bool:
        """One thing crosses: whether it arrives."""
        if self.dead:
            return False
        self.passed, self.bytes = self.passed + 1, self.bytes + size
        if self.passed - 1 == self.cut:
            self.die()
            return self.late
        return True

    def die(self):
        self.dead = True
        for call in (end for pair in self.calls for end in pair):
            call.fail(LinkError("The link broke.", "The test cut it.", "Connect again."))

    def check(self):
        if self.dead:
            raise LinkError("The link broke.", "The test cut it.", "Connect again.")


class End:
    """One side's Call."""

    def __init__(self, link, message):
        self.link, self.message, self.peer = link, message, None
        self.other, self.error, self.finished, self.ended, self.answered = None, None, False, False, None
        self.buffer, self.changed = bytearray(), asyncio.Event()

    def fail(self, error):
        self.error = self.error or error
        self.changed.set()

    def finish(self, body):
        if body:
            self.push(body)
        self.finished = True
        self.other.ended = True
        self.other.changed.set()

    def push(self, data):
        self.other.buffer += data
        self.other.changed.set()

    async def until(self, done):
        while not done():
            if self.error:
                raise self.error
            self.changed.clear()
            await self.changed.wait()

    async def answer(self, message=None, body=None):
        if self.error:
            raise self.error
        if self.link.step(len(encode(message)) + len(body or b"")):
            self.other.answered = decode(encode(message))
            self.other.changed.set()
            if body is not None:
                self.finish(body)
        self.link.check()

    async def reply(self, timeout=None):
        await self.until(lambda: self.answered is not None)
        return self.answered

    async def write(self, data):
        if self.error:
            raise self.error
        if self.link.step(len(data)):
            self.push(data)
        self.link.check()
        await asyncio.sleep(0)

    async def end(self):
        if self.link.step():
            self.finish(None)
        self.link.check()

    async def exactly(self, size):
        await self.until(lambda: len(self.buffer) >= size or self.ended)
        data = bytes(self.buffer[:size])
        del self.buffer[:size]
        return data

    async def read(self, limit):
        await self.until(lambda: self.ended)
        data, self.buffer = bytes(self.buffer), bytearray()
        assert len(data) <= limit
        return data

    def cancel(self, why=""):
        self.other.fail(LinkError("The call was cancelled.", "", ""))

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        if not (self.finished and self.ended):
            self.cancel()


class Links:
    """`connect` of a device: a new link where the last one died. The first is cut at `cut`."""

    def __init__(self, language, owner="device", cut=None, late=False):
        self.make = lambda cut=None: Link(language, owner, cut, late)
        self.all = [self.make(cut)]

    async def __call__(self):
        if self.all[-1].dead:
            self.all.append(self.make())
        return self.all[-1]


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    monkeypatch.setattr(split_model, "_PAUSES", (0.0,))


@pytest.fixture(scope="module")
def bundles(tiny_folder, tmp_path_factory):
    """A store with the rest (from block 1) and the whole of the tiny llama, and the front beside it."""
    folder = tmp_path_factory.mktemp("split")
    store = Store(folder / "store")
    for name, blocks in (("front", "0:1"), ("rest", "1:3"), ("whole", None)):
        shoal.convert(tiny_folder, folder / f"{name}.shoal", "fp32", blocks=blocks, check_parity=False)
    rest, whole = (store.add(folder / f"{name}.shoal", name).digest for name in ("rest", "whole"))
    with load_part(folder / "front.shoal", context=64, chunk=4) as front:
        yield SimpleNamespace(store=store, front=front, rest=rest, whole=store.path(whole))


@pytest.fixture(scope="module")
def expected(bundles) -> list[int]:
    """What the whole model goes on with after PROMPT."""
    with shoal.load(bundles.whole, context=64) as model:
        return [token.id for token in model.generate(PROMPT, max_tokens=24, ignore_end=True)]


@contextlib.asynccontextmanager
async def edge(bundles, **options):
    language = Language(bundles.store, **(dict(slots=4, context=64, hold=0.0, keep=5.0) | options))
    try:
        yield language
    finally:
        await language.close()


async def ids(generation) -> list[int]:
    return [piece.id async for piece in generation]


def split(bundles, links, **options):
    return SplitModel(bundles.front, links, **(dict(format="float32", patience=5.0) | options))


# Two parts


@pytest.mark.parametrize("late", [False, True])
def test_a_link_that_dies_at_any_message(bundles, expected, late):
    """Before and after that message arrives: the same tokens, and nothing is sent twice that the edge has."""

    async def run():
        async with edge(bundles) as language:
            links = Links(language)
            assert await ids(split(bundles, links).generate(PROMPT, max_tokens=6, ignore_end=True)) == expected[:6]
            clean = links.all[0]
            assert clean.passed > 24
            for cut in range(clean.passed):
                links = Links(language, cut=cut, late=late)
                pieces = [p async for p in split(bundles, links).generate(PROMPT, max_tokens=6, ignore_end=True)]
                assert [piece.id for piece in pieces] == expected[:6], cut
                assert len(links.all) == 2 or cut == clean.passed - 1
                assert {piece.where for piece in pieces} == {"oak"} and pieces[-1].finish == "length"
                # What it takes to ask and to say it again, the last row, and of the prompt what did not arrive
                more = sum(link.bytes for link in links.all) - clean.bytes
                assert more < 2 * 4 * 48 + 500 if cut > 2 else more < 7 * 4 * 48 + 500

    asyncio.run(run())


def test_a_conversation_sends_what_is_new(bundles, expected):
    async def run():
        async with edge(bundles) as language:
            model = split(bundles, Links(language))
            pieces = [piece async for piece in model.generate(PROMPT, max_tokens=8, ignore_end=True)]
            assert [piece.sent for piece in pieces] == [len(PROMPT)] + [1] * 7
            # The last token of an answer was never fed
            more = [piece async for piece in model.generate([*PROMPT, *expected[:8]], max_tokens=8, ignore_end=True)]
            assert [piece.id for piece in more] == expected[8:16] and [piece.sent for piece in more] == [1] * 8
            # Back to the middle of the prompt, on another way, and the first one again
            other = [*PROMPT[:4], 9, 9]
            first = [piece async for piece in model.generate(other, max_tokens=3, ignore_end=True)]
            assert first[0].sent == 2
            again = [piece async for piece in model.generate(PROMPT, max_tokens=8, ignore_end=True)]
            assert [piece.id for piece in again] == expected[:8] and again[0].sent == 3

    asyncio.run(run())


def test_sessions_share_steps_and_evicted_ones_resume(bundles, expected):
    """Six devices at once on four slots that nobody may keep, and on two that are held for a while."""

    async def run():
        async with edge(bundles) as language:
            with contextlib.ExitStack() as stack:
                fronts = [stack.enter_context(load_part(bundles.front.bundle.path, context=64)) for _ in range(6)]
                models = [
                    SplitModel(front, Links(language, f"device {n}"), format="float32")
                    for n, front in enumerate(fronts)
                ]
                runs = (ids(model.generate(PROMPT, max_tokens=16, ignore_end=True)) for model in models)
                assert await asyncio.gather(*runs) == [expected[:16]] * 6
                [shown] = language.snapshot()
                assert shown["kind"] == "part" and shown["sessions"] == 4 and shown["running"] == 0
                assert shown["runs"] < shown["positions"]
                sent = [p.sent async for p in models[0].generate([*PROMPT, *expected[:16]], max_tokens=2)]
                assert sent[0] in (1, 24)  # of an evicted session the row that did not fit, then all

    asyncio.run(run())


def test_a_full_edge_says_busy_and_a_device_goes_on_alone(bundles, expected):
    async def run():
        async with edge(bundles, slots=1, hold=60.0) as language:
            assert await ids(split(bundles, Links(language, "one")).generate(PROMPT, max_tokens=4)) == expected[:4]
            with pytest.raises(BusyError) as refused:
                await ids(split(bundles, Links(language, "two"), patience=0.1).generate(PROMPT, max_tokens=4))
            assert 50_000 < refused.value.retry_ms <= 60_000
            with shoal.load(bundles.whole, context=64) as local:
                model = split(bundles, Links(language, "two"), patience=0.1, local=local)
                pieces = [piece async for piece in model.generate(PROMPT, max_tokens=4, ignore_end=True)]
                assert [(piece.id, piece.where) for piece in pieces] == [(token, "device") for token in expected[:4]]
                # The link goes in the middle of an answer
                links = Links(language, "one", cut=9)
                model = split(bundles, links, patience=0.1, local=local)
                links.make = lambda: Link(language, cut=0)
                pieces = [piece async for piece in model.generate(PROMPT, max_tokens=24, ignore_end=True)]
                assert [piece.id for piece in pieces] == expected
                wheres = [piece.where for piece in pieces]
                assert wheres == ["oak"] * wheres.count("oak") + ["device"] * wheres.count("device")
                assert 0 < wheres.count("oak") < 24

    asyncio.run(run())


def test_sampling_on_the_edge_and_on_the_device(bundles, expected):
    """A seed gives the same text over a whole link and a broken one; what needs the history is chosen on the device."""

    async def run():
        async with edge(bundles) as language:
            options = dict(max_tokens=12, temperature=1.5, top_k=50, top_p=0.95, min_p=0.01, ignore_end=True)
            first = await ids(split(bundles, Links(language)).generate(PROMPT, seed=3, **options))
            assert first != expected[:12]
            cut = Links(language, cut=20, late=True)
            assert await ids(split(bundles, cut).generate(PROMPT, seed=3, **options)) == first
            assert await ids(split(bundles, Links(language)).generate(PROMPT, seed=4, **options)) != first
            with shoal.load(bundles.whole, context=64) as model:
                penalised = dict(max_tokens=12, repetition_penalty=3.0, ignore_end=True)
                known = [token.id for token in model.generate(PROMPT, **penalised)]
            assert known != expected[:12]
            assert await ids(split(bundles, Links(language, cut=11)).generate(PROMPT, **penalised)) == known

    asyncio.run(run())


def test_stop_strings_and_ends(bundles, expected):
    async def run():
        async with edge(bundles) as language:
            with shoal.load(bundles.whole, context=64) as model:
                whole = list(model.generate(PROMPT, max_tokens=24, ignore_end=True))
                stop = "".join(token.text for token in whole)[6:9]
                known = model.generate(PROMPT, max_tokens=24, ignore_end=True, stop=stop)
                text = known.finish()
            pieces = [
                piece
                async for piece in split(bundles, Links(language)).generate(
                    PROMPT, max_tokens=24, ignore_end=True, stop=stop
                )
            ]
            assert "".join(piece.text for piece in pieces) == text and pieces[-1].finish == known.stats.finish == "stop"

    asyncio.run(run())


def test_what_a_device_may_not_say(bundles):
    """Requests that make no sense are refused and leave the session as it was."""

    async def run():
        async with edge(bundles) as language:
            link, row = Link(language), streams.row_bytes(48)
            ask = dict(model=bundles.rest, session="s")

            async def send(body=b"", **fields):
                async with link.request(Continue(**(ask | fields)), body=body) as call:
                    return await call.reply()

            stream = bundles.front.forward(0, PROMPT, 0)
            good = await send(streams.pack(stream), rows=7)
            assert good.tokens and good.held == 7
            nan = np.full((1, 48), np.nan, "<f4").tobytes()
            for family, body, fields in (
                (ContextError, b"", dict(first=60, rows=5)), (UsageError, b"", dict(first=-1, rows=1)),
                (UsageError, b"", dict(rows=-1)), (UsageError, b"", dict(rows=1, dtype="int3")),
                (UsageError, b"", dict(rows=1, want="all")), (UsageError, b"", dict(rows=1, temperature=-1.0)),
                (LinkError, bytes(row - 1), dict(first=7, rows=1)), (LinkError, nan, dict(first=7, rows=1)),
                (LinkError, bytes(row), dict(first=7, rows=2)), (UsageError, b"", dict(model="nothing", rows=1)),
                (UsageError, b"", dict(model="a:1", rows=1)), (UsageError, b"", dict(model="whole", rows=1)),
                (UsageError, b"", dict(model=bundles.front.bundle.digest, rows=1)),
            ):  # fmt: skip
                with pytest.raises(family):
                    await send(body, **fields)
            assert (await send(first=40, rows=1)) == Continued("s", held=7)
            assert (await send(first=40)) == Continued("s", held=7)
            again = await send(streams.pack(stream[5:]), first=5, rows=2, turn=9)
            assert again.tokens == good.tokens and again.held == 7
            with pytest.raises(LinkError, match="overtaken"):
                await send(streams.pack(stream[5:]), first=5, rows=2, turn=8)
            logits = Continue(**ask, first=6, rows=1, want="logits", turn=10)
            async with link.request(logits, body=streams.pack(stream[6:])) as call:
                assert (await call.reply()).rows == 1
                assert np.frombuffer(await call.read(4 * 260), "<f4").argmax() == good.tokens[0]
            # A row that makes what is not a number ends its own request and no other in the same step
            huge = np.full((1, 48), 3e38, np.float32)
            results = await asyncio.gather(
                send(streams.pack(huge), session="other", rows=1), send(streams.pack(stream[6:]), first=6, rows=1),
                return_exceptions=True,
            )  # fmt: skip
            assert results[1].tokens == good.tokens
            assert [model["sessions"] for model in language.snapshot()] == [2]
            language.forget("device")
            assert [model["sessions"] for model in language.snapshot()] == [0]

    asyncio.run(run())


def test_memory_of_the_edge(bundles, expected):
    """A model that nobody uses makes room; one that never fits is refused with the table."""

    async def run():
        need = shoal.plan(bundles.whole, slots=4, context=64).total
        async with edge(bundles, memory=need + (1 << 20)) as language:
            links = Links(language)
            whole = EdgeModel(links, "whole")
            for _ in range(2):
                assert await ids(split(bundles, links).generate(PROMPT, max_tokens=3)) == expected[:3]
                assert await ids(whole.generate(PROMPT, max_tokens=3)) == expected[:3]
                assert [model["kind"] for model in language.snapshot()] == ["model"]
        least = shoal.plan(bundles.whole, slots=4, context=64, chunk=32, kv="fp16").total
        async with edge(bundles, memory=least + (1 << 18), context=None) as language:  # as long as there is room for
            await ids(EdgeModel(Links(language), "whole").generate(PROMPT, max_tokens=3))
            assert 64 <= language.snapshot()[0]["context"] < 256
        async with edge(bundles, memory=1 << 20) as language:
            with pytest.raises(ShoalError, match="does not fit"):
                await ids(split(bundles, Links(language)).generate(PROMPT, max_tokens=3))

    asyncio.run(run())


# A whole model


@pytest.mark.parametrize("late", [False, True])
def test_an_answer_goes_on_after_any_message(bundles, expected, late):
    async def run():
        async with edge(bundles) as language:
            clean = Links(language)
            assert await ids(EdgeModel(clean, "whole").generate(PROMPT, max_tokens=8)) == expected[:8]
            for cut in range(clean.all[0].passed):
                links = Links(language, cut=cut, late=late)
                pieces = [piece async for piece in EdgeModel(links, "whole").generate(PROMPT, max_tokens=8)]
                assert [piece.id for piece in pieces] == expected[:8]
                assert pieces[-1].finish == "length" and not any(piece.finish for piece in pieces[:-1])

    asyncio.run(run())


def test_an_answer_that_the_edge_has_lost_is_made_again(bundles, expected):
    async def run():
        async with edge(bundles) as first, edge(bundles) as second:
            options = dict(max_tokens=8, temperature=1.2, seed=5)
            links = Links(first)
            known = [piece async for piece in EdgeModel(links, "whole").generate(PROMPT, **options)]
            links = Links(first)
            found = []
            async for piece in EdgeModel(links, "whole").generate(PROMPT, **options):
                found.append(piece)
                if len(found) == 3:
                    links.all[-1].die()
                    links.make = lambda cut=None: Link(second)
            assert found == known
            with pytest.raises(UsageError):
                link = Link(first)
                message = Generate("whole", "x", tuple(PROMPT), temperature=1.0, first=3)
                async with link.request(message) as call:
                    await call.reply()
            text = [piece async for piece in EdgeModel(Links(first), "whole").generate("Hello", max_tokens=4)]
            assert len(text) == 4 and text[0].where == "oak"

    asyncio.run(run())


def test_an_answer_that_nobody_wants_ends(bundles):
    async def run():
        async with edge(bundles, keep=0.05) as language:
            model = EdgeModel(Links(language), "whole")
            for _ in range(6):  # more than a device may have at once
                async for _ in model.generate(PROMPT, max_tokens=50):
                    break
                await asyncio.sleep(0.1)
            assert not language._answers
            [shown] = language.snapshot()
            assert shown["running"] == 0

    asyncio.run(run())


# The real model


@pytest.mark.parametrize("cut", [15, pytest.param(1, marks=pytest.mark.deep), pytest.param(29, marks=pytest.mark.deep)])
def test_smollm2_in_two_parts_says_what_transformers_says(smollm2_gguf, tmp_path, cut):
    """48 greedy tokens on three prompts, over a link that is cut twice, in float32 and in float16."""
    store = Store(tmp_path / "store")
    options = dict(recipe="fp32", check_parity=False)
    shoal.convert(smollm2_gguf, tmp_path / "front", blocks=f"0:{cut}", **options)
    shoal.convert(smollm2_gguf, tmp_path / "rest", blocks=f"{cut}:30", **options)
    store.add(tmp_path / "rest", "rest")

    async def run(front):
        async with edge(SimpleNamespace(store=store), context=128, slots=2) as language:
            for answer, format in zip(GREEDY[:3], ("float32", "float32", "float16"), strict=True):
                links = Links(language, cut=60)
                model = SplitModel(front, links, format=format)
                found = await ids(model.generate(answer["ids"], max_tokens=48, ignore_end=True))
                assert found == answer["tokens"][:48] and len(links.all) == 2

    with load_part(tmp_path / "front", context=128) as front:
        asyncio.run(run(front))


# The policy


def test_who_loses_a_slot():
    sessions = Sessions(4, hold=10.0)  # two are a device's share
    a = [sessions.enter("a", str(n), 0, now=float(n)) for n in range(3)]
    b = sessions.enter("b", "0", 0, now=3.0)
    assert [session.slot for session in (*a, b)] == [0, 1, 2, 3] and sessions.calls == 4
    with pytest.raises(BusyError):  # beyond its share, but all of its own are busy
        sessions.enter("a", "3", 0, now=100.0)
    for at, session in enumerate((*a, b)):
        sessions.leave(session, 4.0 + at)
    with pytest.raises(BusyError) as refused:  # all are held
        sessions.enter("c", "0", 0, now=9.0)
    assert refused.value.retry_ms == 5000
    assert sessions.enter("a", "3", 0, now=9.0).slot == 0  # it loses its own oldest
    assert sessions.enter("c", "0", 0, now=15.5).slot == 1  # held no more
    with pytest.raises(BusyError):
        sessions.enter("c", "1", 0, now=15.5)
    assert sessions.enter("b", "0", 0, now=15.5) is b
    sessions.leave(b, 16.0)
    sessions.forget("b")
    assert len(sessions) == 3 and sessions.enter("b", "0", 0, now=16.0) is not b
