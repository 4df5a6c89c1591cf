import asyncio

import pytest

from shoal.runtime.errors import UsageError
from shoal.server_gate import LOOPBACK_NAMES, Gate, is_loopback
from shoal.server_listen import bind, guarded
from shoal.server_metrics import Metrics


class Inner:
    """Stands for the application: answers 200 to everything."""

    metrics = Metrics()
    paths = {"/v1/models", "/health"}

    @staticmethod
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})


def ask(app, path="/v1/models", method="GET", **headers) -> tuple[int, dict]:
    sent = []

    async def send(message):
        sent.append(message)

    named = [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in headers.items()]
    scope = {"type": "http", "method": method, "path": path, "headers": named, "query_string": b""}
    asyncio.run(app(scope, None, send))
    return sent[0]["status"], {name.decode(): value.decode() for name, value in sent[0]["headers"]}


@pytest.mark.parametrize(
    ("given", "status"),
    [
        ({"authorization": "Bearer right"}, 200),
        ({"authorization": "bearer  right "}, 200),
        ({"authorization": "Bearer wrong"}, 401),
        ({"authorization": "Bearer righ"}, 401),
        ({"authorization": "Basic right"}, 401),
        ({"authorization": "right"}, 401),
        ({"authorization": "Bearer \xff"}, 401),
        ({"authorization": ""}, 401),
        ({}, 401),
    ],
)
def test_key(given, status):
    gate = Gate(Inner.app, Metrics(), Inner.paths, api_key="right")
    found, headers = ask(gate, **given)
    assert found == status
    assert ("www-authenticate" in headers) == (status == 401)
    assert ask(gate, "/health")[0] == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8080", 200),
        ("LOCALHOST.", 200),
        ("127.0.0.1:1", 200),
        ("[::1]:8080", 200),
        ("evil.example:8080", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.nip.io", 403),
        ("", 403),
        (None, 403),
    ],
)
def test_loopback_answers_only_to_its_own_names(host, status):
    app = guarded(Inner(), "127.0.0.1")
    assert ask(app, **({} if host is None else {"host": host}))[0] == status


def test_another_name_may_be_allowed():
    assert ask(guarded(Inner(), "127.0.0.1", allow_hosts=["box.lan"]), host="BOX.lan:80")[0] == 200


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("127.8.9.1", True), ("::1", True), ("localhost", True),
     ("0.0.0.0", False), ("::", False), ("10.0.0.1", False), ("box.lan", False), ("", False)],
)  # fmt: skip
def test_what_is_loopback(host, local):
    assert is_loopback(host) == local


@pytest.mark.parametrize(
    ("host", "more"),
    [
        ("0.0.0.0", {}),
        ("::", {}),
        ("0.0.0.0", {"api_key": "with space"}),
        ("127.0.0.1", {"origins": ["*"]}),
    ],
)
def test_what_is_not_safe_is_not_served(host, more):
    with pytest.raises(UsageError):
        guarded(Inner(), host, **more)


def test_web_origins_are_off_unless_listed():
    asked = {"host": "localhost", "origin": "https://page.example"}
    preflight = {**asked, "access_control_request_method": "POST", "access_control_request_headers": "authorization"}
    closed = guarded(Inner(), "127.0.0.1")
    assert "access-control-allow-origin" not in ask(closed, **asked)[1]
    opened = guarded(Inner(), "127.0.0.1", origins=["https://page.example"], api_key="k")
    assert ask(opened, method="OPTIONS", **preflight)[0] == 200
    status, headers = ask(opened, **asked)
    assert (status, headers["access-control-allow-origin"]) == (401, "https://page.example")
    assert "access-control-allow-origin" not in ask(opened, host="localhost", origin="https://other.example")[1]


def test_a_taken_port_is_refused():
    with bind("127.0.0.1", 0) as first:
        first.listen()
        with pytest.raises(UsageError, match="Cannot listen"):
            bind("127.0.0.1", first.getsockname()[1])
    with pytest.raises(UsageError, match="Cannot listen"):
        bind("127.0.0.1", 1 << 17)


def test_metrics_name_only_known_paths():
    metrics = Metrics()
    gate = Gate(Inner.app, metrics, Inner.paths, hosts=LOOPBACK_NAMES)
    ask(gate, "/v1/models", host="localhost")
    ask(gate, '/made"up\n', host="localhost")
    ask(gate, "/v1/models", host="evil")
    text = metrics.render([("shoal_slots", {"model": 'a"b'}, 2)])
    assert 'shoal_requests_total{endpoint="/v1/models",status="200"} 1' in text
    assert 'shoal_requests_total{endpoint="/v1/models",status="403"} 1' in text
    assert 'shoal_requests_total{endpoint="other",status="200"} 1' in text
    assert 'shoal_request_seconds_bucket{endpoint="/v1/models",le="+Inf"} 2' in text
    assert 'shoal_slots{model="a\\"b"} 2' in text
    assert "made" not in text
