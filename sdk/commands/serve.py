"""Serve bundles over HTTP as OpenAI's API does: chat completions, completions and embeddings, streamed or whole.

On loopback no key is asked for unless one is given. On any other address a key is: --api-key-file, SHOAL_API_KEY, or
one that is made and shown once. SIGINT or SIGTERM lets running requests end. See docs/server.md.
"""

import argparse
import os
from pathlib import Path
from typing import Any

from .. import options

NAME = "serve"
HELP = "serve bundles as an OpenAI-compatible server"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundles", metavar="BUNDLE", nargs="+", help="served under its file's name, without the suffix")
    group = parser.add_argument_group("network")
    group.add_argument("--host", default="127.0.0.1", metavar="H", help="address to listen on (default: 127.0.0.1)")
    group.add_argument("--port", type=int, default=8080, metavar="N", help="port; 0 takes a free one (default: 8080)")
    group.add_argument("--api-key-file", metavar="FILE", help="holds the key that clients must send")
    group.add_argument("--allow-host", action="append", default=[], metavar="NAME", help="another name clients may use")
    group.add_argument(
        "--cors-origin", action="append", default=[], metavar="URL", help="web origin that may read answers"
    )
    group.add_argument("--certificate", metavar="FILE", help="PEM certificate chain: serve HTTPS")
    group.add_argument("--private-key", metavar="FILE", help="PEM private key of the certificate")
    group = parser.add_argument_group("load")
    group.add_argument("--queue", type=int, default=16, metavar="N", help="requests that may wait for each model")
    group.add_argument("--timeout", type=float, default=600.0, metavar="S", help="seconds a request may take")
    group.add_argument(
        "--drain", type=float, default=30.0, metavar="S", help="seconds running requests have at the end"
    )
    group.add_argument("--log-requests", action="store_true", help="one line for each request on stderr")
    options.add_loading(parser)
    options.add_threads(parser)
    options.add_backend(parser)


def run(arguments: argparse.Namespace, show) -> int:
    import contextlib
    import logging

    from shoal.runtime.errors import MissingPackageError, UsageError
    from shoal.runtime.model import load

    try:
        from ..server import Limits, Service
        from ..server_listen import bind, guarded, listen
    except ImportError as error:
        raise MissingPackageError(
            "The server cannot start.", f"{error}.", "Install it: pip install 'shoal[serve]'."
        ) from None
    names = [Path(bundle).stem for bundle in arguments.bundles]
    if len(set(names)) != len(names):
        raise UsageError("Two bundles have one name.", "Requests choose a model by it.", "Rename one of the files.")
    for name, least in (("queue", 0), ("timeout", 1), ("drain", 0)):
        if not least <= getattr(arguments, name) <= 1e6:
            raise UsageError(f"--{name} is {getattr(arguments, name)}.", f"It must be {least} or more.", "Correct it.")
    logging.basicConfig(
        level=logging.INFO if arguments.log_requests else logging.WARNING,
        format="%(asctime)s %(levelname)s %(message)s",
    )
    where = options.backend(arguments)
    key = _key(arguments, show)
    _few_arenas()
    with contextlib.ExitStack() as stack:
        bound = stack.enter_context(bind(arguments.host, arguments.port))
        models = {
            name: stack.enter_context(load(bundle, progress=show.progress, **_loading(bundle, arguments), **where))
            for name, bundle in zip(names, arguments.bundles, strict=True)
        }
        for name, model in models.items():
            if where:
                show.note(f"{name}: {options.nodes(model)}")
            if model.card.task == "generate":
                options.follow(model, arguments, on_change=_logged(name))
        service = Service(models, Limits(arguments.queue, arguments.timeout))
        app = guarded(
            service, arguments.host, api_key=key, allow_hosts=arguments.allow_host, origins=arguments.cors_origin
        )
        host, port = bound.getsockname()[:2]
        scheme = "https" if arguments.certificate else "http"
        url = f"{scheme}://[{host}]:{port}/v1" if ":" in host else f"{scheme}://{host}:{port}/v1"
        listen(
            app, bound, connections=len(models) * (arguments.slots + arguments.queue), drain_seconds=arguments.drain,
            certificate=arguments.certificate, private_key=arguments.private_key,
            ready=lambda: show.line(f"Serving {', '.join(names)} at {url} (Ctrl-C stops)"),
        )  # fmt: skip
    return 0


def _logged(name: str):
    """What writes a model's changes to the log."""
    import logging

    def tell(change) -> None:
        if change.error is not None:
            logging.warning("%s keeps its memory: %s", name, getattr(change.error, "what", change.error))
        else:
            entries = f", {change.plan.entries} entries of the stack" if change.plan.entries else ""
            logging.info("%s: %d MiB for it, context %d%s", name, change.memory >> 20, change.plan.context, entries)

    return tell


def _few_arenas() -> None:
    """glibc gives each of many threads an arena of its own: tens of megabytes of memory that no plan counts."""
    import contextlib
    import ctypes

    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(-8, 2)  # M_ARENA_MAX


def _loading(bundle: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The keywords of `load`. What shapes a conversation's cache holds for models that generate."""
    from shoal.runtime.bundle import Bundle
    from shoal.runtime.card import Card

    with Bundle.open(bundle) as opened:
        card = Card.from_json(opened.bytes(opened.section("card")))
    if card.task == "embed":
        return {"memory": arguments.memory, "threads": arguments.threads}
    return options.loading(arguments) | {"queue": arguments.queue + arguments.slots}


def _key(arguments: argparse.Namespace, show) -> str:
    """The API key, "" for none; made and shown where others can reach the server and nobody gave one."""
    import secrets

    from shoal.runtime.errors import UsageError

    from ..server_gate import is_loopback

    if arguments.api_key_file:
        try:
            key = Path(arguments.api_key_file).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError("The key file cannot be read.", f"{error}.", "Give a file of one line.") from None
        if not key:
            raise UsageError("The key file is empty.", "It must hold the key.", "Write one into it.")
        return key
    key = os.environ.get("SHOAL_API_KEY", "")
    if is_loopback(arguments.host):
        return key
    if not arguments.certificate:
        show.note("Warning: without --certificate, the key and every text cross the network unencrypted.")
    if not key:
        key = secrets.token_urlsafe(32)
        show.note(f"API key, shown this once: {key}")
    return key
