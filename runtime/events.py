"""Progress of long work, as values.

Library code never prints: it calls `progress(Event(...))` where a caller passed one. The CLI draws bars from events,
the server and tests collect them.
"""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Event:
    """`done` of `total` (0 when unknown) in `unit`s of `stage`; `detail` names the thing at hand."""

    stage: str
    done: int = 0
    total: int = 0
    detail: str = ""
    unit: str = ""


Progress = Callable[[Event], None]


def silent(event: Event) -> None:
    """The default `progress`: keeps nothing."""
