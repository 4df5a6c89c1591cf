"""Choices of an encoder and levels of a latent: what is shared, what each has of its own, what the codec makes."""

import numpy as np
import pytest
import torch
from torch import nn

from shoal.converters.split import bottleneck
from shoal.converters.split.slimmable import Ensemble, Levels, Slim, SlimConv2d, SlimNorm, recalibrate, sandwich
from shoal.runtime.errors import UsageError


@pytest.fixture
def slim() -> Slim:
    torch.manual_seed(0)
    return Slim(bottleneck.encoder("separable", 3, 8, 2, 12), (0.25, 0.5, 1))


def test_each_width_has_its_own_statistics_and_all_have_the_same_weights(slim):
    norm = next(layer for layer in slim.modules() if isinstance(layer, SlimNorm) and layer.weight.shape[0] == 12)
    x = torch.randn(16, 3, 8, 8)
    slim.train()
    slim(x, 2)
    assert (norm.running_mean[1, :6] != 0).all()
    assert (norm.running_mean[[0, 2]] == 0).all() and (norm.running_mean[1, 6:] == 0).all()
    names = {name for name, _ in slim.named_parameters()}
    assert len(names) == len(list(bottleneck.encoder("separable", 3, 8, 2, 12).parameters()))


def test_a_width_computes_what_the_first_channels_alone_do(slim):
    """The narrow encoder is the plain one of the first channels."""
    norms = [layer for layer in slim.modules() if isinstance(layer, SlimNorm)]
    for norm in norms:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    slim.eval()
    x = torch.randn(2, 3, 8, 8)
    plain, channels = [], 3
    for layer in slim.layers:
        if isinstance(layer, SlimConv2d):
            out = channels if layer.groups > 1 else layer.out_channels // 2
            conv = nn.Conv2d(channels, out, layer.kernel_size, layer.stride, layer.padding,
                             groups=out if layer.groups > 1 else 1, bias=layer.bias is not None)  # fmt: skip
            conv.weight.data = layer.weight.data[:out, : conv.weight.shape[1]]
            if layer.bias is not None:
                conv.bias.data = layer.bias.data[:out]
            plain.append(conv)
            channels = out
        elif isinstance(layer, SlimNorm):
            norm = nn.BatchNorm2d(channels)
            norm.weight.data, norm.bias.data = layer.weight.data[:channels], layer.bias.data[:channels]
            norm.running_mean, norm.running_var = layer.running_mean[1, :channels], layer.running_var[1, :channels]
            plain.append(norm)
        else:
            plain.append(layer)
    wanted = nn.Sequential(*plain).eval()(x)
    found = slim(x, 2)
    torch.testing.assert_close(found[:, :4], wanted)
    assert found.shape[1] == 8 and (found[:, 4:] == 0).all()


def test_recalibrated_statistics_are_plain_averages(slim):
    batches = [torch.randn(8, 3, 8, 8) for _ in range(5)]
    slim.train()
    slim(100 * batches[0], 3)  # what is forgotten
    recalibrate(slim, lambda: batches)
    first = slim.layers[1]
    with torch.no_grad():
        seen = torch.stack([slim.layers[0](batch).mean((0, 2, 3)) for batch in batches]).mean(0)
    for width in range(3):
        torch.testing.assert_close(first.running_mean[width], seen)
    assert first.momentum == 0.1 and not first.training

    members = Ensemble(bottleneck.encoder("thin", 3, 4, 2, 4) for _ in range(2))
    recalibrate(members, lambda: batches)
    assert all(int(layer.num_batches_tracked) == 5 for layer in members.modules() if isinstance(layer, nn.BatchNorm2d))


def test_a_sandwich_has_the_least_and_the_most():
    rng = np.random.default_rng(0)
    seen = [sandwich(6, 3, rng) for _ in range(50)]
    assert all(one[0] == 1 and one[-1] == 6 and len(one) == 3 for one in seen)
    assert {one[1] for one in seen} == {2, 3, 4, 5}
    assert sandwich(1, 3, rng) == [1] and sandwich(2, 4, rng) == [1, 2]


def test_an_encoder_that_has_no_widths_is_refused():
    with pytest.raises(UsageError):
        Slim(bottleneck.encoder("entropic", 3, 4, 4), (0.5, 1))
    with pytest.raises(UsageError):
        Slim(bottleneck.encoder("ghnd", 3, 4, 4), (0.5, 0.9))


@pytest.mark.parametrize("bits", range(1, 9))
def test_levels_are_the_codecs(bits):
    torch.manual_seed(1)
    levels = Levels(3, 2).train()
    latent = 3 + torch.tensor([0.1, 1, 20]).view(3, 1, 1) * torch.randn(3000, 3, 4, 4)
    with torch.no_grad():
        levels(latent, bits, 1)
    levels.eval()
    sent = levels(latent, bits, 1)
    quantiser = levels.quantiser(bits, 1)
    received = quantiser.dequantise(quantiser.quantise(latent.numpy()))
    np.testing.assert_allclose(received, sent.numpy(), rtol=1e-5, atol=1e-4)
    assert (levels.mean[1] == 0).all()  # the other choice's
    # As near as the best uniform quantiser of a normal variable is said to come (Max 1960), in variances
    error = ((sent - latent) ** 2).mean((0, 2, 3)) / torch.tensor([0.1, 1, 20]) ** 2
    best = (0.3634, 0.1188, 0.03744, 0.01154, 0.003495, 0.00104, 0.000304, 0.000088)[bits - 1]
    np.testing.assert_allclose(error.numpy(), best, rtol=0.15)


def test_gradients_pass_a_quantiser_as_they_came():
    latent = torch.randn(4, 2, 3, requires_grad=True)
    weight = torch.randn(4, 2, 3)
    (Levels(2).eval()(latent, 2) * weight).sum().backward()
    assert (latent.grad == weight).all()
