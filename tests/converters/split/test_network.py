"""A graph as a torch module: what is trained, what halves share, what goes back to ONNX."""

import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'shoal[train]'")

from shoal.converters.sources.onnx import graph, network  # noqa: E402
from shoal.converters.split.network import export, split  # noqa: E402
from shoal.runtime.errors import ConvertError, UsageError  # noqa: E402
from shoal.runtime.session import open_graph  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "data"))
import make_split  # noqa: E402

NORMED = """c = Conv <pads = [1, 1, 1, 1]> (x, w) n = BatchNormalization (c, s, b, m, v)
            t = Transpose <perm = [1, 0]> (k) g = GlobalAveragePool (n) f = Flatten (g) p = MatMul (f, t)
            h = Mul (p, share) q = Dropout (h) y = Add (q, bias)"""


@pytest.fixture
def normed():
    rng = np.random.default_rng(0)
    shapes = {"w": (4, 3, 3, 3), "s": (4,), "b": (4,), "m": (4,), "v": (4,), "k": (2, 4), "share": (), "bias": (2,)}
    weights = {name: np.asarray(rng.random(shape), np.float32) for name, shape in shapes.items()}
    return make_split.build("g", "float[n, 3, 8, 8] x", "float[n, 2] y", NORMED, weights, tuple(weights))


def test_weights_are_parameters_and_what_is_measured_is_not(normed):
    made = network(normed)
    assert {name for name, _ in made.named_parameters()} == {"w", "s", "b", "k", "bias"}
    assert {name for name, _ in made.named_buffers()} == {"m", "v", "share"}
    made(torch.rand(2, 3, 8, 8)).sum().backward()
    assert all(weight.grad is not None for weight in made.parameters())


def test_training_moves_running_means_and_evaluation_does_not(normed):
    made, x = network(normed), torch.rand(4, 3, 8, 8)
    before = made.m.clone()
    made.eval()(x)
    assert torch.equal(made.m, before)
    made.train()(x)
    expected = 0.9 * before + 0.1 * made.features(["c"], x)["c"].mean((0, 2, 3))
    torch.testing.assert_close(made.m, expected)


def test_halves_are_trained_with_the_whole(normed):
    whole = network(normed).eval()
    head, tail = split(whole, "n")
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(tail(head(x)), whole(x))
    assert {name for name, _ in head.named_parameters()} == {"w", "s", "b"}
    before = whole(x)
    with torch.no_grad():
        head.w += 1
        tail.bias += 1
    assert torch.equal(tail(head(x)), whole(x)) and not torch.equal(whole(x), before)


def test_what_was_trained_is_what_is_exported(normed):
    whole, x = network(normed), torch.rand(5, 3, 8, 8)
    for _ in range(3):  # in training, so that the running means count as well
        loss = whole(x).square().sum()
        loss.backward()
        with torch.no_grad():
            for weight in whole.parameters():
                weight -= 0.01 * weight.grad
    data = export(whole.eval(), x[:1], inputs=["image"], outputs=["c"])  # a name that a value inside has
    assert "BatchNormalization" not in [node.op for node in graph(data).nodes]
    with open_graph(data, {}) as session, torch.no_grad():
        assert session.inputs["image"].dims == ("n", 3, 8, 8)
        np.testing.assert_allclose(session.run({"image": x.numpy()})["c"], whole(x), atol=1e-5)
    open_ = export(whole, x[:1], dims={"x": (None, 3, None, "width")})
    with open_graph(open_, {}) as session, torch.no_grad():
        wide = torch.rand(2, 3, 9, 5)
        np.testing.assert_allclose(session.run({"x": wide.numpy()})["y"], whole(wide), atol=1e-5)


def test_only_what_a_feature_needs_is_computed(normed):
    made, x = network(normed), torch.rand(1, 3, 8, 8)
    found = made.features(["c", "n"], x)
    assert list(found) == ["c", "n"] and found["n"].shape == (1, 4, 8, 8)
    with pytest.raises(ConvertError, match="no value 'nn'(.|\n)*'n'"):
        made.features(["nn"], x)
    with pytest.raises(UsageError, match="takes x"):
        made(x, x)
    with pytest.raises(ConvertError, match=r"Conv node(.|\n)*\(1, 4, 8, 8\)"):
        made(torch.rand(1, 4, 8, 8))


def test_a_few_bytes_cannot_ask_for_gigabytes():
    body = "s = Constant <value_ints = [99999, 99999, 9]> () c = ConstantOfShape (s) r = ReduceMax (c) y = Add (x, r)"
    made = network(make_split.build("g", "float[n, 2] x", "float[n, 2] y", body))
    with pytest.raises(ConvertError, match="asks for 89998200009 numbers"):
        made(torch.zeros(1, 2))
