"""A learned distribution of each channel of a latent: training can weigh the bytes of a message against its errors.

The factorised prior of Ballé et al. (2018) as the entropic student has it (Matsubara et al. 2022): a monotone network
of one number for each channel gives the logits of a cumulative distribution. Training adds uniform noise in place of
rounding; afterwards the prior becomes the runtime's integer tables, with steps of 1, so that no float decides how bytes
are read. It knows nothing about networks or losses.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from shoal.runtime.split.quantise import MAX_BITS, Quantiser
from shoal.runtime.split.tables import Tables, frequencies

LEAST = 1e-9  # a probability; what is rarer costs as much
_TAIL = 1e-6  # what may lie beyond a table's first or last level, and is clipped to it
_COUNT = 1 << 40  # of which frequencies are parts


class FactorisedPrior(nn.Module):
    """Over latents fp32 [n, channels, ...]. `filters` are the widths of the hidden layers."""

    def __init__(self, channels: int, filters: tuple[int, ...] = (3, 3, 3, 3), spread: float = 10.0):
        super().__init__()
        wide = (1, *filters, 1)
        scale = spread ** (1 / (len(filters) + 1))
        self.matrices, self.biases, self.gates = nn.ParameterList(), nn.ParameterList(), nn.ParameterList()
        generator = torch.Generator().manual_seed(0)
        for inner, out in zip(wide, wide[1:], strict=False):
            self.matrices.append(torch.full((channels, out, inner), float(np.log(np.expm1(1 / scale / out)))))
            self.biases.append(torch.rand((channels, out, 1), generator=generator) - 0.5)
        for out in filters:
            self.gates.append(torch.zeros(channels, out, 1))

    def logits(self, values: torch.Tensor) -> torch.Tensor:
        """Of the cumulative distribution at values [channels, any]; rises with them."""
        found = values.unsqueeze(1)
        for at, (matrix, bias) in enumerate(zip(self.matrices, self.biases, strict=True)):
            found = torch.baddbmm(bias, F.softplus(matrix), found)
            if at < len(self.gates):
                found = found + torch.tanh(self.gates[at]) * torch.tanh(found)
        return found.squeeze(1)

    def bits(self, latent: torch.Tensor) -> torch.Tensor:
        """What latents fp32 [n, channels, ...] cost, -log2 of the probability of an interval of 1 around each number,
        fp32 of their shape."""
        flat = latent.transpose(0, 1).flatten(1).float()
        lower, upper = self.logits(flat - 0.5), self.logits(flat + 0.5)
        sign = torch.where(lower + upper > 0, -1.0, 1.0)  # to where sigmoids are far from saturated
        likelihood = (torch.sigmoid(sign * upper) - torch.sigmoid(sign * lower)).abs()
        cost = -likelihood.clamp(min=LEAST).log2()
        shape = latent.transpose(0, 1).shape
        return cost.view(shape).transpose(0, 1)

    @torch.no_grad()
    def quantile(self, part: float) -> torch.Tensor:
        """Where each channel's cumulative distribution is `part`, fp32 [channels]; by bisection, which needs no loss
        of its own."""
        wanted = float(np.log(part) - np.log1p(-part))
        count = self.matrices[0].shape[0]
        low, high = torch.full((count, 1), -1.0), torch.full((count, 1), 1.0)
        for _ in range(40):  # far enough for any window that could be used
            low = torch.where(self.logits(low) > wanted, low * 2, low)
            high = torch.where(self.logits(high) < wanted, high * 2, high)
        for _ in range(60):
            middle = (low + high) / 2
            above = self.logits(middle) > wanted
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        return ((low + high) / 2).squeeze(1)

    def forward(self, latent: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """The latent with uniform noise of one step, learning; else each number at the nearest of the steps of 1
        around its channel's median."""
        if self.training:
            return latent + torch.rand(latent.shape, generator=generator) - 0.5
        median = self.quantile(0.5).view(-1, *(1,) * (latent.dim() - 2))
        return (latent - median).round() + median

    @torch.no_grad()
    def tables(self, latents: np.ndarray | None = None) -> Tables:
        """The runtime's tables: steps of 1 through each channel's median, as few bits as hold every channel's window
        and at most 8; beyond it latents are clipped. Frequencies are the prior's or, given latents fp32 [n, channels,
        ...] to learn from, those counted and the prior's as one count more of each level's share."""
        median = self.quantile(0.5).double()
        below = (median - self.quantile(_TAIL)).ceil().clamp(min=0)
        above = (self.quantile(1 - _TAIL) - median).ceil().clamp(min=0)
        bits = int(np.clip(np.ceil(np.log2(float((below + above).max()) + 1)), 1, MAX_BITS))
        below = below.clamp(max=2 ** (bits - 1))
        offsets = (median - below).float()
        grid = offsets[:, None] + torch.arange(2**bits)
        parts = (torch.sigmoid(self.logits(grid + 0.5)) - torch.sigmoid(self.logits(grid - 0.5))).double()
        parts[:, 0], parts[:, -1] = torch.sigmoid(self.logits(grid[:, :1] + 0.5))[:, 0], torch.sigmoid(
            -self.logits(grid[:, -1:] - 0.5))[:, 0]  # fmt: skip
        parts = parts.clamp(min=0) / parts.clamp(min=0).sum(1, keepdim=True)
        quantiser = Quantiser(bits, np.ones(len(offsets), np.float32), offsets.numpy())
        counts = parts.numpy()
        if latents is not None:
            symbols = quantiser.quantise(latents).swapaxes(0, 1).reshape(len(counts), -1)
            counts = counts + np.stack([np.bincount(row, minlength=2**bits) for row in symbols])
        rows = [frequencies((row / row.sum() * _COUNT).astype(np.int64)) for row in counts]
        return Tables(quantiser, np.arange(len(rows)), np.stack(rows))
