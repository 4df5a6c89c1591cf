"""Cuts of networks that were not trained for it: scan, minimum cut and brute force agree; profiles of real graphs."""

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.runtime.errors import UsageError
from shoal.runtime.split.energy import Meter
from shoal.runtime.split.partition import INPUT, Line, Piece, Powers, cut, elsewhere, judge, profile, scan

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "data"))
from make_split import build, slimmable, split  # noqa: E402

seconds = st.integers(0, 100).map(lambda ms: ms / 1000)
sizes = st.integers(0, 100_000)
lines = st.builds(Line, st.sampled_from([1e4, 1e5, 1e6, 1e7]), seconds, st.sampled_from([0.0, 1e5]), seconds,
                  st.floats(0.5, 4.0))  # fmt: skip
powers = st.none() | st.builds(Powers, *[st.floats(0, 5)] * 4, st.floats(0, 0.5))


@st.composite
def graphs(draw, chain: bool = False):
    """Pieces that need earlier ones, at least one each."""
    found = []
    for place in range(draw(st.integers(1, 8))):
        others = st.lists(st.integers(INPUT, place - 1), min_size=1, max_size=3, unique=True).map(sorted)
        needs = (place - 1,) if chain else tuple(draw(others))
        found.append(Piece(f"p{place}", draw(seconds), draw(seconds), draw(sizes), needs))
    return found


@given(graphs(chain=True), sizes, lines, powers)
def test_on_a_chain_the_cut_is_the_scan_s(pieces, nbytes, line, watts):
    one, other = scan(pieces, nbytes, line, watts), cut(pieces, nbytes, line, watts)
    assert one.objective == other.objective
    best = min(judge(pieces, nbytes, range(place), line, watts).objective for place in range(len(pieces) + 1))
    assert one.objective == best


@given(graphs(), sizes, lines, powers)
def test_on_any_graph_it_is_brute_force_s(pieces, nbytes, line, watts):
    costs = []
    for chosen in itertools.product((False, True), repeat=len(pieces)):
        here = frozenset(place for place, mine in enumerate(chosen) if mine)
        if all(need == INPUT or need in here for place in here for need in pieces[place].needs):
            costs.append(judge(pieces, nbytes, here, line, watts).objective)
    assert cut(pieces, nbytes, line, watts).objective == min(costs)


@given(graphs(), sizes, lines)
def test_a_value_with_several_consumers_is_paid_for_once(pieces, nbytes, line):
    found = cut(pieces, nbytes, line)
    crossing = {need for place, piece in enumerate(pieces) if place not in found.here for need in piece.needs
                if need == INPUT or need in found.here}  # fmt: skip
    assert found.sent == sum(nbytes if need == INPUT else pieces[need].nbytes for need in crossing)
    here = sum(pieces[place].here for place in found.here)
    there = sum(piece.there for place, piece in enumerate(pieces) if place not in found.here) * line.load
    away = line.rtt + line.queue + line.answer / (line.down or line.up) if len(found.here) < len(pieces) else 0.0
    assert found.seconds == pytest.approx(here + there + found.sent / line.up + away, abs=1e-6)


def test_the_staircase_of_neurosurgeon():
    """With layers that shrink, a slower link keeps more of the network here; a fast one nothing."""
    pieces = [Piece(str(k), 0.010, 0.001, 100_000 >> k, (k - 1,)) for k in range(10)]
    kept = [len(scan(pieces, 200_000, Line(rate)).here) for rate in (1e9, 1e7, 1e6, 1e5, 1e4, 1e2)]
    assert kept[0] == 0 and kept[-1] == 10 and kept == sorted(kept) and 0 < kept[2] < 10
    frugal = Powers(cpu=0.1, tx=5.0, tail=1.0)
    assert len(scan(pieces, 200_000, Line(1e7), frugal).here) == 10  # a radio's tail costs more than all of it
    eager = Powers(cpu=5.0, tx=0.1)
    assert not scan(pieces, 200_000, Line(1e6), eager).here


def test_what_is_no_network_is_refused():
    fork = [Piece("a", 1, 1, 1, (INPUT,)), Piece("b", 1, 1, 1, (INPUT, 0))]
    with pytest.raises(UsageError, match="no chain"):
        scan(fork, 1, Line(1.0))
    with pytest.raises(UsageError, match="needs a later"):
        cut([Piece("a", 1, 1, 1, (1,)), Piece("b", 1, 1, 1, (0,))], 1, Line(1.0))
    with pytest.raises(UsageError, match="from the edge"):
        judge(fork, 1, {1}, Line(1.0))


def test_a_graph_of_a_thousand_pieces_is_cut_in_a_moment():
    rng = np.random.default_rng(0)
    pieces = [
        Piece(
            str(k),
            *rng.uniform(0, 1e-3, 2),
            int(rng.integers(1, 1e5)),
            tuple({max(INPUT, k - 1 - int(d)) for d in jump}),
        )
        for k, jump in enumerate(rng.geometric(0.5, (1000, 2)) - 1)
    ]
    found = cut(pieces, 150_000, Line(1e7))
    ends = [judge(pieces, 150_000, range(place), Line(1e7)).objective for place in range(0, 1001, 50)]
    assert found.objective <= min(ends)


def test_a_real_network_s_prefixes_say_what_needs_what_and_how_much_it_gives():
    events: list = []
    image = {"image": np.ones((1, 3, 32, 32), np.float32)}
    pieces = profile(split().whole, image, runs=2, progress=events.append)
    names = [piece.name.split(":")[0] for piece in pieces]
    assert names == [
        "Conv",
        "Relu",
        "Conv",
        "Relu",
        "Conv",
        "Relu",
        "Add",
        "GlobalAveragePool",
        "Flatten",
        "Gemm",
        "ArgMax",
    ]
    assert [piece.needs for piece in pieces] == [(INPUT,), (0,), (1,), (2,), (3,), (4,), (3, 5), (6,), (7,), (8,), (9,)]
    assert [piece.nbytes for piece in pieces[:4]] == [8 * 16 * 16 * 4] * 2 + [16 * 8 * 8 * 4] * 2
    assert all(piece.here >= 0 for piece in pieces) and sum(piece.here for piece in pieces) > 0
    assert events[-1].done == events[-1].total == 11
    far = elsewhere(pieces, 10.0)
    assert far[0].there == pieces[0].here / 10
    assert elsewhere(pieces, far)[0].there == far[0].here
    nbytes = image["image"].nbytes
    slow, fast = cut(far, nbytes, Line(1.0)), cut(far, nbytes, Line(1e15))
    assert len(slow.here) == 11 and slow.sent == 0 and not fast.here and fast.sent == nbytes


def test_values_of_weights_alone_are_on_both_sides_and_branches_are_refused():
    body = """s = Shape (w) two = Constant <value_float = 2.0> () v = Mul (w, two)
              a = Mul (x, v) b, c = Split <axis = 1, num_outputs = 2> (a) d = Relu (b) y = Add (d, c)"""
    weights = {"w": np.ones(4, np.float32)}
    graph = build("g", "float[n, 4] x", "float[n, 2] y", body, weights, ("w",))
    pieces = profile(graph, {"x": np.ones((3, 4), np.float32)}, runs=1)
    assert [piece.needs for piece in pieces] == [(INPUT,), (0,), (1,), (1, 2)]
    assert [piece.nbytes for piece in pieces] == [48, 48, 24, 24]
    with pytest.raises(UsageError, match="operator If"):
        profile(slimmable().head, {"image": np.ones((1, 3, 32, 32), np.float32), "encoder": np.array(1)})


def test_a_meter_says_what_a_board_says_or_nothing(tmp_path):
    assert Meter(tmp_path).joules() is None and Meter(tmp_path).watts() is None
    zone, core, sensor = (
        tmp_path / name for name in ("powercap/intel-rapl:0", "powercap/intel-rapl:0:0", "hwmon/hwmon3")
    )
    for folder in (zone, core, sensor):
        folder.mkdir(parents=True)
    for folder, start in ((zone, 900_000), (core, 5)):
        (folder / "energy_uj").write_text(f"{start}\n")
        (folder / "max_energy_range_uj").write_text("1000000\n")
    (sensor / "power1_input").write_text("2500000\n")
    meter = Meter(tmp_path)
    (zone / "energy_uj").write_text("100000\n")  # it ran over
    assert meter.joules() == pytest.approx(0.2) and meter.watts() == 2.5
    (zone / "energy_uj").write_text("nonsense")
    (sensor / "power1_input").unlink()
    assert meter.joules() is None and meter.watts() is None
    real = Meter()
    assert real.joules() is None or real.joules() >= 0
