"""The factorised prior: what it learns, and that its integer tables cost what it said."""

import numpy as np
import torch

from shoal.converters.split.entropic import FactorisedPrior
from shoal.runtime.split.codec import Codec
from shoal.runtime.split.tables import Tables


def learnt(latent: torch.Tensor, steps: int = 400) -> FactorisedPrior:
    prior = FactorisedPrior(latent.shape[1])
    optimiser = torch.optim.Adam(prior.parameters(), 2e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        loss = prior.bits(prior(latent, generator)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return prior.eval().requires_grad_(False)


def test_it_learns_a_distribution_and_its_tables_cost_as_much():
    torch.manual_seed(0)
    # Deviations 4, 1 and 0.05 around 0, 7.3 and -2; the last channel says nothing
    latent = torch.tensor([4, 1, 0.05]).view(3, 1) * torch.randn(1500, 3, 6) + torch.tensor([0, 7.3, -2]).view(3, 1)
    prior = learnt(latent)
    median = prior.quantile(0.5)
    assert abs(median[0]) < 0.7 and abs(median[1] - 7.3) < 0.3
    assert (prior.quantile(0.9) > median).all()
    rounded = prior(latent)
    steps = rounded - median.view(3, 1)
    torch.testing.assert_close(steps, steps.round(), atol=1e-4, rtol=0)
    said = prior.bits(rounded).sum((0, 2)) / latent[:, 0].numel()
    entropy = [float(-(p * p.log2()).sum()) for channel in steps.transpose(0, 1)
               for p in [channel.round().unique(return_counts=True)[1] / channel.numel()]]  # fmt: skip
    assert (said.numpy() < np.array(entropy) + 0.12).all()

    for tables in (prior.tables(), prior.tables(latent.numpy())):
        codec = Codec(Tables.from_bytes(tables.to_bytes()), (3, 6))
        message = codec.encode(latent.numpy())
        np.testing.assert_allclose(codec.decode(message, most=2000), rounded.numpy(), atol=1e-4)
        assert len(message) * 8 < 1.02 * float(prior.bits(rounded).sum()) + 200


def test_a_wide_latent_is_clipped_to_eight_bits():
    prior = learnt(300 * torch.randn(200, 1, 8), 50)
    tables = prior.tables()
    assert tables.bits == 8
    low, high = tables.quantiser.levels()[0, [0, -1]]
    assert abs((low + high) / 2 - float(prior.quantile(0.5))) < 2


def test_noise_comes_from_the_generator_alone():
    prior, latent = FactorisedPrior(2).train(), torch.zeros(3, 2, 4)
    one, two = (prior(latent, torch.Generator().manual_seed(5)) for _ in range(2))
    assert (one == two).all() and one.abs().max() <= 0.5
