"""Stop strings: the outcome is that of looking at one character at a time, wherever the pieces are cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.runtime.errors import UsageError
from shoal.runtime.language.stop import StopStrings, overlap

SMALL = st.text("abc", max_size=30)


def one_by_one(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The definition: the first end of a stop string; of those that end there the longest."""
    for end in range(len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            longest = max(ended, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(pieces=st.lists(SMALL, max_size=12), stops=st.lists(st.text("abc", min_size=1, max_size=5), max_size=4))
def test_pieces_do_not_matter(pieces, stops):
    search, shown, text = StopStrings(stops), "", ""
    expected, found = one_by_one("".join(pieces), stops)
    for piece in pieces:
        text += piece
        shown += search.push(piece)
        assert expected.startswith(shown)  # nothing is shown that is taken back
        if search.found is None:  # and nothing is held back that is certain
            assert len(text) - len(shown) <= max((overlap(text, stop) for stop in stops), default=0)
    assert (shown + search.flush(), search.found) == (expected, found)


def test_a_stop_string_across_pieces():
    search = StopStrings(("\nUser:", "###"))
    pieces = ("Hello#", "#", " \nUs", "er", ":", " more")
    assert [search.push(piece) for piece in pieces] == ["Hello", "", "## ", "", "", ""]
    assert search.found == "\nUser:" and search.flush() == ""


@pytest.mark.parametrize("stops", ["text", ("",), (5,), ("x" * 5000,), ["a"] * 65])
def test_what_cannot_be_a_stop_string(stops):
    with pytest.raises(UsageError):
        StopStrings(stops)
