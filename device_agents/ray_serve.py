"""A tail as a Ray Serve application, for a fleet that outgrew one machine: replicas, each batching what reaches it.

It speaks the Open Inference Protocol v2 over HTTP, raw tensors included, so an edge forwards to it with
`oip.RemoteSession`; a program in the same Ray cluster calls `handle.infer.remote(feeds)`. Rows are joined and given
back by `tails.Tail`, the same code that serves them on an edge. Ray is imported by `application` only.

    serve.run(application("tail.shoal"), name="tail", route_prefix="/")
"""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shoal.runtime.bundle import Bundle
from shoal.runtime.errors import BusyError, LinkError, MissingPackageError, ShoalError, UsageError
from shoal.runtime.session import Session

from .batching import Job
from .oip_body import DATATYPES, JSON_LENGTH, decode, encode
from .tails import MAX_BODY, Tail

if TYPE_CHECKING:
    from ray.serve import Application
    from starlette.requests import Request
    from starlette.responses import Response

Feeds = Mapping[str, np.ndarray]
_HEAD = 1 << 16  # bytes that a request may have beside its tensors
_STATUS = {UsageError: 400, LinkError: 400, BusyError: 503}


def application(
    path: str | Path, *, model: str = "tail", replicas: int = 1, max_batch: int = 8, max_wait: float = 0.003,
    threads: int = 1,
) -> "Application":  # fmt: skip
    """The tail in the bundle at `path`, which every node of the cluster has, as model `model`.

    A replica runs up to `max_batch` requests at once, and waits at most `max_wait` seconds for them to come together.
    Raises MissingPackageError without Ray; a bundle that cannot be served fails the deployment.
    """
    try:
        from ray import serve
    except ImportError:
        raise MissingPackageError(
            "The tail cannot be served on Ray.", "Ray is missing.", "pip install 'ray[serve]'"
        ) from None

    class Deployment:
        def __init__(self) -> None:
            self.served = Served(Path(path), model, threads)

        @serve.batch(max_batch_size=max_batch, batch_wait_timeout_s=max_wait)
        async def batched(self, requests: list[Feeds]) -> list[Any]:
            return await asyncio.to_thread(self.served.run, requests)

        async def infer(self, feeds: Feeds) -> dict[str, np.ndarray]:
            """Called through a handle: one request's tensors in, its rows of every output out."""
            self.served.check(feeds)
            result = await self.batched(feeds)
            if isinstance(result, ShoalError):
                raise result
            return result

        async def __call__(self, request: "Request") -> "Response":
            return await self.served.answer(request, self.infer)

    options = {
        "num_replicas": replicas,
        "max_ongoing_requests": 4 * max_batch,
        "ray_actor_options": {"num_cpus": threads},
    }
    return serve.deployment(name=model, **options)(Deployment).bind()


class Served:
    """A tail, and protocol v2 in front of it. Knows nothing about Ray."""

    def __init__(self, path: Path, model: str, threads: int = 1):
        self.model, self.tail = model, Tail(Bundle.open(path), threads)

    def check(self, feeds: Feeds) -> None:
        """Raises UsageError for tensors that the tail does not take."""
        arrays = feeds.values()
        self.tail.layout(list(feeds), [array.dtype.name for array in arrays], [array.shape for array in arrays])

    def run(self, requests: Sequence[Feeds]) -> list[dict[str, np.ndarray] | ShoalError]:
        """Each request's own rows, those of equal shape computed together. An error takes no other request along."""
        groups: dict[tuple, list[int]] = {}
        for index, feeds in enumerate(requests):
            groups.setdefault(tuple(sorted((name, array.shape[1:]) for name, array in feeds.items())), []).append(index)
        found: list[Any] = [None] * len(requests)
        for key, members in groups.items():
            jobs = [
                Job("", key, next(iter(requests[index].values())).shape[0], requests[index], None, 0.0)
                for index in members
            ]
            for index, result in zip(members, self.tail.run(jobs), strict=True):
                found[index] = result
        return found

    async def answer(self, request: "Request", infer: Any) -> "Response":
        """What protocol v2 says to one HTTP request; `infer` computes."""
        from starlette.responses import JSONResponse, Response

        asked = request.method, request.url.path.rstrip("/")
        model = f"/v2/models/{self.model}"
        if asked in (("GET", "/v2/health/live"), ("GET", "/v2/health/ready"), ("GET", f"{model}/ready")):
            return JSONResponse({"name": self.model, "ready": True})
        if asked == ("GET", "/v2"):
            return JSONResponse({"name": "shoal", "version": "2", "extensions": ["binary_tensor_data"]})
        if asked == ("GET", model):
            return JSONResponse(self.metadata())
        if asked != ("POST", f"{model}/infer"):
            return JSONResponse({"error": "There is no such model, or no such request."}, 404)
        try:
            body = bytearray()
            async for piece in request.stream():
                body += piece
                if len(body) > MAX_BODY + _HEAD:
                    return JSONResponse({"error": "The request is too long."}, 413)
            feeds, value = decode("inputs", bytes(body), request.headers.get(JSON_LENGTH))
            binary, about = _binary(value), {"model_name": self.model}
            if isinstance(value.get("id"), str):
                about["id"] = value["id"]
            headers, parts = encode("outputs", _wanted(await infer(feeds), value), about, binary=binary)
            return Response(b"".join(parts), headers=headers)
        except ShoalError as error:
            status = next((status for family, status in _STATUS.items() if isinstance(error, family)), 500)
            return JSONResponse({"error": f"{error.what} {error.why}"}, status)

    def metadata(self) -> dict[str, Any]:
        names = {np.dtype(code).newbyteorder("="): name for name, code in DATATYPES.items()}

        def listed(values: Mapping[str, Any]) -> list[dict[str, Any]]:
            shapes = {
                name: [dim if isinstance(dim, int) else -1 for dim in value.dims] for name, value in values.items()
            }
            return [
                {"name": name, "datatype": names[values[name].dtype], "shape": shape} for name, shape in shapes.items()
            ]

        session = self.tail.session
        assert isinstance(session, Session)
        about = {"name": self.model, "versions": [self.tail.digest], "platform": "shoal"}
        return about | {"inputs": listed(session.inputs), "outputs": listed(session.outputs)}


def _asked(value: dict[str, Any]) -> list[dict[str, Any]]:
    """The outputs that a request names."""
    asked = value.get("outputs") or []
    if not isinstance(asked, list) or not all(isinstance(part, dict) for part in asked):
        raise UsageError("The request's outputs are no list of objects.", "The protocol wants that.", "Mend it.")
    return asked


def _binary(value: dict[str, Any]) -> bool:
    """Whether a request wants raw tensors back."""
    told = [part.get("parameters") for part in (value, *_asked(value))]
    return any(isinstance(part, dict) and (part.get("binary_data_output") or part.get("binary_data")) for part in told)


def _wanted(outputs: dict[str, np.ndarray], value: dict[str, Any]) -> dict[str, np.ndarray]:
    """Of the outputs those that a request names, all by default."""
    asked = [str(part.get("name")) for part in _asked(value)] or list(outputs)
    if missing := [name for name in asked if name not in outputs]:
        raise UsageError(f"There is no output {missing[0]!r}.", f"There are {', '.join(outputs)}.", "Ask for those.")
    return {name: outputs[name] for name in asked}
