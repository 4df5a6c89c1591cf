"""Encoders and decoders that are put into a network where it is cut, as plain torch modules of any channels.

An encoder takes what its stem gives (an image, or the feature of the first layers) to a latent with fewer numbers, a
decoder takes the latent to the feature that the rest of the network was trained on. The papers' layers are here, with
as many of them strided as the cut needs, and light ones: an entropic student's encoder is small in parameters but not
in work. They know nothing about quantising, losses or files.
"""

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from shoal.runtime.errors import UsageError

ENCODERS = ("ghnd", "bottlefit", "entropic", "separable", "thin", "linear")
DECODERS = ("ghnd", "bottlefit", "entropic", "light")


class Gdn1(nn.Module):
    """x_i / (beta_i + sum_j gamma_ij |x_j|) over channels, `inverse` multiplies (Ballé et al. 2016; of order 1 as in
    Johnston et al. 2019). Both are squares of what is learned, so they stay above 0."""

    def __init__(self, channels: int, inverse: bool = False):
        super().__init__()
        self.inverse = inverse
        self.beta_root = nn.Parameter(torch.ones(channels))
        self.gamma_root = nn.Parameter((0.1 * torch.eye(channels)).sqrt())

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """beta fp32 [channels], gamma fp32 [channels, channels]."""
        return self.beta_root**2 + 1e-6, self.gamma_root**2

    def forward(self, x):
        beta, gamma = self.factors()
        norm = F.conv2d(x.abs(), gamma[:, :, None, None], beta)
        return x * norm if self.inverse else x / norm


class Residual(nn.Sequential):
    """x + layers(x)."""

    def forward(self, x):
        return x + super().forward(x)


class Crop(nn.Module):
    """The upper left [height, width] of a map that is as large or larger."""

    def __init__(self, height: int, width: int):
        super().__init__()
        self.height, self.width = height, width

    def forward(self, x):
        return x[:, :, : self.height, : self.width]


def encoder(kind: str, channels: int, latent: int, stride: int, width: int = 0) -> nn.Sequential:
    """fp32 [n, channels, h, w] to latent fp32 [n, latent, about h / stride, about w / stride], signed and without an
    activation. Raises UsageError unless `kind` is one of ENCODERS and `stride` a power of two that it can have.

    ghnd (Matsubara and Levorato 2020) is four 2x2 convolutions, bottlefit (Matsubara et al. 2022) 7x7, pooling and 2x2,
    entropic (Matsubara et al. 2022) 5x5 with GDN. separable is depthwise 3x3 and pointwise, thin an inverted bottleneck
    of few channels (the members of Assine et al. 2023), linear a projection of patches, for a cut up to which the
    device runs the network's own layers. `width` is their channels, 0 the papers' or 32 / 8."""
    halvings = stride.bit_length() - 1
    if kind not in ENCODERS or channels < 1 or latent < 1:
        raise _refuse(f"{kind!r} from {channels} to {latent} channels", f"Kinds are {', '.join(ENCODERS)}.")
    if stride < 1 or stride != 1 << halvings or (kind == "ghnd" and halvings > 4):
        raise _refuse(f"{kind!r} with a stride of {stride}", "It is a power of two; of ghnd at most 16.")
    return nn.Sequential(*globals()[f"_{kind}"](channels, latent, halvings, width))


def _ghnd(channels: int, latent: int, halvings: int, width: int) -> list[nn.Module]:
    wide = [channels, width or channels, 4 * (width or channels), width or channels, latent]
    layers: list[nn.Module] = []
    for at in range(4):
        strided = at < halvings
        layers.append(nn.Conv2d(wide[at], wide[at + 1], 2, 2 if strided else 1, 0 if strided else 1, bias=False))
        layers += [nn.BatchNorm2d(wide[at + 1])] if at < 3 else []
        layers += [nn.ReLU()] if at == 1 else []
    return layers


def _bottlefit(channels: int, latent: int, halvings: int, width: int) -> list[nn.Module]:
    width = width or 64
    layers: list[nn.Module] = [
        nn.Conv2d(channels, width, 7, 2 if halvings else 1, 3, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    ]
    if halvings > 1:
        layers += [nn.MaxPool2d(3, 2, 1), nn.BatchNorm2d(width), nn.ReLU()]
    for _ in range(halvings - 3):
        layers += [nn.Conv2d(width, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    strided = halvings > 2
    return [*layers, nn.Conv2d(width, latent, 2, 2 if strided else 1, 0 if strided else 1, bias=False)]


def _entropic(channels: int, latent: int, halvings: int, width: int) -> list[nn.Module]:
    width = width or 96
    layers: list[nn.Module] = []
    inner = channels
    for at in range(max(halvings, 2)):
        out = width if at == 0 else width // 2
        layers += [nn.Conv2d(inner, out, 5, 2 if at < halvings else 1, 2, bias=False), Gdn1(out)]
        inner = out
    return [*layers, nn.Conv2d(inner, latent, 2, bias=False)]


def _separable(channels: int, latent: int, halvings: int, width: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    inner = channels
    for at in range(max(halvings, 1)):
        out = (width or 32) << min(at, 2)
        layers += [nn.Conv2d(inner, inner, 3, 2 if at < halvings else 1, 1, groups=inner, bias=False)]
        layers += [nn.BatchNorm2d(inner), nn.Conv2d(inner, out, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU6()]
        inner = out
    return [*layers, nn.Conv2d(inner, latent, 1)]


def _thin(channels: int, latent: int, halvings: int, width: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    width, inner = width or 8, channels
    for at in range(max(halvings, 1)):
        layers += _inverted(inner, width, 2 if at < halvings else 1)
        inner = width
    return [*layers, Residual(*_inverted(width, width, 1)), nn.Conv2d(width, latent, 1)]


def _linear(channels: int, latent: int, halvings: int, width: int) -> list[nn.Module]:
    return [nn.Conv2d(channels, latent, 1 << halvings, 1 << halvings)]


def _inverted(channels: int, out: int, stride: int) -> list[nn.Module]:
    inner = 6 * min(channels, out)
    return [
        nn.Conv2d(channels, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU6(),
        nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False), nn.BatchNorm2d(inner), nn.ReLU6(),
        nn.Conv2d(inner, out, 1, bias=False), nn.BatchNorm2d(out),
    ]  # fmt: skip


def decoder(
    kind: str, latent: Sequence[int], feature: Sequence[int], *, width: int = 0, nonnegative: bool = False
) -> nn.Sequential:
    """fp32 [n, *latent] to fp32 [n, *feature], both (channels, height, width): a latent of other sides is pooled or
    repeated first, and cropped last. `nonnegative` ends it with a ReLU, for a cut behind one. Raises UsageError.

    light has no statistics over the batch: it serves modes whose latents are distributed differently, row by row.
    """
    if kind not in DECODERS or len(latent) != 3 or len(feature) != 3 or min(*latent, *feature) < 1:
        raise _refuse(f"{kind!r} from {list(latent)} to {list(feature)}", f"Kinds are {', '.join(DECODERS)}.")
    channels, size = latent[0], list(latent[1:])
    layers: list[nn.Module] = []
    target = list(feature[1:])
    if any(2 * size[axis] <= target[axis] for axis in (0, 1)):
        factor = max(math.ceil(target[axis] / size[axis]) for axis in (0, 1))
        layers.append(nn.Upsample(scale_factor=factor))
        size = [side * factor for side in size]
    elif all(size[axis] >= 2 * target[axis] for axis in (0, 1)):
        factor = min(size[axis] // target[axis] for axis in (0, 1))
        layers.append(nn.AvgPool2d(factor))
        size = [side // factor for side in size]

    def conv(
        inner: int, out: int, bias: bool = False
    ) -> nn.Conv2d:  # 2x2: a map grows or shrinks by one, to the target
        padding = int(size[0] <= target[0]), int(size[1] <= target[1])
        for axis in (0, 1):
            size[axis] += 1 if padding[axis] else -1
        return nn.Conv2d(inner, out, 2, padding=padding, bias=bias)

    out = feature[0]
    if kind == "ghnd":
        layers += [nn.BatchNorm2d(channels), nn.ReLU()]
        wide = [channels, max(out // 4, 1), max(out // 2, 1), out, out]
        for at in range(4):
            layers += [conv(wide[at], wide[at + 1]), nn.BatchNorm2d(wide[at + 1])] + [nn.ReLU()] * (at == 1)
    elif kind == "bottlefit":
        for at in range(4):
            layers += [nn.BatchNorm2d(channels if at == 0 else out), nn.ReLU()]
            layers += [conv(channels if at == 0 else out, out, bias=at == 3)]
        if min(size[axis] - target[axis] for axis in (0, 1)) > 0:
            layers.append(nn.AvgPool2d(2, 1))
            size = [side - 1 for side in size]
    elif kind == "entropic":
        width = width or 2 * out
        layers += [conv(channels, width), Gdn1(width, inverse=True), conv(width, width // 2)]
        layers += [Gdn1(width // 2, inverse=True), conv(width // 2, out, bias=True)]
    else:
        width = width or max(out, 64)
        layers += [nn.Conv2d(channels, width, 3, 1, 1), nn.GroupNorm(1, width), nn.ReLU()]
        layers += [Residual(nn.Conv2d(width, width, 3, 1, 1), nn.GroupNorm(1, width), nn.ReLU())]
        layers += [nn.Conv2d(width, out, 1)]
    if size != target:
        short = [max(target[axis] - size[axis], 0) for axis in (0, 1)]
        layers += [nn.ReplicationPad2d((0, short[1], 0, short[0]))] if any(short) else []
        layers.append(Crop(target[0], target[1]))
    return nn.Sequential(*layers, *[nn.ReLU()] * nonnegative)


def _refuse(what: str, why: str) -> UsageError:
    return UsageError(f"There is no bottleneck {what}.", why, "Correct the recipe's split.")
