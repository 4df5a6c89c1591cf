"""`shoal inspect` on split networks, on stacks, and on bundles whose digests are right and whose contents are not."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from shoal import cli
from shoal.converters.recipe import NAMED
from shoal.converters.split.tail import pack
from shoal.runtime.bitstack.layout import Index, Stacked, StackFormat
from shoal.runtime.bundle import Graph, create
from shoal.runtime.kernels.layout import LinearFormat
from shoal.runtime.split.quantise import Quantiser
from shoal.runtime.split.tables import Tables

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))
from make_split import slimmable, split  # noqa: E402

JUNK = [b"", b"{", b"\xff", b"null", b"[]", b"3", b'"linear"', b"[" * 100_000, b"1" * 5000]
WRONG = {
    "card": [*JUNK, b"{}", b'{"blocks": "many"}'],
    "recipe": [
        *JUNK,
        b'{"linear": 4}',
        b'{"rules": [1]}',
        b'{"rules": [["a", 4]]}',
        b'{"rules": 4}',
        b'{"ladder": 4}',
        b'{"ladder": {"rungs": [1]}}',
    ],
    "modes": [
        *JUNK,
        b"{}",
        b'{"name": 1, "encoder": "", "tables": "", "modes": []}',
        b'{"name": "", "encoder": "", "tables": "", "modes": [1]}',
        b'{"name": "", "encoder": "", "tables": "", "modes": [{"id": "\\u001b"}]}',
    ],
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


def test_a_network_cut_in_two_shows_what_it_takes_and_gives(tmp_path, capsys):
    made, mode = split(), {"id": 1, "bits": 8, "bytes": 1024, "device_ms": 2.5, "accuracy": 0.7}
    pack({"head": made.head, "tail": made.tail}, tmp_path / "a", "c\033ats", tables="ab" * 32, modes=[mode])
    assert cli.main(["inspect", str(tmp_path / "a")]) == 0
    said = capsys.readouterr().out
    for row in ("name    c?ats", "tables  abab", "head   head  cpu", "head   takes  image   float32  n x 3 x 32 x 32",
                "head   gives  latent  float32  n x 16 x 8 x 8", "tail   gives  label   int64    n",
                "mode  bits  bytes  device_ms  accuracy", "   1     8  1,024        2.5       0.7"):  # fmt: skip
        assert row in said, said
    assert "card" not in said
    assert cli.main(["inspect", str(tmp_path / "a"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["modes"] == {"name": "c\033ats", "encoder": "", "tables": "ab" * 32, "modes": [mode]}
    assert found["graphs"][1]["inputs"] == [{"name": "latent", "dtype": "float32", "shape": ["n", 16, 8, 8]}]


def test_codecs_are_shown_with_the_modes_that_name_them(tmp_path, capsys):
    samples = np.random.default_rng(0).standard_normal((8, 16, 8, 8), np.float32)
    tables = Tables.fit(Quantiser.fit(samples, 4), samples)
    mode = {"id": 1, "encoder": 2, "codec": "e2b4", "bits": 4, "bytes": 500}
    pack({"head": slimmable().head}, tmp_path / "a", modes=[mode], codecs={"e2b4": tables.to_bytes()})
    assert cli.main(["inspect", str(tmp_path / "a")]) == 0
    said = capsys.readouterr().out
    assert "mode  encoder  codec  bits  bytes" in said and "codec  bits  channels  tables" in said, said
    assert cli.main(["inspect", str(tmp_path / "a"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["codecs"]
    assert found == [{"name": "e2b4", "bits": 4, "channels": 16, "tables": 16}]
    with create(tmp_path / "b") as writer:
        writer.add("codec", "e2b4", tables.to_bytes()[:-1])
        writer.commit()
    assert cli.main(["inspect", str(tmp_path / "b")]) == 5
    assert "codec" in capsys.readouterr().err


def test_a_graph_that_is_none_is_the_bundle_s_fault(tmp_path, capsys):
    with create(tmp_path / "a") as writer:
        writer.add("graph", "tail", b"\xff" * 40)
        writer.graph(Graph("tail", "tail", "cpu", 0, 0, 0, "tail"))
        writer.commit()
    assert cli.main(["inspect", str(tmp_path / "a")]) == 5
    assert "graph" in capsys.readouterr().err


def stacked(path, index: bytes, length: int):
    with create(path) as writer:
        writer.add("stack", "index", index, required=True)
        writer.add("stack", "blocks", bytes(length), required=True)
        writer.commit()


def test_a_stack_is_shown(tmp_path, capsys):
    block, rung = StackFormat(64, 16, 2), LinearFormat(64, 16, 4, 32, 64)
    matrices = (Stacked("a", 64, 16, 0, (block, block)), Stacked("b", 64, 16, 0, (block, rung)))
    index = Index(matrices, (0, 1, 0, 1), 2, "average", ((2, 99.5), (4, 12.25)), {"greedy": (1, 0, 1, 0)})
    stacked(tmp_path / "a", index.to_json(), sum(entry.length for entry in index.entries()))
    assert cli.main(["inspect", str(tmp_path / "a")]) == 0
    said = capsys.readouterr().out
    for row in ("matrices    2\n", "entries     4: 3 blocks of rank 2, whole matrices in 4 bits",
                "floor       2 entries, ", "order       average, also greedy",
                "perplexity  99.50 with 2 entries, "):  # fmt: skip
        assert row in said, said
    assert cli.main(["inspect", str(tmp_path / "a"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["stack"]
    sizes = index.sizes()
    assert (found["floor_bytes"], found["bytes"]) == (sizes[2], sizes[4])
    assert found["curve"] == [[2, sizes[2], 99.5], [4, sizes[4], 12.25]]


@pytest.mark.parametrize("index", [*JUNK, b'{"version": 1}', b'{"version": 1, "matrices": [1]}'],
                         ids=lambda value: repr(value[:24]))  # fmt: skip
def test_a_wrong_stack_is_the_bundle_s_fault(tmp_path, capsys, index):
    stacked(tmp_path / "a", index, 64)
    assert cli.main(["inspect", str(tmp_path / "a")]) == 5
    said = capsys.readouterr()
    assert said.out == "" and "stack" in said.err and "fix: " in said.err
