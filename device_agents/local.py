"""Models of this device, as a fallback: what answers when the edge does not.

A bundle's graphs say what it can do: `head` makes latents for a tail, `local` (or head and tail together, or a tail
alone) gives a whole answer, here as on the edge. A graph is opened when it is first needed and runs in the caller's
thread. Of a head with several encoders a mode names one, and the codec that makes a message of its latent. It knows
nothing about links or who asks.
"""

import logging
import os
import threading
import time
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import numpy as np

from shoal.runtime.bundle import Bundle
from shoal.runtime.errors import BackendError, BundleError, ShoalError, UsageError
from shoal.runtime.session import Place, Session, Value, open_graph
from shoal.runtime.split import modes
from shoal.runtime.split.codec import Codec
from shoal.runtime.split.link import coders
from shoal.runtime.split.modes import ENCODER

from .messages import Model
from .store import Store, describe

_ANSWERS, _WRITES = frozenset({"head", "local", "tail"}), frozenset({"decode", "part"})
_SMOOTH = 0.3  # weight of the newest run in what an answer is expected to take
_PROBED = 1 << 24  # values of one input at most that a probe makes up

_log = logging.getLogger("shoal.agent")


class Local:
    """The bundle at `path`, called `name` (its own name if ""). `seconds` is what an answer lately took, None before
    the first. Raises BundleError, StorageError."""

    def __init__(self, path: Path, name: str = "", threads: int = 0):
        self.bundle, self._threads = Bundle.open(path), threads
        try:
            about = describe(self.bundle)
        except BaseException:
            self.bundle.close()
            raise
        self.name = name or about["name"]
        length = Path(path).stat().st_size
        self.model = Model(
            self.bundle.digest, self.name, about["role"], about["encoder"], about["tables"], about["modes"], length
        )
        self.path, self.roles = self.bundle.path, frozenset(graph.role for graph in self.bundle.graphs)
        self.seconds: float | None = None
        self._sessions: dict[str, Session] = {}
        self._opening = threading.Lock()

    @property
    def answers(self) -> bool:
        """Whether it can give a whole answer."""
        return bool(self.roles & {"local", "tail"})

    def prepare(self, feeds: Mapping[str, np.ndarray], mode: int = 0) -> Mapping[str, np.ndarray] | bytes:
        """What the edge's tail takes in that mode: the message of its codec, or the head's outputs where it names none;
        `feeds` as they are where there is no head for these inputs."""
        if not self._heads(feeds):
            return feeds
        outputs = self._latents(feeds, self._encoders.get(mode, 0))
        codec = self._codecs.get(mode)
        return codec.encode(next(iter(outputs.values()))) if codec is not None else outputs

    def answer(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """A whole answer, computed here. Raises UsageError where it cannot give one, BackendError where it fails."""
        if not self.answers:
            raise UsageError(f"{self.name} gives no answer here.", "It has no graph for one.", "Wait for the edge.")
        began = time.monotonic()
        if "local" in self.roles and set(self._session("local").inputs) == set(feeds):
            outputs = self._session("local").run(feeds)
        elif "tail" in self.roles:
            best = max(self._encoders.values(), default=0)
            outputs = self._session("tail").run(self._latents(feeds, best) if self._heads(feeds) else feeds)
        else:
            outputs = self._session("local").run(feeds)  # which says what it takes
        took = time.monotonic() - began
        self.seconds = took if self.seconds is None else self.seconds + _SMOOTH * (took - self.seconds)
        return outputs

    def _heads(self, feeds: Mapping[str, np.ndarray]) -> bool:
        """Whether there is a head for these inputs."""
        return "head" in self.roles and set(self._session("head").inputs) - {ENCODER} == set(feeds) - {ENCODER}

    def _latents(self, feeds: Mapping[str, np.ndarray], encoder: int) -> dict[str, np.ndarray]:
        """The head's outputs but a filter's score; of one with several encoders, that one's, or the one that `feeds`
        names."""
        head = self._session("head")
        outputs = head.run({ENCODER: np.array(encoder), **feeds} if ENCODER in head.inputs else feeds)
        return {name: array for name, array in outputs.items() if name in self._tensors}

    @cached_property
    def _table(self) -> modes.ModeTable | None:
        try:
            return modes.read(self.bundle)
        except BundleError:  # no modes, or none that can be read, of which the edge was not told either
            return None

    @cached_property
    def _encoders(self) -> dict[int, int]:
        """The encoder of each mode."""
        return {mode.id: mode.encoder for mode in self._table.modes} if self._table else {}

    @cached_property
    def _tensors(self) -> Mapping[str, Value]:
        """What of the head's outputs is for the tail."""
        outputs = self._session("head").outputs
        return modes.scored(outputs, self._table) if self._table else outputs

    @cached_property
    def _codecs(self) -> dict[int, Codec]:
        try:
            return coders(self.bundle, self._tensors, "head")
        except BundleError as error:
            _log.warning("latents of %s go as they are: %s", self.name, error.why)
            return {}

    def probe(self) -> None:
        """Opens every graph of ours and runs it once on zeros. Raises ShoalError: it does not work on this device."""
        for role in sorted(self.roles & _ANSWERS):
            session, feeds = self._session(role), {}
            for name, value in session.inputs.items():
                shape = tuple(dim if isinstance(dim, int) else 1 for dim in value.dims)
                if any(dim < 0 for dim in shape) or np.prod(shape, dtype=object) > _PROBED:
                    raise BundleError(f"{self.name} cannot be tried.", f"{name!r} is {shape}.", "Convert it again.")
                feeds[name] = np.zeros(shape, value.dtype)
            if ENCODER in feeds:
                feeds[ENCODER] += max(self._encoders.values(), default=0)
            for name, array in session.run(feeds).items():
                if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
                    raise BackendError(f"{self.name} does not work here.", f"{name!r} is not finite.", "Go back.")

    def close(self) -> None:
        """Frees it; a run that is under way ends first by itself."""
        with self._opening:
            sessions, self._sessions, self.roles = self._sessions, {}, frozenset()
        for session in sessions.values():
            session.close()
        self.bundle.close()

    def _session(self, role: str) -> Session:
        with self._opening:
            if role not in self._sessions:
                graph = next((graph for graph in self.bundle.graphs if graph.role == role and self.roles), None)
                if graph is None:
                    raise UsageError(f"{self.name} has no {role}.", "It was closed, or never had one.", "Try again.")
                places = {
                    section.name: Place(str(self.path), section.offset, section.length, self.bundle.fileno())
                    for section in self.bundle.sections
                    if section.kind == "weights"
                }
                data = self.bundle.bytes(self.bundle.section("graph", graph.section))
                self._sessions[role] = open_graph(data, places, threads=self._threads)
            return self._sessions[role]


class LocalModels:
    """The models that this device has `open`, by name: `given` ones, those of `store`, and those of updates, of which
    a later kind replaces an earlier one's name."""

    def __init__(self, given: Mapping[str, Path], store: Store, threads: int = 0):
        self.open: dict[str, Local] = {}
        self._given, self._store, self._threads = dict(given), store, threads

    @property
    def stated(self) -> tuple[Model, ...]:
        """As an edge is told."""
        return tuple(local.model for local in self.open.values())

    def find(self, name: str, text: bool = False) -> Local | None:
        """The model of that name, or the only one if ""; None where there is none. `text`: one that writes."""
        kind = _WRITES if text else _ANSWERS
        fit = {name: local for name, local in self.open.items() if local.roles & kind}
        if name:
            return fit.get(name)
        if len(fit) > 1:
            raise UsageError("Which model?", f"This device has {', '.join(sorted(fit))}.", "Name one.")
        return next(iter(fit.values()), None)

    def change(self, updated: Mapping[str, Path], on_trial: bool) -> list[Local]:
        """Opens what is new beside `updated`, tries it, and returns what is no longer used, for the caller to close.

        A model that does not work is left out; one of `updated` on trial raises ShoalError, and nothing has changed.
        """
        fetched = {entry.name: self._store.path(entry.digest) for entry in self._store.list()}
        known, made = {local.path: local for local in self.open.values()}, dict[str, Local]()
        for name, path in {**fetched, **self._given, **updated}.items():
            kept = known.get(Path(os.path.abspath(path)))
            try:
                made[name] = kept if kept and kept.name == name else self._opened(path, name, try_out=name in updated)
            except ShoalError as error:
                if name in updated and on_trial:
                    for local in made.values():
                        if local not in known.values():
                            local.close()
                    raise
                _log.warning("model %s is left out: %s %s", name, error.what, error.why)
        self.open = made
        return [local for local in known.values() if local not in made.values()]

    def close(self) -> None:
        for local in self.open.values():
            local.close()

    def _opened(self, path: Path, name: str, try_out: bool) -> Local:
        local = Local(path, name, self._threads)
        try:
            if try_out:
                local.probe()
        except BaseException:
            local.close()
            raise
        return local
