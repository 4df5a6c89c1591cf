"""What a person sees: answers on stdout, everything else on stderr.

A `Show` turns progress events into bars on a terminal and into a few plain lines elsewhere, prints text and tables, and
with `--json` keeps stdout for one JSON value. It knows nothing about models or verbs.
"""

import json
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

from .runtime.errors import ShoalError
from .runtime.events import Event

BYTES = ("B", "bytes")  # units of events that are shown in KiB, MiB, GiB
_QUIET_SECONDS = 5.0  # between two lines of one stage, where there is no terminal


class Show:
    """`progress` is a callback for library code; use as a context manager so that an open bar is closed.

    as_json: `line`, `table` and `text` print nothing, `json` prints.
    """

    def __init__(self, as_json: bool = False, stdout: TextIO | None = None, stderr: TextIO | None = None):
        self.as_json = as_json
        self._stdout, self._stderr = stdout or sys.stdout, stderr or sys.stderr
        self._bars = self._stderr.isatty() and _has_tqdm()
        self._stage = ""
        self._bar: Any = None
        self._spoke = 0.0

    def __enter__(self) -> "Show":
        return self

    def __exit__(self, *_) -> None:
        self._close_bar()

    def line(self, text: str = "") -> None:
        """A line of the answer, for a person."""
        self.text(text + "\n")

    def text(self, piece: str) -> None:
        """A piece of the answer, shown at once."""
        self._close_bar()
        if not self.as_json:
            self._stdout.write(piece)
            self._stdout.flush()

    def table(self, rows: Iterable[Sequence[object]], heading: Sequence[str] = ()) -> None:
        """Columns as wide as their widest cell; one of numbers and gaps below its heading is set right."""
        if not self.as_json:
            for row in align(rows, heading):
                self.line(row)

    def json(self, value: object) -> None:
        """The answer for a program: one JSON value."""
        self._close_bar()
        if self.as_json:
            json.dump(value, self._stdout, indent=2, default=str)
            self._stdout.write("\n")
            self._stdout.flush()

    def note(self, text: str) -> None:
        """A line beside the answer, on stderr: speeds, warnings."""
        self._close_bar()
        self._stderr.write(text + "\n")
        self._stderr.flush()

    def error(self, error: ShoalError) -> None:
        """Three lines: what, why, fix."""
        self.note(str(error))

    def progress(self, event: Event) -> None:
        """Draws `event`. A stage ends when another begins or when anything else is printed."""
        if self._bars:
            self._draw(event)
        else:
            self._tell(event)

    def _draw(self, event: Event) -> None:
        from tqdm import tqdm

        counted, in_bytes = event.total > 0, event.unit in BYTES
        if self._bar is None or event.stage != self._stage or counted != bool(self._bar.total):
            self._close_bar()
            self._stage = event.stage
            self._bar = tqdm(
                desc=event.stage if counted else describe(event), total=event.total or None,
                unit="B" if in_bytes else f" {event.unit or 'steps'}", unit_scale=in_bytes, unit_divisor=1024,
                file=self._stderr, dynamic_ncols=True, smoothing=0.1,
                leave=counted, bar_format=None if counted else "{desc}",  # without an end: a line while it lasts
            )  # fmt: skip
        bar = self._bar
        if counted:
            bar.total = event.total
            bar.set_postfix_str(event.detail[-40:], refresh=False)
            bar.update(event.done - bar.n)
        else:
            bar.set_description_str(describe(event))

    def _tell(self, event: Event) -> None:
        now, ends = time.monotonic(), 0 < event.total <= event.done
        if event.stage == self._stage and not ends and now - self._spoke < _QUIET_SECONDS:
            return
        self._stage, self._spoke = event.stage, now
        self._stderr.write(describe(event) + "\n")
        self._stderr.flush()

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self._stage = ""


def describe(event: Event) -> str:
    """An event as one line of text."""
    amount = size if event.unit in BYTES else "{:,}".format
    count = ""
    if event.total:
        count = f" {amount(event.done)} of {amount(event.total)}"
    elif event.done:
        count = f" {amount(event.done)}"
    unit = f" {event.unit}" if count and event.unit not in ("", *BYTES) else ""
    return f"{event.stage}{count}{unit}{': ' + event.detail if event.detail else ''}"


def align(rows: Iterable[Sequence[object]], heading: Sequence[str] = ()) -> list[str]:
    """The lines of a table. Cells are shown with str(), integers with thousands separators."""
    body = [[f"{cell:,}" if type(cell) is int else str(cell) for cell in row] for row in rows]
    cells = [list(heading), *body] if heading else body
    if not cells:
        return []
    widths = [max(len(cell) for cell in column) for column in zip(*cells, strict=True)]
    columns = zip(*body, strict=True) if body else [()] * len(widths)
    right = [any(column) and all(cell[:1].isdigit() or not cell for cell in column) for column in columns]
    lines = []
    for row in cells:
        padded = [cell.rjust(w) if flag else cell.ljust(w) for cell, w, flag in zip(row, widths, right, strict=True)]
        lines.append("  ".join(padded).rstrip())
    return lines


def size(count: float) -> str:
    """`count` bytes with three figures and a binary unit: 4096 is 4.00 KiB."""
    unit = "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 999.5:
            break
        count, unit = count / 1024, larger
    decimals = 0 if unit == "B" or abs(count) >= 99.95 else 1 if abs(count) >= 9.995 else 2
    return f"{count:.{decimals}f} {unit}"


def _has_tqdm() -> bool:
    from importlib.util import find_spec

    return find_spec("tqdm") is not None
