"""An uncut network in two where the minimum cut says, with as many values as cross there, up to a paired device."""

import sys
from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto

from shoal.converters.split.partition import part, profile
from shoal.converters.split.tail import pack, pack_tail
from shoal.runtime.errors import ConvertError, UsageError
from shoal.runtime.session import open_graph
from shoal.runtime.split.partition import INPUT, Line, cut, elsewhere, judge

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "data"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "device_agents"))
from make_split import build, split  # noqa: E402

# A residual network: behind `a` there are two ways, and the image itself goes into the end
BODY = """
   a = Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (image, w0)
   r = Relu (a)
   c = Conv <pads = [1, 1, 1, 1]> (r, w1)
   s = Add (c, a)
   p = GlobalAveragePool (s)
   i = GlobalAveragePool (image)
   early = Flatten (i)
   f = Flatten (p)
   two = Add (bias, bias)
   g = Add (f, two)
   logits = Gemm <transB = 1> (g, w2)
   joined = Concat <axis = 1> (logits, early)
"""
RNG = np.random.default_rng(0)
WEIGHTS = {"w0": (8, 3, 3, 3), "w1": (8, 8, 3, 3), "w2": (5, 8), "bias": (8,)}


@pytest.fixture(scope="module")
def branched() -> bytes:
    arrays = {name: RNG.standard_normal(shape).astype(np.float32) for name, shape in WEIGHTS.items()}
    outputs = "float[n, 8] joined, float[n, 3] early"
    return build("branched", "float[n, 3, 16, 16] image", outputs, BODY, arrays, tuple(arrays))


def images(count: int = 3) -> np.ndarray:
    return np.random.default_rng(1).random((count, 3, 16, 16), np.float32)


def answers(model: bytes, feeds: dict) -> dict[str, np.ndarray]:
    with open_graph(model, {}, threads=1) as session:
        return session.run(feeds)


def place(pieces, names) -> list[int]:
    return [at for at, piece in enumerate(pieces) if set(piece.gives) & set(names)]


@pytest.mark.parametrize("here, crossing", [
    ("a", ["image sent", "a"]),
    ("a r c", ["image sent", "a", "c"]),
    ("a r c s p i early", ["p", "early sent"]),
    ("a r c s p i early f g logits", ["early sent", "logits"]),
    ("i", ["image sent", "i"]),
])  # fmt: skip
def test_every_value_that_crosses_is_given_and_taken(branched, here, crossing):
    pieces = profile(branched, {"image": images(1)}, runs=1)
    assert [piece.gives for piece in pieces if "two" in piece.gives] == []  # of weights only: no piece
    line = Line(up=1e6)
    found = judge(pieces, images(1).nbytes, frozenset(place(pieces, here.split())), line)
    head, tail = part(branched, pieces, found)
    expected, sent = answers(branched, {"image": images()}), answers(head, {"image": images()})
    assert sorted(sent) == sorted(crossing)
    assert sum(array[:1].nbytes for array in sent.values()) == found.sent
    for name, array in answers(tail, sent).items():
        np.testing.assert_allclose(array, expected[name], atol=1e-5)


def test_what_the_minimum_cut_finds_is_packed_and_answered_over_a_pairing(branched, tmp_path):
    """A tail of several inputs, whose values go as they are; its rows are those of several devices."""
    from paired import linked, run, until

    pieces = elsewhere(profile(branched, {"image": images(1)}, runs=1), 1.0)
    # Work such that the first convolution is best here, and the second one there
    weigh = {"a": (1e-4, 1.0), "r": (1e-6, 1.0), "c": (1.0, 1e-4)}
    pieces = tuple(
        piece.__class__(piece.name, *weigh.get(piece.gives[0], (1e-3, 1e-6)), piece.nbytes, piece.needs, piece.gives)
        for piece in pieces
    )
    found = cut(pieces, images(1).nbytes, Line(up=1e6, rtt=0.001))
    assert {"a", "r"} <= {pieces[at].gives[0] for at in found.here} < {"a", "r", "i", "early"}
    crossing = {need for at, piece in enumerate(pieces) if at not in found.here for need in piece.needs
                if need == INPUT or need in found.here}  # fmt: skip
    head, tail = part(branched, pieces, found)
    assert len(answers(head, {"image": images()})) == len(crossing) >= 2
    pack({"head": head, "tail": tail}, tmp_path / "device.shoal", "parted")
    pack_tail(tail, tmp_path / "edge.shoal", "parted")
    expected = answers(branched, {"image": images()})

    async def main():
        models = {"parted": tmp_path / "device.shoal"}
        async with linked(tmp_path, tmp_path / "edge.shoal", models=models) as (pair, agent):
            answer = await agent.infer({"image": images()}, deadline=20.0)
            assert answer.where == "edge" and sorted(answer.outputs) == ["early", "joined"]
            for name, array in answer.outputs.items():
                np.testing.assert_allclose(array, expected[name], atol=1e-5)
            await pair.stop_edge()
            await until(lambda: agent.connection is None)
            answer = await agent.infer({"image": images()}, deadline=20.0)
            assert answer.where == "local"
            np.testing.assert_allclose(answer.outputs["joined"], expected["joined"], atol=1e-5)

    run(main())


def test_a_cut_of_everything_or_of_another_network_is_refused(branched):
    pieces = profile(branched, {"image": images(1)}, runs=1)
    for here, said in ((range(0), "to the edge"), (range(len(pieces)), "to the device")):
        with pytest.raises(UsageError, match=said):
            part(branched, pieces, judge(pieces, 1, here, Line(up=1.0)))
    with pytest.raises(UsageError, match="another network"):
        part(split().whole, pieces, judge(pieces, 1, range(3), Line(up=1.0)))


def test_what_has_no_batch_is_named(tmp_path):
    body = """
       l = Shape (image)
       r = Relu (image)
       z = Constant <value_ints = [0]> ()
       n = Gather <axis = 0> (l, z)
       m = Constant <value_ints = [-1]> ()
       t = Concat <axis = 0> (n, m)
       y = Reshape (r, t)
    """
    model = build("shaped", "float[n, 3, 4, 4] image", "float[n, 48] y", body)
    pieces = profile(model, {"image": np.zeros((1, 3, 4, 4), np.float32)}, runs=1)
    found = judge(pieces, 192, frozenset(place(pieces, ["l", "r"])), Line(up=1.0))
    with pytest.raises(ConvertError, match="The Shape node .* gives 'l', which crosses"):
        part(model, pieces, found)
    head, tail = part(model, pieces, judge(pieces, 192, frozenset(place(pieces, ["r"])), Line(up=1.0)))
    x = np.random.default_rng(0).standard_normal((2, 3, 4, 4)).astype(np.float32)
    (y,) = answers(tail, answers(head, {"image": x})).values()
    np.testing.assert_array_equal(y, np.maximum(x, 0).reshape(2, 48))


def test_lengths_that_the_file_leaves_open_are_asked_for(branched):
    model = ModelProto.FromString(branched)
    for dim in model.graph.input[0].type.tensor_type.shape.dim[2:]:
        dim.dim_param = "open"
    data = model.SerializeToString()
    pieces = profile(data, {"image": images(1)}, runs=1)
    found = judge(pieces, 1, frozenset(place(pieces, ["a"])), Line(up=1.0))
    with pytest.raises(UsageError, match="shapes="):
        part(data, pieces, found)
    head, tail = part(data, pieces, found, {"image": (3, 16, 16)})
    with open_graph(tail, {}, threads=1) as session:
        assert [value.dims[1:] for value in session.inputs.values()] == [(3, 16, 16), (8, 8, 8)]
