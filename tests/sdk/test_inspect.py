"""`shoal inspect` on bundles whose digests are right and whose contents are not."""

import pytest

from shoal import cli
from shoal.converters.recipe import NAMED
from shoal.runtime.bundle import create

JUNK = [b"", b"{", b"\xff", b"null", b"[]", b"3", b'"linear"', b"[" * 100_000, b"1" * 5000]
WRONG = {
    "card": [*JUNK, b"{}", b'{"blocks": "many"}'],
    "recipe": [*JUNK, b'{"linear": 4}', b'{"rules": [1]}', b'{"rules": [["a", 4]]}', b'{"rules": 4}'],
    "parity": [*JUNK, b'{"parity": 4}', b'{"parity": {"texts": "many"}}', b'{"parity": {"kl": 1e999}}'],
}


@pytest.mark.parametrize(("kind", "data"), [(kind, data) for kind in WRONG for data in WRONG[kind]],
                         ids=lambda value: repr(value[:24]))  # fmt: skip
def test_wrong_contents_are_the_bundle_s_fault(tmp_path, capsys, kind, data):
    with create(tmp_path / "a") as writer:
        writer.add(kind, "", data)
        writer.commit()
    for options in ([], ["--json"]):
        assert cli.main(["inspect", str(tmp_path / "a"), *options]) == 5
        said = capsys.readouterr()
        assert said.out == "" and kind in said.err and "fix: " in said.err


def test_a_recipe_that_this_version_cannot_follow_is_shown(tmp_path, capsys):
    with create(tmp_path / "a") as writer:
        writer.add("recipe", "", NAMED["int4"].to_json().replace(b'"rtn"', b'"awq"'))
        writer.commit()
    assert cli.main(["inspect", str(tmp_path / "a")]) == 0
    said = capsys.readouterr().out
    assert "awq" in said and "4 bits, in groups of 32, with zero points, rotated" in said
    assert "8 bits, by rows, with zero points, rotated" in said
