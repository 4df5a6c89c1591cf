"""Encoders with a knob for their work, and bits of a latent as a knob for the message: one set of weights.

`Ensemble` (Assine et al. 2023) sums members, y = f_1 + s_2 f_2 + ...: one more comes nearer to the same latent. `Slim`
(Yu and Huang 2019; Assine et al. 2022) computes the first channels of each layer, with statistics of its own for each
width and weights that all widths share; dropped channels of the latent are zeros. Both are called with a choice from 1
and give latents of one shape. `Levels` quantises to any of 1 to 8 bits and lets gradients through. Nothing here knows
what follows the latent.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from shoal.runtime.errors import UsageError
from shoal.runtime.split.quantise import Quantiser

# Steps, in deviations, of the uniform quantiser with the least squared error for a normal variable, by bits (Max 1960)
STEPS = (0.0, 1.5956, 0.9957, 0.5860, 0.3352, 0.1881, 0.1041, 0.0568, 0.0308)


class Levels(nn.Module):
    """A latent's uniform levels at any number of bits, from each channel's running mean and deviation, for each of an
    encoder's `choices`: the channels that a narrow one drops are wide ones' all the same."""

    mean: torch.Tensor
    deviation: torch.Tensor
    seen: torch.Tensor

    def __init__(self, channels: int, choices: int = 1, momentum: float = 0.05):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(choices, channels))
        self.register_buffer("deviation", torch.ones(choices, channels))
        self.register_buffer("seen", torch.zeros(choices, dtype=torch.int64))

    def _range(self, bits: int, at: int) -> tuple[torch.Tensor, torch.Tensor]:
        scale = (self.deviation[at] * STEPS[bits]).clamp(min=1e-6).maximum(self.mean[at].abs() * 1e-5)
        return scale, self.mean[at] - scale * ((2**bits - 1) / 2)

    def forward(self, latent, bits: int, choice: int = 0):
        """fp32 [n, channels, ...] as the nearest of 2^bits levels; its gradient is the latent's own (straight-through).
        Learning, it follows the statistics of the latents of this choice (from 1; 0: the last)."""
        at = choice - 1
        if self.training:
            with torch.no_grad():
                flat = latent.detach().float().transpose(0, 1).flatten(1)
                self.seen[at] += 1
                part = max(self.momentum, 1 / int(self.seen[at]))
                self.mean[at] += part * (flat.mean(1) - self.mean[at])
                self.deviation[at] += part * (flat.std(1, correction=0) - self.deviation[at])
        scale, offset = (value.view(-1, *(1,) * (latent.dim() - 2)) for value in self._range(bits, at))
        steps = ((latent - offset) / scale).round().clamp(0, 2**bits - 1)
        return latent + (steps * scale + offset - latent).detach()

    def settle(self, latents: np.ndarray, choice: int = 0) -> None:
        """Takes the statistics from latents fp32 [n, channels, ...] of an encoder that learns no more."""
        flat = torch.from_numpy(latents).transpose(0, 1).flatten(1)
        self.mean[choice - 1], self.deviation[choice - 1] = flat.mean(1), flat.std(1, correction=0)

    def quantiser(self, bits: int, choice: int = 0) -> Quantiser:
        """The same levels for the runtime's codec."""
        scale, offset = self._range(bits, choice - 1)
        return Quantiser(bits, scale.numpy(), offset.numpy())


class Ensemble(nn.Module):
    """N encoders of one shape. The first is whole, the others are scaled by a falling geometric series."""

    def __init__(self, members: Iterable[nn.Module], factor: float = 0.5):
        super().__init__()
        self.members, self.factor = nn.ModuleList(members), factor
        self.choices = len(self.members)

    def scale(self, member: int) -> float:
        """Of member 1, 2, ...: 1, 1, factor, factor^2, ..."""
        return 1.0 if member < 2 else self.factor ** (member - 2)

    def forward(self, x, choice: int = 0):
        """The latent of the first `choice` members; of all where it is 0."""
        y = self.members[0](x)
        for member in range(2, (choice or self.choices) + 1):
            y = y + self.scale(member) * self.members[member - 1](x)
        return y


class SlimConv2d(nn.Conv2d):
    """A convolution of which the first channels are used: all inputs that come, and a part of the outputs."""

    part = 1.0

    def forward(self, x):
        inputs, outputs = x.shape[1], first(self.out_channels, self.part)
        weight = self.weight[:outputs] if self.groups > 1 else self.weight[:outputs, :inputs]
        bias = None if self.bias is None else self.bias[:outputs]
        groups = outputs if self.groups > 1 else 1
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, groups)


class SlimNorm(nn.Module):
    """Batch normalisation with running statistics of its own for each width, and one weight and bias."""

    width = 0
    running_mean: torch.Tensor
    running_var: torch.Tensor
    batches: torch.Tensor

    def __init__(self, channels: int, widths: int, eps: float = 1e-5, momentum: float | None = 0.1):
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(widths, channels))
        self.register_buffer("running_var", torch.ones(widths, channels))
        self.register_buffer("batches", torch.zeros(widths, dtype=torch.int64))

    def forward(self, x):
        count, at = x.shape[1], self.width
        mean, var = self.running_mean[at, :count], self.running_var[at, :count]
        part = self.momentum
        if self.training:
            self.batches[at] += 1
            part = 1 / int(self.batches[at]) if part is None else part
        return F.batch_norm(x, mean, var, self.weight[:count], self.bias[:count], self.training, part or 0.0, self.eps)


class Slim(nn.Module):
    """An encoder that is a sequence of convolutions (plain or depthwise), norms and activations, at several widths.

    `widths` are parts of the channels, rising, the last 1. The latent has zeros where channels were dropped.
    """

    def __init__(self, encoder: nn.Sequential, widths: Sequence[float]):
        super().__init__()
        if not widths or list(widths) != sorted(set(widths)) or not 0 < widths[0] or widths[-1] != 1:
            raise UsageError(
                f"An encoder cannot have the widths {list(widths)}.", "They rise, up to 1.", "Correct them."
            )
        self.widths, self.choices = tuple(widths), len(widths)
        self.layers = nn.Sequential(*(self._slim(layer) for layer in encoder))
        self.latent = next(layer.out_channels for layer in reversed(self.layers) if isinstance(layer, SlimConv2d))

    def _slim(self, layer: nn.Module) -> nn.Module:
        if isinstance(layer, nn.BatchNorm2d):
            return SlimNorm(layer.num_features, self.choices, layer.eps, layer.momentum)
        if isinstance(layer, nn.Conv2d) and layer.groups in (1, layer.in_channels):
            alike = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "groups")
            sizes: dict[str, Any] = {key: getattr(layer, key) for key in alike}
            slim = SlimConv2d(**sizes, bias=layer.bias is not None)
            slim.load_state_dict(layer.state_dict())
            return slim
        if isinstance(layer, nn.ReLU | nn.ReLU6 | nn.MaxPool2d):
            return layer
        why = f"A {type(layer).__name__} cannot be used in part."
        raise UsageError("This encoder has no widths.", why, "Choose separable, ghnd or bottlefit.")

    def forward(self, x, choice: int = 0):
        """The latent at width `choice` (from 1), of all channels where it is 0."""
        at = (choice or self.choices) - 1
        for layer in self.layers:
            if isinstance(layer, SlimNorm):
                layer.width = at
            elif isinstance(layer, SlimConv2d):
                # A depthwise layer on what comes in has as many outputs as that
                layer.part = x.shape[1] / layer.out_channels if layer.groups > 1 else self.widths[at]
            x = layer(x)
        return F.pad(x, (0, 0, 0, 0, 0, self.latent - x.shape[1]))


def first(channels: int, part: float) -> int:
    """How many channels are a part of them, at least one."""
    return max(1, math.ceil(channels * part - 1e-9))


def sandwich(choices: int, copies: int, rng: np.random.Generator) -> list[int]:
    """The choices of a step, from 1: the least, the most, and others at random up to `copies` (Yu and Huang 2019)."""
    inner = list(range(2, choices))
    chosen = rng.permutation(inner)[: max(copies - 2, 0)].tolist() if inner else []
    return sorted({1, choices, *(int(choice) for choice in chosen)})


@torch.no_grad()
def recalibrate(encoder: nn.Module, batches: Callable[[], Iterable[torch.Tensor]]) -> None:
    """Sets the running statistics of every choice of `encoder` to plain averages over `batches` (an epoch each call):
    what is averaged while weights move is of weights that are gone. Ends in eval."""
    norms = [module for module in encoder.modules() if isinstance(module, SlimNorm | nn.BatchNorm2d)]
    before = [norm.momentum for norm in norms]
    encoder.eval()
    for norm in norms:
        norm.momentum = None
        if isinstance(norm, SlimNorm):
            norm.batches.zero_()
        else:
            norm.reset_running_stats()
        norm.train()
    # Of an ensemble the statistics do not depend on the choice: all members see the same
    for choice in range(1, encoder.choices + 1) if isinstance(encoder, Slim) else (0,):
        for batch in batches():
            encoder(batch, choice) if choice or hasattr(encoder, "choices") else encoder(batch)
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum
    encoder.eval()
