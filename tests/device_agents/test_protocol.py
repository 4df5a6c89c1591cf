"""The protocol by what two sides say to each other; test_protocol_rules.py has what they must not say."""

import pytest

from shoal.device_agents import frames, pace
from shoal.device_agents.frames import Type, varint
from shoal.device_agents.protocol import (
    Answered,
    Closed,
    Code,
    Data,
    Ended,
    GoingAway,
    Limits,
    Opened,
    Priority,
    Protocol,
    ProtocolError,
    Reset,
    RoundTrip,
    State,
)
from shoal.device_agents.states import FIRST_CREDIT, MAX_HEAD
from shoal.runtime.errors import BusyError, LinkError, UsageError

CONTROL, LATENT, BULK = Priority


def pair(**options):
    return Protocol(True, 0.0, **options), Protocol(False, 0.0, **options)


def move(source, target, now=0.0):
    """All that waits at `source`, and what `target` says of it."""
    events = []
    while chunk := source.next_chunk(now):
        assert len(chunk) <= source.chunk
        events += target.receive(chunk, now)
    return events


def raw(type, stream, payload=b"", end=False):
    return frames.Encoder().frame(type, stream, payload, end)


def opening(stream, head=b"", body=b"", priority=CONTROL, end=False):
    return raw(Type.OPEN, stream, bytes((priority,)) + varint(len(head)) + head + body, end)


def seen(data):
    """The frames of some bytes."""
    decoder = frames.Decoder()
    decoder.feed(data)
    return list(iter(decoder.next, None))


def test_a_request_and_its_answer():
    device, edge = pair()
    stream = device.open(LATENT, b"infer", end=False)
    device.write(stream, b"latent")
    device.end(stream)
    assert move(device, edge) == [Opened(stream, LATENT, b"infer"), Data(stream, b"latent"), Ended(stream)]
    edge.answer(stream, b"inferred")
    edge.write(stream, memoryview(b"logits"))
    edge.end(stream)
    assert move(edge, device) == [Answered(stream, b"inferred"), Data(stream, b"logits"), Ended(stream)]
    assert not device.idle and not edge.idle  # what came is still held by their callers
    edge.consumed(stream, 6)
    device.consumed(stream, 6)
    assert device.idle and edge.idle


def test_a_whole_request_is_one_frame_of_few_bytes():
    device, _ = pair()
    stream = device.open(CONTROL, b"head")
    device.write(stream, b"body")
    device.end(stream)
    assert len(device.next_chunk(0.0)) == 3 + 2 + 8  # type, stream, length; priority, head length


def test_bulk_costs_three_bytes_a_chunk():
    device, edge = pair(rate=11_520)
    stream = device.open(BULK, b"")
    move(device, edge)
    device.write(stream, bytes(5000))
    device.next_chunk(0.0)  # names the stream, if nothing did since
    chunk = device.next_chunk(0.0)
    assert chunk[0] == frames.BRIEF and len(seen(b"\0\x01" + varint(1) + b"." + chunk)[1].payload) == len(chunk) - 3


def test_both_sides_open_and_their_streams_do_not_meet():
    device, edge = pair()
    ours, theirs = device.open(CONTROL, b"a", end=True), edge.open(CONTROL, b"b", end=True)
    assert ours != theirs
    assert move(device, edge) == [Opened(ours, CONTROL, b"a"), Ended(ours)]
    assert move(edge, device) == [Opened(theirs, CONTROL, b"b"), Ended(theirs)]


def test_a_head_of_64_kib_crosses_a_slow_line_in_pieces():
    device, edge = pair(rate=1000)
    stream = device.open(BULK, bytes(MAX_HEAD), end=True)
    assert device.chunk == pace.MIN_CHUNK
    assert move(device, edge) == [Opened(stream, BULK, bytes(MAX_HEAD)), Ended(stream)]
    with pytest.raises(UsageError):
        device.open(BULK, bytes(MAX_HEAD + 1))


def test_credit_holds_the_sender_until_the_reader_reads():
    device, edge = pair()
    stream = device.open(BULK, b"")
    device.write(stream, bytes(1 << 20))
    device.end(stream)
    came = sum(len(event.data) for event in move(device, edge) if isinstance(event, Data))
    assert came == FIRST_CREDIT and device.queued(stream) == (1 << 20) - came
    move(edge, device)  # the window opens: nothing was read yet
    came += sum(len(event.data) for event in move(device, edge) if isinstance(event, Data))
    assert came == edge.limits.window
    assert not move(edge, device) and not device.next_chunk(0.0)
    events = []
    while not any(isinstance(event, Ended) for event in events):
        edge.consumed(stream, came)
        move(edge, device)
        events = move(device, edge)
        came = sum(len(event.data) for event in events if isinstance(event, Data))
    assert device.queued(stream) == 0


def test_a_stalled_stream_holds_up_no_other():
    device, edge = pair()
    stalled, other = device.open(BULK, b""), device.open(BULK, b"")
    device.write(stalled, bytes(1 << 20))
    move(device, edge)
    device.write(other, b"through")
    assert Data(other, b"through") in move(device, edge)


def test_streams_of_one_priority_take_turns_and_latents_go_by_deadline():
    device, _ = pair(rate=11_520)
    first, second = device.open(BULK, b""), device.open(BULK, b"")
    for stream in first, second:
        device.write(stream, bytes(3000))
    late, soon = device.open(LATENT, b"", deadline=9.0), device.open(LATENT, b"", deadline=5.0)
    for stream in late, soon:
        device.write(stream, bytes(3000))
    order = [frame.stream for frame in seen(b"".join(device.next_chunk(0.0) for _ in range(40)))]
    latents = [stream for stream in order if stream in (late, soon)]
    bulks = [stream for stream in order if stream in (first, second)]
    assert order == latents + bulks
    assert latents == sorted(latents, key=[soon, late].index)
    assert {bulks[0], bulks[1]} == {first, second} and bulks[0:2] == bulks[2:4]


def test_a_late_latent_is_dropped_whether_its_opening_went_or_not():
    device, edge = pair(rate=11_520)
    begun = device.open(LATENT, b"old", deadline=1.0)
    device.write(begun, bytes(2000))
    edge.receive(device.next_chunk(0.5), 0.5)
    unsent = device.open(LATENT, b"older", deadline=0.75)
    assert device.wakeup(0.6) == 0.75
    assert [event.stream for event in device.tick(0.8)] == [unsent]
    assert device.wakeup(0.8) == 1.0
    chunk = device.next_chunk(1.0)
    [dropped] = device.tick(1.0)
    assert (dropped.stream, dropped.code) == (begun, Code.STALE)
    assert edge.receive(chunk, 1.0) == [Reset(begun, Code.STALE, "")]
    assert device.idle and edge.idle


def test_a_reset_ends_both_halves_and_what_was_under_way_is_ignored():
    device, edge = pair()
    stream = device.open(BULK, b"")
    move(device, edge)
    edge.answer(stream, b"")
    device.reset(stream, 112, "not needed\nany more\x1b[31m")
    edge.write(stream, b"crosses the reset")
    assert move(edge, device) == []
    assert move(device, edge) == [Reset(stream, 112, "not needed\nany more?[31m")]
    assert device.idle and edge.idle
    with pytest.raises(UsageError):
        edge.write(stream, b"")
    edge.reset(stream), edge.consumed(stream, 1), edge.stop(stream)  # may come late
    assert edge.idle


def test_a_stream_reset_before_it_was_sent_was_never_there():
    device, edge = pair()
    device.reset(device.open(BULK, b"head"))
    assert not device.next_chunk(0.0) and device.idle
    stream = device.open(CONTROL, b"", end=True)
    assert move(device, edge) == [Opened(stream, CONTROL, b""), Ended(stream)]


def test_a_stream_reset_inside_its_head_is_not_reported():
    device, edge = pair(rate=1000)
    stream = device.open(BULK, bytes(1000))
    assert edge.receive(device.next_chunk(0.0), 0.0) == []
    device.reset(stream)
    assert move(device, edge) == [] and edge.idle


def test_an_early_answer_stops_the_rest_of_the_request():
    device, edge = pair()
    stream = device.open(LATENT, b"")
    device.write(stream, bytes(1 << 20))
    move(device, edge)
    edge.answer(stream, b"busy", end=True)
    edge.stop(stream)
    events = move(edge, device)
    assert events == [Answered(stream, b"busy"), Ended(stream), Reset(stream, Code.DONE, "")]
    assert device.idle and edge.idle


def test_what_is_not_wanted_is_not_reported():
    device, edge = pair()
    stream = device.open(LATENT, b"")
    device.write(stream, b"seen")
    move(device, edge)
    edge.stop(stream)
    device.write(stream, bytes(1 << 20))
    assert move(device, edge) == [] and not edge.next_chunk(0.0)
    device.reset(stream)
    assert move(device, edge) == [Reset(stream, Code.CANCELLED, "")]
    whole = device.open(LATENT, b"", end=False)
    move(device, edge)
    edge.stop(whole)
    device.end(whole)
    assert move(device, edge) == []
    edge.answer(whole, end=True)
    assert move(edge, device) == [Answered(whole, b""), Ended(whole)]
    assert device.idle and edge.idle


def test_no_credit_is_sent_for_a_body_that_has_ended():
    device, edge = pair()
    stream = device.open(BULK, b"")
    device.write(stream, bytes(FIRST_CREDIT))
    device.end(stream)
    move(device, edge)
    edge.consumed(stream, FIRST_CREDIT)
    assert not edge.next_chunk(0.0) and not edge.idle


def test_a_number_may_be_sent_after_a_higher_one():
    device, edge = pair()
    bulk, control = device.open(BULK, b"", end=True), device.open(CONTROL, b"", end=True)
    assert [event.stream for event in move(device, edge)] == [control, control, bulk, bulk]
    edge.reset(control)
    for late in raw(Type.CREDIT, control, b"\1"), raw(Type.RESET, control, b"\0"), raw(Type.DATA, control, b"x"):
        assert edge.receive(late, 0.0) == []  # sent before the reset came


def test_windows_leave_half_of_the_buffers_to_streams_to_come():
    device = Protocol(True, 0.0)
    edge = Protocol(False, 0.0, limits=Limits(window=128 << 10, buffered=1 << 20))
    for _ in range(10):
        device.write(device.open(BULK, b""), bytes(1 << 20))
        move(device, edge)
    # the first four windows were opened wide, which is half of the buffers; the others stay as they began
    assert sum(len(frame.payload) > 1 for frame in seen(edge.next_chunk(0.0)) if frame.type == Type.CREDIT) == 4
    assert edge.open(CONTROL, b"")


def test_a_chunk_is_of_one_priority_and_as_short_as_that_is():
    device, _ = pair(rate=1000)
    latents, bulk = [device.open(LATENT, b"") for _ in range(2)], device.open(BULK, b"")
    device.write(bulk, bytes(1000))
    while len(device.next_chunk(0.0)) < 200:
        pass  # until all were opened
    device.open(CONTROL, b"head")
    for stream in latents:
        device.reset(stream, 112, "w" * 200)
    sent = [[frame.type for frame in seen(b"\0\1\1." + device.next_chunk(0.0))][1:] for _ in range(4)]
    assert sent == [[Type.OPEN], [Type.RESET], [Type.RESET], [Type.DATA]]


def test_too_many_streams_are_refused_by_both_sides():
    device, edge = Protocol(True, 0.0), Protocol(False, 0.0, limits=Limits(streams=4))
    streams = [device.open(CONTROL, b"", end=True) for _ in range(6)]
    assert sum(isinstance(event, Opened) for event in move(device, edge)) == 4
    assert move(edge, device) == [Reset(stream, Code.BUSY, "") for stream in streams[4:]]
    with pytest.raises(BusyError):
        [edge.open(CONTROL, b"") for _ in range(5)]


def test_what_a_peer_makes_a_side_hold_is_bounded():
    limits = Limits(streams=1000, buffered=1 << 20)
    device, edge = (
        Protocol(True, 0.0, limits=Limits(streams=1000, buffered=1 << 30)),
        Protocol(False, 0.0, limits=limits),
    )
    held = 0
    for _ in range(100):
        stream = device.open(BULK, bytes(10_000))
        device.write(stream, bytes(1 << 20))
    for _ in range(20):
        for event in move(device, edge):
            held += len(getattr(event, "data", b"")) + len(getattr(event, "head", b""))
        move(edge, device)
    assert 0.5 * limits.buffered < held <= limits.buffered


def test_an_answer_that_does_not_fit_ends_its_stream():
    device, edge = pair(limits=Limits(buffered=FIRST_CREDIT + 100))
    stream = device.open(CONTROL, b"", end=True)
    move(device, edge)
    edge.answer(stream, bytes(101), end=True)
    [reset] = move(edge, device)
    assert (reset.stream, reset.code) == (stream, Code.BUSY) and device.state is State.OPEN


def test_a_peer_that_never_reads_its_refusals_is_refused():
    edge = Protocol(False, 0.0, limits=Limits(streams=4))
    with pytest.raises(ProtocolError, match="does not read"):
        for stream in range(1, 100, 2):
            edge.receive(opening(stream), 0.0)


def test_pings_are_answered_and_measured_and_many_make_one_answer():
    device, edge = pair()
    device.ping()
    edge.receive(device.next_chunk(5.0), 5.1)
    assert device.receive(edge.next_chunk(5.2), 5.25) == [RoundTrip(0.25)]
    assert device.receive(raw(Type.PONG, 0, b"\1"), 6.0) == []  # nobody asked
    for number in range(200):
        edge.receive(raw(Type.PING, 0, bytes((number,))), 6.0)
    assert edge.next_chunk(6.0) == raw(Type.PONG, 0, b"\xc7")


def run(sides, until, cut=None, took=lambda: True):
    """The two sides by their wake-ups alone, from `cut` on with nothing that arrives; when each was closed, and why."""
    now, closed = 0.0, {}
    while now < until and len(closed) < len(sides):
        for side, other in zip(sides, reversed(sides), strict=True):
            for event in side.tick(now):
                if isinstance(event, Closed):
                    closed[side] = now, event.why
            due = side.wakeup(now)
            assert due is None or due > now
            while took() and (chunk := side.next_chunk(now)):
                if cut is None or now < cut:
                    assert not any(isinstance(event, Closed) for event in other.receive(chunk, now))
        now = min([due for side in sides if (due := side.wakeup(now))], default=until)
    return closed


def test_an_idle_line_is_kept_alive_and_a_dead_one_is_noticed():
    assert run(pair(), until=1000) == {}
    device, edge = sides = pair()
    closed = run(sides, until=1000, cut=100)
    assert closed.keys() == {device, edge}
    for when, why in closed.values():
        assert 120 <= when <= 140 and why == "the line brought nothing for 30 s"
    assert device.state is State.CLOSED and device.wakeup(when) is None and not device.next_chunk(when)


def test_a_line_that_takes_nothing_is_noticed_though_the_peer_talks():
    device, _ = pair()
    now, events = 0.0, []
    stream = device.open(BULK, b"")
    while not events and now < 100:
        now += 5
        device.write(stream, b"waits")
        device.receive(raw(Type.PONG, 0, b"."), now)
        events = device.tick(now)
    assert events == [Closed("the line took nothing for 30 s")] and now == 30


def test_a_late_tick_is_not_taken_for_a_line_that_takes_nothing():
    device, _ = pair()
    device.receive(raw(Type.PONG, 0, b"."), 39.0)
    assert device.tick(40.0) == [] and device.wakeup(40.0) == 69.0
    assert device.next_chunk(41.0) == raw(Type.PING, 0, b"\1")


def test_a_slow_line_that_moves_is_not_given_up():
    device, edge = pair()
    stream = device.open(BULK, b"")
    now = 0.0
    move(device, edge)
    for _ in range(60):  # a byte every 20 s, either way
        now += 20
        device.write(stream, b".")
        for source, target in (device, edge), (edge, device):
            for byte in source.next_chunk(now):
                target.receive(bytes((byte,)), now)
            target.tick(now)
    assert device.state is edge.state is State.OPEN


def test_going_away_finishes_what_is_under_way():
    device, edge = pair()
    old = device.open(CONTROL, b"old", end=True)
    move(device, edge)
    edge.go_away("restart")
    crossing = device.open(CONTROL, b"new", end=True)
    assert move(device, edge) == []
    assert move(edge, device) == [GoingAway("restart"), Reset(crossing, Code.GOING_AWAY, "")]
    for side in device, edge:
        with pytest.raises(BusyError):
            side.open(CONTROL, b"")
    edge.answer(old, b"done", end=True)
    assert move(edge, device) == [Answered(old, b"done"), Ended(old)]
    assert device.idle and edge.idle and device.state is edge.state is State.LEAVING


def test_closing_says_why_and_drops_the_rest():
    device, edge = pair()
    device.open(BULK, b"lost")
    device.close("power off")
    assert not device.idle
    assert move(device, edge) == [Closed("power off")]
    assert device.idle and edge.idle and edge.receive(b"\xff" * 99, 1.0) == []
    with pytest.raises(BusyError):
        device.open(CONTROL, b"")
    device.close(), device.go_away(), device.ping()
    assert not device.next_chunk(1.0) and device.wakeup(1.0) is None


def test_what_came_before_an_error_is_reported_before_it():
    edge = Protocol(False, 0.0)
    assert edge.receive(opening(1, b"good", end=True) + b"\x0f", 0.0) == [Opened(1, CONTROL, b"good"), Ended(1)]
    assert edge.wakeup(0.0) == 0.0
    with pytest.raises(ProtocolError, match="type is 15"):
        edge.tick(0.0)
    assert edge.tick(0.0) == [] and edge.wakeup(0.0) is None
    [last] = seen(edge.next_chunk(0.0))
    assert last.type == Type.CLOSE and b"15" in last.payload
    assert issubclass(ProtocolError, LinkError)


def test_unknown_frames_are_ignored_where_they_say_so():
    edge = Protocol(False, 0.0)
    about_stream, about_line = bytes((0x80 | 9, 5, 2)) + b"??", bytes((0x80 | 0x20 | 0x40 | 30, 1)) + b"?"
    for data in about_stream, about_line:
        assert edge.receive(data, 0.0) == []
    assert edge.receive(bytes((0x80 | Type.OPEN, 1, 3, 0, 1)) + b"h", 0.0) == [Opened(1, CONTROL, b"h")]
    for type in sorted(set(range(32)) - set(Type)):
        with pytest.raises(ProtocolError):
            Protocol(False, 0.0).receive(bytes((type,)), 0.0)


def test_calls_out_of_order_are_refused_without_harm():
    device, edge = pair()
    stream = device.open(CONTROL, b"head")
    for wrong in (
        lambda: device.answer(stream),
        lambda: device.consumed(stream, 1),
        lambda: device.write(99, b""),
        lambda: device.end(99),
        lambda: device.answer(99),
    ):
        with pytest.raises(UsageError):
            wrong()
    device.end(stream)
    with pytest.raises(UsageError):
        device.write(stream, b"more")
    assert move(device, edge) == [Opened(stream, CONTROL, b"head"), Ended(stream)]
    with pytest.raises(UsageError):
        edge.write(stream, b"before the answer")
    edge.answer(stream, end=True)
    with pytest.raises(UsageError):
        edge.answer(stream)
    assert move(edge, device) == [Answered(stream, b""), Ended(stream)]


def test_a_chunk_is_as_long_as_the_line_is_fast():
    assert Protocol(True, 0.0, rate=11_520).chunk == 518
    assert Protocol(True, 0.0, rate=92_160).chunk == 4147
    assert Protocol(True, 0.0, rate=10).chunk == pace.MIN_CHUNK
    assert Protocol(True, 0.0, rate=1e9).chunk == Protocol(True, 0.0).chunk == pace.MAX_CHUNK


def test_a_line_of_unknown_rate_is_measured():
    device, edge = pair()
    assert device.rate is None
    stream = device.open(BULK, b"")
    device.next_chunk(0.0)
    device.receive(raw(Type.CREDIT, stream, varint(10 << 20)), 0.0)
    device.write(stream, bytes(4 << 20))
    now, line = 1.0, 0.0
    for _ in range(200):  # a socket whose buffer holds 64 KB, on a line of 10 KB/s
        line = max(line, now) + len(device.next_chunk(now)) / 10_000
        now = max(now, line - 6.4)
    assert device.rate == pytest.approx(10_000, rel=0.1) and device.chunk == pytest.approx(450, rel=0.1)
