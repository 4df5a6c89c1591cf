"""Who may look: names, origins, wrong tokens, sessions."""

import random

import pytest

from shoal.device_agents.web_gate import SESSION_SECONDS, Gate
from shoal.runtime.errors import BusyError, UsageError

TOKEN = "sea-otter-4b1d-token"


@pytest.mark.parametrize(
    "token", ["", "short", "a" * 15, "with a space in it", "tökens-beyond-ascii", "line\nbreak-line-break"]
)
def test_a_token_that_is_weak_or_cannot_be_typed_is_refused(token):
    with pytest.raises(UsageError):
        Gate(token)


def test_an_edge_answers_to_addresses_and_to_its_own_names_only():
    gate = Gate(TOKEN, ["Attic.lan."])
    for host in (
        "127.0.0.1",
        "10.0.0.2:4780",
        "[::1]:4780",
        "[fe80::1]",
        "localhost:1",
        "LOCALHOST",
        "attic.lan:80",
        "attic.lan.",
    ):
        assert gate.answers_to([host]), host
    for host in (
        "evil.example",
        "attic.lan.evil.example",
        "127.0.0.1.evil.example",
        "",
        "10.0.0.256",
        "0x7f.1",
    ):
        assert not gate.answers_to([host]), host
    assert not gate.answers_to([]) and not gate.answers_to(["127.0.0.1", "127.0.0.1"])


@pytest.mark.parametrize(
    ("origin", "site", "own"),
    [
        ("http://127.0.0.1:4780", "same-origin", True), ("https://127.0.0.1:4780", None, True),
        ("http://127.0.0.1:3000", "same-site", False), ("http://127.0.0.1:4780", "cross-site", False),
        ("http://evil.example", "cross-site", False), ("null", None, False), (None, None, False), (None, "none", False),
    ],
)  # fmt: skip
def test_only_the_own_page_may_change_something(origin, site, own):
    assert Gate(TOKEN).own_page("127.0.0.1:4780", origin, site) is own


def test_after_five_wrong_tokens_the_right_one_waits_too():
    gate = Gate(TOKEN)
    assert [gate.check(f"wrong-{i}", "10.0.0.9", i) for i in range(5)] == [False] * 5
    with pytest.raises(BusyError, match="55 seconds"):
        gate.check(TOKEN, "10.0.0.9", 5.0)
    assert gate.check(TOKEN, "10.0.0.8", 5.0)  # others are not kept out
    assert gate.check(TOKEN, "10.0.0.9", 61.0)


def test_addresses_of_one_network_share_their_tries_and_all_together_have_a_limit():
    gate = Gate(TOKEN)
    for i in range(5):
        gate.check("wrong", f"2001:db8::{i:x}", 0)
    with pytest.raises(BusyError):
        gate.check("wrong", "2001:db8::ffff", 0)
    gate, refused = Gate(TOKEN), 0
    for i in range(10_000):
        try:
            assert not gate.check("wrong", f"10.{i >> 8}.{i & 255}.1", i / 1e4)
        except BusyError:
            refused += 1
    assert refused == 10_000 - 50 and len(gate._wrong) <= 1025


def test_ten_thousand_wrong_tokens_admit_none():
    rng, gate = random.Random(1), Gate(TOKEN)
    for i in range(10_000):
        wrong = rng.choice(
            [TOKEN[:-1], TOKEN + "x", TOKEN.upper(), "", "\x00", "\ud800", "é" * 20, rng.randbytes(9).hex()]
        )
        assert not gate.check(wrong, "10.0.0.9", i * 100.0)


def test_a_session_lives_until_its_end_and_through_a_restart():
    cookie = Gate(TOKEN).open_session(1000.0)
    again = Gate(TOKEN)
    assert again.session(cookie, 1001.0) and again.session(cookie, 999.0 + SESSION_SECONDS)
    assert not again.session(cookie, 1000.0 + SESSION_SECONDS)
    assert not Gate(TOKEN + "2").session(cookie, 1001.0)
    again.close_session(cookie, 1001.0)
    assert not again.session(cookie, 1001.0)


def test_no_other_cookie_is_a_session():
    gate = Gate(TOKEN)
    cookie = gate.open_session(0.0)
    for at in range(len(cookie)):
        changed = cookie[:at] + ("0" if cookie[at] != "0" else "1") + cookie[at + 1 :]
        assert not gate.session(changed, 1.0) and not gate.session(cookie[:at], 1.0)
    for wrong in ("", ".", "..", "9" * 5000, "é.é.é", "9999999999.aa." + "0" * 64, cookie + "0", " " + cookie):
        assert not gate.session(wrong, 1.0)
