"""Encoders and decoders in ONNX Runtime: what torch gave, every choice in one graph with one set of weights."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from shoal.converters.sources import torch_module
from shoal.converters.split import bottleneck, export
from shoal.converters.split.slimmable import Ensemble, Slim, SlimNorm
from shoal.runtime.errors import ConvertError, UsageError
from shoal.runtime.session import open_graph

IMAGE = (3, 64, 48)


def settled(module: nn.Module) -> nn.Module:
    """With statistics as if it had learnt."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d | SlimNorm):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    return module.eval().requires_grad_(False)


def assert_same(graph: bytes, feeds: dict[str, np.ndarray], wanted: torch.Tensor) -> None:
    with open_graph(graph, {}, threads=1) as session:
        (found,) = session.run(feeds).values()
    np.testing.assert_allclose(found, wanted.numpy(), rtol=0, atol=4e-6 * float(wanted.abs().max()))


@pytest.fixture
def image() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(2, *IMAGE)


@pytest.fixture
def stem() -> nn.Module:
    torch.manual_seed(1)
    return settled(nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU6()))


@pytest.mark.parametrize("kind", bottleneck.ENCODERS)
@pytest.mark.parametrize("stride", [1, 8])
def test_every_bottleneck_fits_any_cut_and_is_what_it_was(kind, stride, image):
    encoder = settled(bottleneck.encoder(kind, 3, 5, stride))
    latent = encoder(image)
    shape = tuple(latent.shape[1:])
    assert shape[0] == 5 and all(
        abs(side - whole / stride) <= 4 for side, whole in zip(shape[1:], IMAGE[1:], strict=True)
    )
    assert_same(export.head(encoder, IMAGE, shape), {"image": image.numpy()}, latent)
    for decoding in bottleneck.DECODERS:
        decoder = settled(bottleneck.decoder(decoding, shape, (16, 8, 7)))
        graph = export.network(decoder, {"latent": shape}, "feature", (16, 8, 7))
        assert_same(graph, {"latent": latent.numpy()}, decoder(latent))


def test_the_papers_sizes():
    latent = bottleneck.encoder("ghnd", 64, 3, 1)(torch.zeros(1, 64, 56, 56)).shape
    assert latent == (1, 3, 60, 60)  # each padded 2x2 convolution grows a map by one
    assert bottleneck.encoder("bottlefit", 3, 12, 8)(torch.zeros(1, 3, 224, 224)).shape[1:] == (12, 28, 28)
    entropic = bottleneck.encoder("entropic", 3, 24, 4)
    assert entropic(torch.zeros(1, 3, 224, 224)).shape[1:] == (24, 55, 55)
    assert 130_000 < sum(weight.numel() for weight in entropic.parameters()) < 145_000
    light = bottleneck.encoder("separable", 3, 24, 4)
    assert sum(weight.numel() for weight in light.parameters()) < 5_000
    with pytest.raises(UsageError):
        bottleneck.encoder("ghnd", 3, 4, 3)


def test_members_add_up_as_in_torch(image, stem):
    torch.manual_seed(2)
    encoder = settled(Ensemble(bottleneck.encoder("thin", 8, 5, 4, 4) for _ in range(4)))
    assert [encoder.scale(member) for member in (1, 2, 3, 4)] == [1, 1, 0.5, 0.25]
    feature = stem(image)
    graph = export.head(encoder, IMAGE, (5, 8, 6), stem=stem)
    onnx.checker.check_model(onnx.load_from_string(graph), full_check=True)
    parts = [member(feature) for member in encoder.members]
    for choice in range(1, 5):
        wanted = sum(encoder.scale(at + 1) * part for at, part in enumerate(parts[:choice]))
        assert_same(graph, {"image": image.numpy(), "encoder": np.array(choice)}, wanted)
    assert_same(graph, {"image": image.numpy(), "encoder": np.array(9)}, encoder(feature, 4))
    assert_same(graph, {"image": image.numpy(), "encoder": np.array(-1)}, encoder(feature, 1))


def test_switching_allocates_nothing_that_stays(stem):
    torch.manual_seed(2)
    encoder = settled(Ensemble(bottleneck.encoder("thin", 8, 5, 4, 4) for _ in range(4)))
    image = np.zeros((1, *IMAGE), np.float32)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    with open_graph(export.head(encoder, IMAGE, (5, 8, 6), stem=stem), {}, threads=1) as session:
        for choice in (1, 2, 3, 4) * 10:
            session.run({"image": image, "encoder": np.array(choice)})
        before = resident()
        for choice in (4, 1, 3, 2) * 100:
            session.run({"image": image, "encoder": np.array(choice)})
        assert resident() - before < 1 << 20


@pytest.mark.parametrize("kind", ["separable", "ghnd"])
def test_widths_share_one_set_of_weights(kind, image, stem):
    torch.manual_seed(3)
    plain = bottleneck.encoder(kind, 8, 6, 4)
    encoder = settled(Slim(plain, (0.25, 0.5, 1)))
    feature = stem(image)
    shape = tuple(encoder(feature).shape[1:])
    graph = export.head(encoder, IMAGE, shape, stem=stem)
    for choice, kept in ((1, 2), (2, 3), (3, 6)):
        latent = encoder(feature, choice)
        assert (latent[:, kept:] == 0).all() and latent[:, :kept].abs().sum() > 0
        assert_same(graph, {"image": image.numpy(), "encoder": np.array(choice)}, latent)
    weights = onnx.load_from_string(graph).graph.initializer
    large = [weight for weight in weights if np.prod(weight.dims) > 100]
    assert len(large) == len({weight.name.rsplit(".", 1)[0] for weight in large})


def test_what_cannot_be_written_is_named():
    with pytest.raises(ConvertError, match="LSTM"):
        export.network(nn.Sequential(nn.LSTM(3, 3)), {"x": (3,)}, "y", (3,))
    with pytest.raises(ConvertError, match="sin"):

        class Odd(nn.Module):
            def forward(self, x):
                return torch.sin(x)

        export.network(Odd(), {"x": (3,)}, "y", (3,))


@pytest.mark.parametrize("choices", [1, 3])
def test_networks_of_the_teacher_stand_before_and_after(choices, image, stem):
    """A stem that was traced, or that came as ONNX, and a tail behind a decoder."""
    torch.manual_seed(4)
    members = [bottleneck.encoder("separable", 8, 5, 2, 8) for _ in range(choices)]
    encoder = settled(Ensemble(members) if choices > 1 else members[0])
    decoder = settled(bottleneck.decoder("light", (5, 16, 12), (8, 16, 12)))
    tail = settled(nn.Sequential(nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(1), nn.Linear(6 * 14 * 10, 4)))
    stem_network, tail_network = (
        torch_module.network(stem, image),
        torch_module.network(tail, decoder(encoder(stem(image)))),
    )
    graph = export.head(encoder, IMAGE, (5, 16, 12), stem=stem_network)
    feeds = {"image": image.numpy(), **({"encoder": np.array(3)} if choices > 1 else {})}
    latent = encoder(stem(image))
    assert_same(graph, feeds, latent)
    graph = export.network([decoder, tail_network], {"latent": (5, 16, 12)}, "logits", (4,))
    assert_same(graph, {"latent": latent.numpy()}, tail(decoder(latent)))
