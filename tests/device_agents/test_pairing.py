"""Pairing by a code: the right one works once; every wrong, late, altered, replayed or reflected one fails."""

import copy
import itertools
import random
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.device_agents import pairing
from shoal.device_agents.identity import PACKED, Identity, pack
from shoal.device_agents.pairing import SECONDS, TRIES, Code, DevicePairing, EdgePairing, Window, qr
from shoal.runtime.errors import MissingPackageError, TrustError, UsageError

CODE = Code.parse("1234567" + pairing._check_digit("1234567"))
FLIGHTS = 4


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    return Identity.open(tmp_path_factory.mktemp("device"), "raspberrypi")


@pytest.fixture(scope="module")
def edge(tmp_path_factory):
    return Identity.open(tmp_path_factory.mktemp("edge"), "attic server")


@pytest.fixture(scope="module")
def mallory(tmp_path_factory):
    return Identity.open(tmp_path_factory.mktemp("mallory"), "attic server")


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return Identity.open(tmp_path_factory.mktemp("other"), "camera")


def wrong_codes(count: int, seed: int):
    """Codes that are well typed and not CODE."""
    rng = random.Random(seed)
    while count:
        digits = f"{rng.randrange(10**7):07}"
        if (code := Code(digits + pairing._check_digit(digits))) != CODE:
            count -= 1
            yield code


def converse(left: DevicePairing, right: EdgePairing, now: float = 1.0, alter=lambda flight, data: data):
    """Both sides until neither has more to say: (what each returned or raised, every flight as it was sent)."""
    results: list = [None, None]
    flights = []
    sides = [left, right]
    for turn in itertools.cycle((0, 1)):
        data = sides[turn].outgoing()
        if not data:
            return results, flights
        flights.append(data)
        try:
            results[1 - turn] = sides[1 - turn].receive(alter(len(flights) - 1, data), now) or results[1 - turn]
        except TrustError as error:
            results[1 - turn] = error


def paired(results, device, edge) -> bool:
    """Whether both sides have each other, neither is halfway; anything between is a failed test."""
    if all(isinstance(result, TrustError | None) for result in results):
        return False
    assert [(peer.certificate, peer.name, peer.role) for peer in results] == [
        (edge.certificate, edge.name, "edge"), (device.certificate, device.name, "device")
    ]  # fmt: skip
    return True


def test_the_right_code_pairs_and_takes_few_bytes(device, edge):
    window = Window(CODE, 0.0)
    results, flights = converse(DevicePairing(device, CODE), EdgePairing(edge, window, 1.0))
    assert paired(results, device, edge)
    assert window.state(1.0) == "used"
    names = len(device.name) + len(edge.name)
    assert [len(flight) for flight in flights] == [98 + len(device.name), 130 + len(edge.name), 49, 17]
    assert sum(map(len, flights)) == 294 + names


def test_bytes_may_come_one_by_one(device, edge):
    left, right = DevicePairing(device, CODE), EdgePairing(edge, Window(CODE, 0.0), 1.0)
    sides, results = [left, right], []
    for turn in (0, 1, 0, 1):
        data = sides[turn].outgoing()
        got = [sides[1 - turn].receive(data[i : i + 1], 1.0) for i in range(len(data))]
        assert not any(got[:-1])
        results.append(got[-1])
    assert results[:2] == [None, None] and paired([results[3], results[2]], device, edge)


def test_a_wrong_code_pairs_nobody_and_both_learn_why(device, edge):
    window = Window(CODE, 0.0)
    for code in wrong_codes(TRIES, 1):
        (at_device, at_edge), flights = converse(DevicePairing(device, code), EdgePairing(edge, window, 1.0))
        assert at_device.what == at_edge.what == "The code is wrong."
        assert flights[-1] == b"\1\1"  # and nothing that depends on the code ever came from the edge
    assert window.state(1.0) == "locked"
    with pytest.raises(TrustError, match="locked"):
        EdgePairing(edge, window, 1.0)


def test_ten_thousand_wrong_codes_admit_none_and_lock_after_three(device, edge):
    """Conversations that were all let in before the first was judged: still three guesses, not ten thousand."""
    window = Window(CODE, 0.0)
    answers = {"wrong": 0, "locked": 0}
    guesses = wrong_codes(10_000, 2)
    card = DevicePairing(device, CODE).outgoing()
    opened = [EdgePairing(edge, window, 1.0) for _ in range(10_000)]
    for conversation in opened:
        code = next(guesses)
        try:
            assert conversation.receive(card, 1.0) is None
        except TrustError as error:
            assert "locked" in str(error) and conversation.outgoing() == b"\1\4"
            answers["locked"] += 1
            continue
        left = DevicePairing(device, code)
        left.outgoing()
        left.receive(conversation.outgoing(), 1.0)
        with pytest.raises(TrustError, match="wrong"):
            conversation.receive(left.outgoing(), 1.0)
        answers["wrong"] += 1
    assert answers == {"wrong": TRIES, "locked": 10_000 - TRIES}
    assert window.state(1.0) == "locked" and not window.used


@pytest.mark.parametrize("count", [60, pytest.param(10_000, marks=pytest.mark.deep)])
def test_wrong_codes_in_ever_new_windows_admit_none(device, edge, count):
    guesses = wrong_codes(count, 3)
    for number in itertools.count():
        window = Window(CODE, float(number))
        for _ in range(TRIES):
            if (code := next(guesses, None)) is None:
                return
            results, _flights = converse(DevicePairing(device, code), EdgePairing(edge, window, number), number)
            assert not paired(results, device, edge)
        assert window.state(float(number)) == "locked"


def test_a_stranger_who_goes_away_has_spent_a_try(device, edge):
    window = Window(CODE, 0.0)
    for _ in range(TRIES):
        EdgePairing(edge, window, 1.0).receive(DevicePairing(device, CODE).outgoing(), 1.0)
    assert window.state(1.0) == "locked"


def test_one_who_sends_nonsense_before_that_has_not(device, edge):
    window = Window(CODE, 0.0)
    for data in (b"\0", b"\xff", b"GET / HTTP/1.1\r\n", bytes(300), b"\x6d" + bytes(109)):
        right = EdgePairing(edge, window, 1.0)
        with pytest.raises(TrustError):
            right.receive(data, 1.0)
        assert right.outgoing() == b"\1\5"
    results, _ = converse(DevicePairing(device, CODE), EdgePairing(edge, window, 1.0))
    assert paired(results, device, edge)


@pytest.mark.parametrize("flight", range(FLIGHTS - 1))
def test_a_code_that_expires_is_refused_at_every_step(device, edge, flight):
    window = Window(CODE, 0.0)
    left, right = DevicePairing(device, CODE), EdgePairing(edge, window, SECONDS - 0.1)
    if flight == 0:
        with pytest.raises(TrustError, match="expired"):
            EdgePairing(edge, window, SECONDS)
    if flight == 2:
        right.receive(left.outgoing(), SECONDS - 0.1)
        left.receive(right.outgoing(), SECONDS - 0.1)
    (at_device, at_edge), _ = converse(left, right, SECONDS)
    assert "expired" in at_device.what and "expired" in at_edge.what
    assert window.state(SECONDS) == "expired"


def test_a_clock_that_ran_back_opens_no_window(edge):
    with pytest.raises(TrustError, match="expired"):
        EdgePairing(edge, Window(CODE, 100.0), 99.0)


def test_a_code_works_once(device, other, edge):
    window = Window(CODE, 0.0)
    assert paired(converse(DevicePairing(device, CODE), EdgePairing(edge, window, 1.0))[0], device, edge)
    with pytest.raises(TrustError, match="already used"):
        EdgePairing(edge, window, 2.0)


def test_of_two_devices_at_once_one_is_paired(device, other, edge):
    window = Window(CODE, 0.0)
    sides = [(DevicePairing(who, CODE), EdgePairing(edge, window, 1.0)) for who in (device, other)]
    for left, right in sides:  # both have the right code, and both are let in
        right.receive(left.outgoing(), 1.0)
        left.receive(right.outgoing(), 1.0)
    first, _ = converse(*sides[0])
    second, _ = converse(*sides[1])
    assert paired(first, device, edge)
    assert all("already used" in result.what for result in second)


def test_of_many_threads_one_is_paired(edge, tmp_path):
    window = Window(CODE, 0.0, tries=8)
    proofs = []
    for number in range(8):
        left, right = DevicePairing(Identity.open(tmp_path / str(number)), CODE), EdgePairing(edge, window, 1.0)
        right.receive(left.outgoing(), 1.0)
        left.receive(right.outgoing(), 1.0)
        proofs.append((right, left.outgoing()))

    def finish(end):
        try:
            return end[0].receive(end[1], 1.0)
        except TrustError:
            return None

    with ThreadPoolExecutor(8) as pool:
        assert sum(result is not None for result in pool.map(finish, proofs)) == 1


def test_a_closed_window_refuses(device, edge):
    window = Window(CODE, 0.0)
    under_way, card = EdgePairing(edge, window, 1.0), DevicePairing(device, CODE).outgoing()
    window.close()
    for ask in (lambda: EdgePairing(edge, window, 1.0), lambda: under_way.receive(card, 1.0)):
        with pytest.raises(TrustError, match="expired"):
            ask()


def swap(flight: int, mallory: Identity):
    """Mallory between the two: puts her certificate for the one in `flight`, and lets the rest pass."""

    def alter(number: int, data: bytes) -> bytes:
        return data[:1] + pack(mallory.certificate) + data[1 + PACKED :] if number == flight else data

    return alter


@pytest.mark.parametrize("flights", [(0,), (1,), (0, 1)])
def test_swapped_certificates_are_found_out(device, edge, mallory, flights):
    def alter(number, data):
        for flight in flights:
            data = swap(flight, mallory)(number, data)
        return data

    window = Window(CODE, 0.0)
    results, _ = converse(DevicePairing(device, CODE), EdgePairing(edge, window, 1.0), alter=alter)
    assert all(isinstance(result, TrustError) for result in results) and not window.used


def test_an_altered_name_is_found_out(device, edge):
    for flight in (0, 1):
        results, _ = converse(
            DevicePairing(device, CODE), EdgePairing(edge, Window(CODE, 0.0), 1.0),
            alter=lambda number, data, flight=flight: data[:-1] + b"!" if number == flight else data,
        )  # fmt: skip
        assert not paired(results, device, edge)


def test_what_was_said_in_clear_before_cannot_be_altered(device, edge):
    results, _ = converse(
        DevicePairing(device, CODE, b"versions 1 and 2"), EdgePairing(edge, Window(CODE, 0.0), 1.0, b"version 1")
    )
    assert not paired(results, device, edge)
    results, _ = converse(DevicePairing(device, CODE, b"1"), EdgePairing(edge, Window(CODE, 0.0), 1.0, b"1"))
    assert paired(results, device, edge)


def test_another_version_of_pairing_makes_another_key(device, edge, monkeypatch):
    left = DevicePairing(device, CODE)
    right = EdgePairing(edge, Window(CODE, 0.0), 1.0)
    right.receive(left.outgoing(), 1.0)
    monkeypatch.setattr(pairing, "_VERSION", b"shoal pairing 0 ")
    left.receive(right.outgoing(), 1.0)
    monkeypatch.undo()
    with pytest.raises(TrustError, match="wrong"):
        right.receive(left.outgoing(), 1.0)


def test_a_recorded_conversation_cannot_be_replayed(device, edge):
    _, flights = converse(DevicePairing(device, CODE), EdgePairing(edge, Window(CODE, 0.0), 1.0))
    right = EdgePairing(edge, Window(CODE, 0.0), 1.0)  # even with the same code again
    right.receive(flights[0], 1.0)
    with pytest.raises(TrustError, match="wrong"):
        right.receive(flights[2], 1.0)
    left = DevicePairing(device, CODE)
    left.receive(flights[1], 1.0)
    with pytest.raises(TrustError, match="wrong"):
        left.receive(flights[3], 1.0)


def test_our_own_bytes_sent_back_are_refused(device, edge, tmp_path):
    for name in ("pi", "a" * 40):  # long enough, a card has the length of an answer
        mine = Identity.open(tmp_path, name)
        left = DevicePairing(mine, CODE)
        with pytest.raises(TrustError):
            left.receive(left.outgoing(), 1.0)
    left, right = DevicePairing(device, CODE), EdgePairing(edge, Window(CODE, 0.0), 1.0)
    right.receive(left.outgoing(), 1.0)
    answer = right.outgoing()
    with pytest.raises(TrustError):
        copy.copy(right).receive(answer, 1.0)
    left.receive(answer, 1.0)
    with pytest.raises(TrustError):
        left.receive(left.outgoing(), 1.0)
    mirror = DevicePairing(device, CODE)
    card = pack(device.certificate)
    mirror.outgoing()
    with pytest.raises(TrustError, match="own certificate"):
        mirror.receive(bytes([PACKED + 32 + 2]) + card + bytes(32) + b"me", 1.0)


def test_an_edge_does_not_pair_with_itself(edge):
    results, _ = converse(DevicePairing(edge, CODE), EdgePairing(edge, Window(CODE, 0.0), 1.0))
    assert "own certificate" in results[1].why


def test_an_edge_s_element_and_proof_cannot_be_turned_round(device, edge):
    """A stranger sends the edge its own element, hoping for a key that it can know."""
    right = EdgePairing(edge, Window(CODE, 0.0), 1.0)
    right.receive(DevicePairing(device, CODE).outgoing(), 1.0)
    element = right.outgoing()[1 + PACKED :][:32]
    with pytest.raises(TrustError, match="wrong"):
        right.receive(bytes([48]) + element + bytes(16), 1.0)


@pytest.mark.parametrize("element", [bytes(32), b"\1" + bytes(31), b"\xff" * 32, b"\xec" + b"\xff" * 30 + b"\x7f",
                                     b"\2" + bytes(31), b"\xee" + b"\xff" * 31, b"\xee" + b"\xff" * 30 + b"\x7f",
                                     b"\1" + bytes(30) + b"\x80"])  # fmt: skip
def test_elements_of_small_order_or_off_the_curve_are_refused(device, edge, element):
    right = EdgePairing(edge, Window(CODE, 0.0), 1.0)
    right.receive(DevicePairing(device, CODE).outgoing(), 1.0)
    with pytest.raises(TrustError):
        right.receive(bytes([48]) + element + bytes(16), 1.0)
    left = DevicePairing(device, CODE)
    with pytest.raises(TrustError):
        left.receive(bytes([PACKED + 33]) + pack(edge.certificate) + element + b"e", 1.0)


def fresh(device, edge, flight: int) -> tuple:
    """The side that waits for flight number `flight`, and that flight."""
    sides = [DevicePairing(device, CODE), EdgePairing(edge, Window(CODE, 0.0), 1.0)]
    for number in range(flight):
        sides[1 - number % 2].receive(sides[number % 2].outgoing(), 1.0)
    return sides[1 - flight % 2], sides[flight % 2].outgoing()


@pytest.mark.parametrize("flight", range(FLIGHTS))
def test_cut_at_every_byte_it_waits_and_too_long_it_refuses(device, edge, flight):
    side, data = fresh(device, edge, flight)
    for position in range(len(data)):  # one conversation: every prefix is waited upon, none is believed
        assert side.receive(data[position - 1 : position] if position else b"", 1.0) is None
        assert side.outgoing() == b""
    assert len(side._inbox) == len(data) - 1
    for more in (b"\0", b"\0" * 1000):
        side, data = fresh(device, edge, flight)
        with pytest.raises(TrustError):
            side.receive(data + more, 1.0)
        assert len(side._inbox) <= 257
        with pytest.raises(TrustError, match="over"):
            side.receive(b"", 1.0)


@pytest.mark.parametrize("flight", range(FLIGHTS))
@pytest.mark.parametrize("step", [9, pytest.param(1, marks=pytest.mark.deep)])
def test_any_byte_altered_on_the_way_pairs_nobody(device, edge, flight, step):
    size = len(fresh(device, edge, flight)[1])
    for position in range(flight % step, size, step):

        def alter(number, data, position=position):
            return data[:position] + bytes([data[position] ^ 0x41]) + data[position + 1 :] if number == flight else data

        results, _ = converse(DevicePairing(device, CODE), EdgePairing(edge, Window(CODE, 0.0), 1.0), alter=alter)
        if flight < 3:
            assert not paired(results, device, edge), position
        else:  # the edge has believed a device that knew the code; the device believes nobody, and says so
            assert results[0] is None or isinstance(results[0], TrustError)


@settings(max_examples=400, deadline=None)
@given(data=st.binary(max_size=300), cut=st.integers(0, 300))
def test_any_first_bytes_are_waited_upon_or_refused(identities, data, cut):
    device, edge = identities
    for side in (DevicePairing(device, CODE), EdgePairing(edge, Window(CODE, 0.0), 1.0)):
        for piece in (data[:cut], data[cut:]):
            try:
                assert side.receive(piece, 1.0) is None
            except TrustError:
                break
        assert len(side._inbox) <= 257


@pytest.fixture(scope="module")
def identities(device, edge):
    return device, edge


def test_an_unknown_refusal_is_a_refusal(device):
    left = DevicePairing(device, CODE)
    with pytest.raises(TrustError, match="reason 200"):
        left.receive(b"\1\xc8", 1.0)


def test_a_code_is_eight_digits_and_shown_in_two_groups():
    code = Code.new()
    assert (
        Code.parse(str(code)) == Code.parse(code.digits) == Code.parse(f" {code.digits[:3]} {code.digits[3:]}") == code
    )
    assert len(str(code)) == 9 and code.digits not in repr(code)
    assert len({Code.new().digits for _ in range(100)}) > 90


@pytest.mark.parametrize("text", ["", "1", "1234567", "123456789", "1234567a", "١٢٣٤٥٦٧٨", "1234567²", "-1234567"])
def test_what_is_no_code_is_a_typing_error(text):
    with pytest.raises(UsageError):
        Code.parse(text)


def test_one_wrong_digit_or_two_swapped_are_always_caught():
    rng = random.Random(4)
    for _ in range(200):
        digits = f"{rng.randrange(10**7):07}"
        digits += pairing._check_digit(digits)
        assert Code.parse(digits)
        for position in range(8):
            for wrong in set("0123456789") - {digits[position]}:
                with pytest.raises(UsageError):
                    Code.parse(digits[:position] + wrong + digits[position + 1 :])
            pair = digits[position : position + 2]
            if len(set(pair)) == 2:
                with pytest.raises(UsageError):
                    Code.parse(digits[:position] + pair[::-1] + digits[position + 2 :])


def test_a_qr_code_is_blocks_that_a_terminal_shows():
    drawn = qr("shoal pair 10.0.0.2:4707 1234-5678")
    assert set(drawn) <= set(" ▀▄█\n") and 10 < len(drawn.splitlines()) < 24
    assert {len(line) for line in drawn.splitlines()} == {len(drawn.splitlines()[0])}


def test_with_the_tls_that_follows_it_takes_less_than_2_kib(tmp_path):
    from shoal.device_agents.secure import Secure

    names = "é" * 32  # the longest
    device, edge = (Identity.open(tmp_path / role, names) for role in ("device", "edge"))
    results, flights = converse(DevicePairing(device, CODE), EdgePairing(edge, Window(CODE, 0.0), 1.0))
    assert paired(results, device, edge)
    sides = [Secure(device, lambda: [edge.certificate], False), Secure(edge, lambda: [device.certificate], True)]
    spent = sum(map(len, flights)) + 4 * 8  # two preambles each way
    for turn in (0, 1, 0):
        data = sides[turn].outgoing()
        spent += len(data)
        sides[1 - turn].receive(data)
    assert all(side.ready for side in sides) and spent < 2048


@pytest.mark.parametrize("name", [b"\x1b[2J", b"\xff", b" pi", b"a\xe2\x80\xaeb"])
def test_a_name_that_hides_something_is_refused(device, edge, name):
    card = pack(device.certificate) + name
    right = EdgePairing(edge, Window(CODE, 0.0), 1.0)
    with pytest.raises(TrustError):
        right.receive(bytes([len(card)]) + card, 1.0)
    assert right.outgoing() == b"\1\5"


def test_without_its_packages_the_reason_is_said(device, edge, monkeypatch):
    for name in ("spake2", "segno"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingPackageError, match="agent"):
        qr("text")
    right = EdgePairing(edge, Window(CODE, 0.0), 1.0)
    with pytest.raises(MissingPackageError, match="agent"):
        right.receive(DevicePairing(device, CODE).outgoing(), 1.0)
    assert right.outgoing() == b"\1\5"
