"""How fast a line moves and whether it moves at all: the size of a chunk, when to ask, when to give up.

It knows no bytes, only how many, and no clock: `now` comes in, seconds of any monotonic clock.
"""

import math

CHUNK_SECONDS = 0.045  # what one chunk may take on the line, so that a control frame waits under 50 ms for it
MIN_CHUNK = 256
MAX_CHUNK = (16 << 10) - 22  # a TLS record adds 22 bytes: 16 KiB on the wire
_RUN_SECONDS = 0.25


class Pace:
    """A line of `rate` bytes a second, measured where it is None."""

    def __init__(self, rate: float | None, keep_alive: float, silence: float, now: float):
        self.rate = rate
        self._known = rate is not None
        self._keep_alive, self._silence = keep_alive, silence
        self._heard = self._took = self._free = now  # _free: when nothing was last seen waiting
        self._run = now, 0  # since when the line was never short of bytes, and how many it took since
        self._busy = False

    @property
    def chunk(self) -> int:
        rate = math.inf if self.rate is None else self.rate
        return int(min(max(rate * CHUNK_SECONDS, MIN_CHUNK), MAX_CHUNK))

    def heard(self, now: float) -> None:
        self._heard = now

    def asked(self, now: float) -> None:
        """The line asks for bytes: it took all that it was given before."""
        since, taken = self._run
        if not self._busy:
            self._run = now, 0
        elif now - since >= _RUN_SECONDS:
            self._run = now, 0
            if not self._known:
                self.rate = taken / (now - since)

    def given(self, size: int, more: bool, now: float) -> None:
        """It got `size` bytes; `more` wait."""
        self._took = now if size else self._took
        self._run = self._run[0], self._run[1] + size
        self._busy = more

    def quiet(self, now: float) -> bool:
        """This side said nothing for so long that the peer might give up."""
        return now >= self._took + self._keep_alive

    def dead(self, pending: bool, now: float) -> str:
        """Why the line is over, "" if it is not. `pending`: something waits to be sent."""
        self._free = self._free if pending else now
        if now >= self._heard + self._silence:
            return f"the line brought nothing for {self._silence:g} s"
        if now >= max(self._free, self._took) + self._silence:
            return f"the line took nothing for {self._silence:g} s"
        return ""

    def wakeup(self, asked: bool) -> float:
        """When `quiet` (unless it was `asked` already) or `dead` may next be true."""
        due = min(self._heard, max(self._free, self._took)) + self._silence
        return due if asked else min(due, self._took + self._keep_alive)
