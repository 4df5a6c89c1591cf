"""Stop strings in text that comes in pieces.

Text is given on as soon as no stop string can begin in it any more; where one is found, what precedes it is the end.
The outcome does not depend on where the pieces are cut. It knows nothing about tokens or models.
"""

from ..errors import UsageError

_MOST, _LONGEST = 64, 4096


class StopStrings:
    """The search for `stops` in one answer. `found` is the stop string that ended it, None until then.

    The one that is complete first wins, and of several that end together the longest. Raises UsageError for more than
    64 of them, one that is empty, longer than 4,096 characters or no text.
    """

    def __init__(self, stops: tuple[str, ...] | list[str] = ()):
        if isinstance(stops, str) or len(stops) > _MOST:
            raise UsageError(
                "The stop strings cannot be used.", f"They are no list of at most {_MOST}.", "Give a list."
            )
        for stop in stops:
            if not isinstance(stop, str) or not 0 < len(stop) <= _LONGEST:
                raise UsageError(
                    f"A stop string is {stop!r:.60}.",
                    f"It must be a text of 1 to {_LONGEST} characters.",
                    "Correct it.",
                )
        self.found: str | None = None
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> str:
        """What is certain of the answer after one more piece; nothing once a stop string was found."""
        if self.found is not None:
            return ""
        self._held += text
        ends = [(at + len(stop), at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if ends:
            _, at, self.found = min(ends)
            text, self._held = self._held[:at], ""
            return text
        keep = max((overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text

    def flush(self) -> str:
        """What was held back, at the end of the answer."""
        text, self._held = self._held, ""
        return text


def overlap(text: str, mark: str) -> int:
    """How many of the last characters of `text` are the beginning of `mark`, but not all of it."""
    most = min(len(text), len(mark) - 1)
    return next((count for count in range(most, 0, -1) if mark.startswith(text[len(text) - count :])), 0)
