"""Torch modules as networks: the same numbers in torch and in ONNX Runtime, parts by their path, refusals."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'shoal[train]'")

from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from shoal.converters.sources.torch_module import cuts, network  # noqa: E402
from shoal.converters.split import graph as graphs  # noqa: E402
from shoal.converters.split.network import export, split  # noqa: E402
from shoal.runtime.errors import ConvertError  # noqa: E402
from shoal.runtime.session import open_graph  # noqa: E402


def same(module, x, tolerance=1e-4):
    """Asserts that the traced module gives what `module` does, in torch and in ONNX Runtime; the network."""
    module.eval()
    made = network(module, x[:1]).eval()
    with torch.no_grad():
        expected, found = module(x), made(x)
    expected, found = ([one] if isinstance(one, torch.Tensor) else list(one) for one in (expected, found))
    with open_graph(export(module, x[:1]), {}, threads=1) as session:
        ran = session.run({next(iter(session.inputs)): x.numpy()})
    for one, other, name in zip(expected, found, made.graph.outputs, strict=True):
        scale = float(one.abs().max())
        np.testing.assert_allclose(other, one, atol=tolerance * scale, rtol=0)
        np.testing.assert_allclose(ran[name], one, atol=tolerance * scale, rtol=0)
    return made


def test_a_real_classifier_is_cut_at_its_blocks(efficientnet):
    x = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    made = same(efficientnet, x)
    names = {name for name, _ in efficientnet.named_parameters()}
    assert {name.replace("/", ".") for name, _ in made.named_parameters()} == names
    found = {cut.path: cut for cut in graphs.cuts(made.graph)}
    assert {"_blocks.2", "_blocks.4", "_blocks.14", "_blocks", "_bn0"} <= found.keys()
    assert found["_blocks.2"].shape == (24, 16, 16)
    at = {}
    efficientnet._blocks[2].register_forward_hook(lambda module, inputs, output: at.update(two=output))
    with torch.no_grad():
        expected = efficientnet(x)
        torch.testing.assert_close(made.features(["_blocks.2"], x)["_blocks.2"], at["two"], atol=1e-4, rtol=1e-4)
        head, tail = split(made, "_blocks.2")
        torch.testing.assert_close(tail(head(x)), expected, atol=1e-3, rtol=1e-3)
    with pytest.raises(ConvertError, match="also reads 'batch_norm_5' from before it"):
        split(made, "_blocks.2._depthwise_conv")


class Layers(nn.Module):
    """Of many kinds, one after the other and beside each other."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding="same")
        self.group, self.relu, self.prelu = nn.GroupNorm(2, 8), nn.ReLU(inplace=True), nn.PReLU(8)
        self.up, self.pool = nn.ConvTranspose2d(8, 8, 3, 2, 1, 1, groups=2), nn.MaxPool2d(3, 2, 1, ceil_mode=True)
        self.average = nn.AvgPool2d(3, 2, 1, count_include_pad=False)
        self.norm, self.attend = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.register_buffer("scale", torch.tensor([0.5, 1.0, 2.0]).reshape(1, 3, 1, 1))

    def forward(self, x):
        x = self.relu(self.group(self.conv(x * self.scale + 0.5)))
        x = self.average(self.pool(self.prelu(self.up(x) - 0.2)))
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        x = F.interpolate(F.interpolate(x, size=(7, 5)), size=(6, 6), mode="bicubic", align_corners=True)
        a, b = x.chunk(2, 1)
        x = torch.cat([F.silu(a) * F.hardswish(b), F.gelu(a) - F.softplus(b)], 1)
        y = torch.cat([self.token.expand(x.shape[0], -1, -1), x.flatten(2).transpose(1, 2)], 1)
        y = y + self.attend(self.norm(y), self.norm(y), self.norm(y), need_weights=False)[0]
        z = F.pixel_shuffle(F.pad(x, (1, 0, 1, 2), mode="reflect"), 2)
        return (
            F.softmax(y[:, 0], -1), torch.round(y[:, 1:, ::2] * 4) / 4, F.adaptive_avg_pool2d(x, 3).clamp(-0.5, 0.5),
            z.mean((2, 3)), x.amax(-1).view(x.shape[0], -1), F.leaky_relu(z.abs().sqrt() ** 1.5, 0.1), y.sum(1).t(),
        )  # fmt: skip


def test_layers_of_many_kinds():
    torch.manual_seed(0)
    made = same(Layers(), torch.randn(3, 3, 12, 16))
    assert "token" in dict(made.named_parameters()) and "scale" in dict(made.named_buffers())


def test_a_module_that_is_trained_stays_so_and_batch_norms_are_folded():
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.ReLU6(), nn.Flatten(), nn.LazyLinear(2)
    )
    module.train()(torch.rand(8, 3, 6, 6))
    module[0].eval()
    data = export(module, torch.rand(1, 3, 6, 6), inputs=["image"], outputs=["latent"])
    assert module.training and not module[0].training and module[2].training
    module.eval()
    x = torch.rand(5, 3, 6, 6)
    with open_graph(data, {}) as session, torch.no_grad():
        np.testing.assert_allclose(session.run({"image": x.numpy()})["latent"], module(x), atol=1e-5)
    assert b"BatchNormalization" not in data


class ByValue(nn.Module):
    def forward(self, x):
        return x + 1 if x.sum() > 0 else x


class ByBatch(nn.Module):
    def forward(self, x):
        return x.reshape(2, -1)


class Unknown(nn.Module):
    def __init__(self):
        super().__init__()
        self.part = nn.Module()
        self.part.forward = lambda x: torch.linalg.svd(x)[1]

    def forward(self, x):
        return self.part(x)


@pytest.mark.parametrize(("module", "why"), [
    (ByValue(), r"torch says at test_torch_module.py:\d+ \(return x \+ 1 if x.sum"), (ByBatch(), "torch says"),
    (Unknown(), "'part'(.|\n)*svd"), (nn.BatchNorm2d(3, track_running_stats=False), "keeps no running means"),
])  # fmt: skip
def test_what_cannot_be_traced_says_what_prevents_it(module, why):
    with pytest.raises(ConvertError, match=why):
        cuts(module, torch.zeros(2, 3, 4, 4))
