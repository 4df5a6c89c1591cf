"""Asking the edge for an answer under what was agreed, and knowing when not to.

It promises never to send more than was agreed at once, to believe nothing of an answer's lengths, and to leave an edge
that was late twice alone for a while. It knows nothing about who asks, nor what happens when the edge does not answer.
"""

import math
import time
from collections.abc import Callable, Mapping

import numpy as np

from shoal.runtime.errors import BusyError, LinkError
from shoal.runtime.split.link import Reply

from . import apps, messages
from .connection import Connection
from .local import Local
from .protocol import Priority

_REST, _LONGEST_REST = 0.5, 10.0  # seconds that an edge is left alone after it was late again


class Remote:
    """The agreement, and requests under it. `unhappy` is called when it should be made anew."""

    def __init__(self, unhappy: Callable[[], None], now: Callable[[], float] = time.monotonic):
        self.agreement: messages.Agreement | None = None
        self._unhappy, self._now = unhappy, now
        self._until = 0.0
        self._under_way = 0
        self._lates, self._resting = 0, 0.0

    def agree(self, agreed: messages.Agreement) -> None:
        self.agreement = agreed
        self._until = self._now() + max(1, agreed.valid_s) * 1.5  # the next one is asked for in time

    def forget(self) -> None:
        """The link is gone, and what was agreed with it."""
        self.agreement, self._until, self._lates = None, 0.0, 0

    def late(self) -> None:
        """The edge missed a deadline: the second time in a row it is left alone, longer each time."""
        self._lates += 1
        if self._lates > 1:
            self._resting = self._now() + min(_LONGEST_REST, _REST * 2 ** (self._lates - 2))

    @staticmethod
    def spare(local: Local | None, deadline: float) -> float:
        """Seconds of `deadline` to keep for an answer of our own: half of them where none was ever timed."""
        if local is None or not local.answers:
            return 0.0
        return deadline / 2 if local.seconds is None else 1.5 * local.seconds + 0.005

    def mode(self) -> int:
        """The best mode that is agreed, 0 where there is one way of working only."""
        return self.agreement.modes[0] if self.agreement and self.agreement.modes else 0

    async def ask(
        self, connection: Connection, sent: Mapping[str, np.ndarray] | bytes, seconds: float,
        local: Local | None = None, mode: int = 0, *, patient: bool = True,
    ) -> Reply:  # fmt: skip
        """The tail's answer to tensors, or to a message that the codec of `mode` wrote, waited for `seconds`.

        Raises BusyError where it is not to be asked now, nor in this mode. `patient`: not either while it is left alone
        for having been late; who is not has a policy of his own.
        """
        agreed = self.agreement
        if agreed is None or not agreed.tail or self._now() > self._until:
            raise _unasked(_reason(agreed))
        if local is not None and agreed.encoder and agreed.encoder != local.model.encoder:
            raise _unasked("Its tail belongs to another model.")
        if mode not in (agreed.modes or (0,)):
            raise _unasked(f"Mode {mode} is not agreed; {', '.join(map(str, agreed.modes))} are.")
        if self._under_way >= max(1, agreed.inflight):
            raise _unasked(f"{self._under_way} requests are on their way.")
        if patient and self._now() < self._resting:
            raise _unasked("It was late before.")
        if seconds <= 0:
            raise _unasked("There is no time for it.", "Allow more.")
        tables = local.model.tables if local else ""
        message, body = _request(agreed.tail, mode, tables, sent, max(1, math.floor(1000 * seconds)))
        self._under_way += 1
        try:
            call = connection.request(message, priority=Priority.LATENT, timeout=seconds, body=body, deadline=seconds)
            async with call:
                answer = await call.reply(seconds)
                if not isinstance(answer, messages.Inferred):
                    raise LinkError("The edge's answer makes no sense.", f"{type(answer).__name__}.", "Upgrade shoal.")
                fields = zip(answer.names, answer.dtypes, answer.shapes, strict=False)
                layout = apps.layout(
                    [{"name": name, "dtype": dtype, "shape": list(shape.dims)} for name, dtype, shape in fields]
                )
                outputs = apps.unpack(layout, await call.read(apps.nbytes(layout)))
        except BusyError:
            self._unhappy()
            raise
        finally:
            self._under_way -= 1
        self._lates = 0
        tail = (answer.queue_ms + answer.compute_ms) / 1000
        return Reply(outputs, min(max(tail, 0.0), seconds) if math.isfinite(tail) else 0.0)


def _request(
    tail: str, mode: int, tables: str, sent: Mapping[str, np.ndarray] | bytes, deadline: int
) -> tuple[messages.Infer | messages.InferCoded, bytes]:
    """The message and its body."""
    if isinstance(sent, bytes):
        return messages.InferCoded(tail, mode, tables, len(sent), deadline), sent
    said = apps.describe(sent)
    message = messages.Infer(
        tail, mode, tables, tuple(entry["name"] for entry in said), tuple(entry["dtype"] for entry in said),
        tuple(messages.Shape(tuple(entry["shape"])) for entry in said), deadline_ms=deadline,
    )  # fmt: skip
    return message, apps.raw(sent)


def _unasked(why: str, fix: str = "Wait.") -> BusyError:
    return BusyError("The edge is not asked.", why, fix)


def _reason(agreed: messages.Agreement | None) -> str:
    return (agreed.why if agreed else "") or "Nothing is agreed with it yet."
