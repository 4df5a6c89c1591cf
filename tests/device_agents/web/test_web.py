"""The edge over real HTTP: nothing without the token, nothing for other pages, everything bounded."""

import contextlib
import http.client
import json
import re
import socket
import ssl
import time

import pytest

from shoal.device_agents import web, web_server
from shoal.runtime.errors import UsageError

PRIVATE = ["/snapshot", "/metrics", "/events"]


class Client:
    """A browser or a program, by what it sends; keeps its cookie."""

    def __init__(self, port: int, **headers: str):
        self.port, self.headers = port, {key.replace("_", "-"): value for key, value in headers.items()}

    def __call__(self, method: str, path: str, value=None, **headers: str):
        """(status, headers, body)"""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        sent = self.headers | {key.replace("_", "-"): text for key, text in headers.items()}
        body = value if isinstance(value, bytes | None) else json.dumps(value).encode()
        if body is not None:
            sent = {"content-type": "application/json"} | sent
        connection.request(method, path, body, sent)
        response = connection.getresponse()
        if response.headers.get_content_type() == "text/event-stream":
            return response.status, response.headers, response
        return response.status, response.headers, response.read()

    def sign_in(self, token: str) -> "Client":
        status, headers, _ = self("POST", "/session", {"token": token})
        assert status == 200
        self.headers["cookie"] = headers["set-cookie"].partition(";")[0]
        return self


@pytest.fixture
def page(serving):
    """A client that behaves as the edge's own page does, not signed in."""
    return Client(serving.port, origin=f"http://127.0.0.1:{serving.port}", sec_fetch_site="same-origin")


def test_without_the_token_there_is_only_the_empty_page(page, stand_in):
    for path in PRIVATE:
        status, headers, body = page("GET", path)
        assert status == 401 and b"camera" not in body and headers["www-authenticate"] == "Bearer"
    for path in ("/pairing", "/devices"):
        assert page("POST", path, {"open": True, "fingerprint": "0" * 64, "revoke": True})[0] == 401
    assert stand_in.calls == []
    status, headers, body = page("GET", "/")
    assert status == 200 and b"camera" not in body
    assert page("GET", "/", if_none_match=headers["etag"])[0] == 304
    assert json.loads(page("GET", "/session")[2]) == {"signed_in": False}
    assert page("GET", "/health")[0] == 200
    assert [page(*asked)[0] for asked in (("GET", "/nothing"), ("DELETE", "/"), ("GET", "/../etc/passwd"))] == [
        404,
        405,
        404,
    ]


def test_a_cookie_opens_everything_until_signing_out(page, token):
    status, headers, _ = page("POST", "/session", {"token": f" {token}\n"})
    cookie = headers["set-cookie"]
    assert status == 200 and token not in cookie
    assert {part.strip().lower() for part in cookie.split(";")[1:]} >= {"httponly", "samesite=strict", "path=/"}
    page.headers["cookie"] = cookie.partition(";")[0]
    assert page("GET", "/metrics")[1]["content-type"].startswith("text/plain; version=0.0.4")
    snapshot = json.loads(page("GET", "/snapshot")[2])
    assert [device["name"] for device in snapshot["devices"]][0] == "camera-front"
    assert page("POST", "/session", {"token": ""})[0] == 200
    assert [page("GET", path)[0] for path in PRIVATE] == [401] * 3


def test_the_token_as_bearer_needs_no_cookie_and_no_origin(serving, token):
    program = Client(serving.port, authorization=f"Bearer {token}")
    assert [program("GET", path)[0] for path in PRIVATE] == [200] * 3
    assert program("POST", "/pairing", {"open": True})[0] == 200
    assert Client(serving.port, authorization=f"Basic {token}")("GET", "/metrics")[0] == 401


def test_guessing_ends_after_five_tries(page, token):
    assert [page("POST", "/session", {"token": f"wrong-{i}"})[0] for i in range(5)] == [401] * 5
    status, _, body = page("POST", "/session", {"token": token})
    assert status == 429 and b"Try again in" in body
    assert page("GET", "/metrics", authorization=f"Bearer {token}")[0] == 429


@pytest.mark.parametrize(
    "changed",
    [
        {"origin": "http://evil.example", "sec_fetch_site": "cross-site"},
        {"origin": "http://127.0.0.1:1", "sec_fetch_site": "same-site"},
        {"origin": "null"},
        {"sec_fetch_site": "cross-site"},
        {"content_type": "text/plain"},
        {"content_type": "application/x-www-form-urlencoded"},
    ],
    ids=str,
)
def test_another_page_cannot_press_a_button(page, stand_in, token, changed):
    page.sign_in(token)
    assert page("POST", "/pairing", {"open": True}, **changed)[0] in (403, 415)
    assert page("POST", "/session", {"token": token}, **changed)[0] in (403, 415)
    assert stand_in.calls == []


def test_a_post_without_an_origin_is_no_page(serving, token):
    client = Client(serving.port)
    assert client("POST", "/session", {"token": token})[0] == 403


def test_a_rebound_name_gets_nothing(page, token):
    page.sign_in(token)
    for path in ("/", "/health", "/session", *PRIVATE):
        assert page("GET", path, host="evil.example:4780")[0] == 403


def test_buttons_do_what_they_say(page, stand_in, token):
    page.sign_in(token)
    one, two = (device["fingerprint"] for device in stand_in.value["devices"][:2])
    assert page("POST", "/pairing", {"open": True})[0] == 200
    pairing = json.loads(page("GET", "/snapshot")[2])["pairing"]
    assert pairing["code"] == "4071-2386" and set("".join(pairing["qr"])) == {"0", "1"}
    assert len(pairing["qr"]) == len(pairing["qr"][0]) >= 21
    assert page("POST", "/pairing", {"open": False})[0] == 200
    pairing = json.loads(page("GET", "/snapshot")[2])["pairing"]
    assert (pairing["state"], pairing["qr"], pairing["code"]) == ("closed", None, "")
    assert page("POST", "/devices", {"fingerprint": one, "name": " porch "})[0] == 200
    assert page("POST", "/devices", {"fingerprint": two, "revoke": True})[0] == 200
    assert stand_in.calls == [("open",), ("close",), ("rename", one, "porch"), ("revoke", two)]
    status, _, body = page("POST", "/devices", {"fingerprint": one, "name": "taken"})
    assert status == 400 and json.loads(body)["what"] == "The name is taken."


@pytest.mark.parametrize(
    ("path", "value"),
    [
        *(("/pairing", value) for value in ({}, {"open": "yes"}, [], b"{", b"\xff", b"[" * 4000)),
        ("/devices", {"fingerprint": "../x", "revoke": True}),
        ("/devices", {"revoke": True}),
        ("/devices", {"fingerprint": "0" * 64, "revoke": 1}),
        *(
            ("/devices", {"fingerprint": "0" * 64, "name": name})
            for name in (None, " ", "x" * 65, "a\x1b[31m", "\u202e")
        ),
        *(("/session", value) for value in ({}, {"token": 5})),
    ],
    ids=repr,
)
def test_what_makes_no_sense_is_refused_and_does_nothing(page, stand_in, token, path, value):
    page.sign_in(token)
    assert page("POST", path, value)[0] == 400
    assert stand_in.calls == []


def test_a_long_body_is_refused(page, token):
    assert page("POST", "/session", b" " * 5000)[0] == 413
    assert page("POST", "/session", {"token": "x" * 3000})[0] == 401


def test_every_answer_carries_its_headers_and_the_page_runs_only_its_own_script(page):
    status, headers, body = page("GET", "/")
    csp = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert csp["default-src"] == csp["base-uri"] == csp["form-action"] == csp["frame-ancestors"] == "'none'"
    assert csp["connect-src"] == "'self'" and "unsafe" not in headers["content-security-policy"]
    assert re.fullmatch(r"'sha256-[\w+/=]{44}'", csp["script-src"]) and re.fullmatch(
        r"'sha256-[\w+/=]{44}'", csp["style-src"]
    )
    outside = re.findall(rb"""(?:src|href|action)\s*=\s*["']?(?!data:|#)[^"'\s>]+|@import|url\(""", body)
    assert outside == [] and not re.search(rb"""\s(?:on\w+|style)\s*=\s*["']""", body)
    for path in ("/", "/session", "/snapshot", "/nothing"):
        headers = page("GET", path)[1]
        assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY"
        assert headers["referrer-policy"] == "no-referrer" and "content-security-policy" in headers
        assert headers["cache-control"] == ("no-cache" if path == "/" else "no-store")
        assert "server" not in headers and "access-control-allow-origin" not in headers


def events(response, count: int) -> list[dict]:
    found = []
    while len(found) < count:
        line = response.readline()
        assert line, "the stream ended"
        if line.startswith(b"data: "):
            found.append(json.loads(line[6:]))
    return found


def test_events_follow_a_change_and_otherwise_keep_time(page, serving, stand_in, token):
    stream = page.sign_in(token)("GET", "/events")[2]
    events(stream, 1)
    stand_in.value["devices"][0]["health"]["temperature_c"] = float("nan")
    stand_in.value["name"] = "</script>\u2028\n\ndata: {}"
    begun = time.monotonic()
    serving.do(stand_in.change)
    (event,) = events(stream, 1)
    assert event["name"] == stand_in.value["name"] and event["devices"][0]["health"]["temperature_c"] is None
    assert time.monotonic() - begun < 1.5
    events(stream, 1)  # without a change
    assert len(stand_in.queues) == 1
    stream.close()
    serving.do(stand_in.change)
    end = time.monotonic() + 10
    while stand_in.queues:
        assert time.monotonic() < end, "a stream outlived its reader"
        serving.do(stand_in.change)
        time.sleep(0.05)


def test_streams_have_a_limit_and_end_with_the_session(page, serving, token, monkeypatch):
    monkeypatch.setattr(web, "STREAMS", 3)
    page.sign_in(token)
    streams = [page("GET", "/events")[2] for _ in range(3)]
    for stream in streams:
        events(stream, 1)
    assert page("GET", "/events")[0] == 503
    page("POST", "/session", {"token": ""})
    end = time.monotonic() + 8
    assert all(stream.read() is not None for stream in streams) and time.monotonic() < end


def test_stopping_ends_streams_at_once(page, serving, token):
    stream = page.sign_in(token)("GET", "/events")[2]
    events(stream, 1)
    begun = time.monotonic()
    serving.stop()
    assert time.monotonic() - begun < 5
    serving.start()


def test_connections_that_say_nothing_do_not_keep_others_out(serving, page):
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(socket.create_connection(("127.0.0.1", serving.port))) for _ in range(60)]
        assert page("GET", "/health")[0] == 200
        more = [stack.enter_context(socket.create_connection(("127.0.0.1", serving.port))) for _ in range(30)]
        more[-1].settimeout(5)
        assert more[-1].recv(1) == b""  # one too many: closed unheard
        for sock in silent[:30]:
            sock.close()
        time.sleep(0.1)
        assert page("GET", "/health")[0] == 200


def test_a_request_that_never_gets_whole_is_closed_and_a_stream_is_not(serving, page, token, monkeypatch):
    monkeypatch.setattr(web_server, "_HEAD_SECONDS", 0.15)
    stream = page.sign_in(token)("GET", "/events")[2]
    with socket.create_connection(("127.0.0.1", serving.port), timeout=5) as drip:
        drip.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nA: ")
        assert drip.recv(1) == b""
    events(stream, 2)


def test_others_reach_it_over_tls_only(stand_in, token, tmp_path):
    for host in ("0.0.0.0", "::", "192.168.1.20", "attic.lan"):
        with pytest.raises(UsageError):
            web_server.WebServer(stand_in, token, host)


def test_over_tls_the_cookie_is_secure(serving, stand_in, token, tmp_path):
    from shoal.device_agents.identity import Identity

    identity = Identity.open(tmp_path / "edge", "attic")
    server = web_server.WebServer(
        stand_in, token, "0.0.0.0", 0, certificate=identity.certificate_path, key=identity.key_path
    )
    serving.do(server.start)
    try:
        context = ssl.create_default_context(cafile=str(identity.certificate_path))
        context.check_hostname = False
        connection = http.client.HTTPSConnection("127.0.0.1", server.port, timeout=10, context=context)
        host = f"127.0.0.1:{server.port}"
        headers = {"content-type": "application/json", "origin": f"https://{host}"}
        connection.request("POST", "/session", json.dumps({"token": token}), headers)
        response = connection.getresponse()
        assert response.status == 200 and "; secure" in response.headers["set-cookie"].lower()
        connection.close()
    finally:
        serving.do(server.stop)


def test_a_taken_port_is_said(serving, stand_in, token):
    with pytest.raises(UsageError, match="in use"):
        serving.do(web_server.WebServer(stand_in, token, port=serving.port).start)


def test_the_token_is_made_once_and_for_this_user(tmp_path):
    token = web.token_in(tmp_path)
    assert len(token) >= 24 and web.token_in(tmp_path) == token
    assert (tmp_path / "web.token").stat().st_mode & 0o777 == 0o600
