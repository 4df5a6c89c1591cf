"""A network that gives maps, a detector: cut without labels, measured by its boxes, with a filter that sends nothing
where nothing is."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from shoal.cli import main
from shoal.converters.sources import torch_module
from shoal.converters.split import agreement
from shoal.converters.split.network import export
from shoal.converters.split.recipe import SplitRecipe
from shoal.converters.split.train import train
from shoal.runtime.bundle import Bundle
from shoal.runtime.errors import ConvertError, UsageError
from shoal.runtime.session import open_graph
from shoal.runtime.split import modes
from shoal.runtime.split.client import Client
from shoal.runtime.split.link import Direct, Edge
from shoal.runtime.split.policy import Estimate, fixed

RECIPE = SplitRecipe(
    cut="3", stem="1", encoder="linear", latent=4, stride=2, bits=(4,), epochs=6, batch=25, rate=5e-3, tail_epochs=2,
    shuffle=False, held=0.4, measure="boxes", recall=0.9, mean=128, deviation=64,
)  # fmt: skip


@pytest.fixture(scope="module")
def scenes() -> np.ndarray:
    """uint8 [400, 32, 32, 3] of dark noise, with a bright bar in every second."""
    rng = np.random.default_rng(0)
    images = rng.normal(110, 12, (400, 32, 32, 3))
    for at in range(0, 400, 2):
        y, x, high, wide = (int(rng.integers(*span)) for span in ((2, 20), (2, 14), (6, 9), (10, 16)))
        images[at, y : y + high, x : x + wide] += rng.uniform(60, 120)
    return np.clip(images, 0, 255).round().astype(np.uint8)


@pytest.fixture(scope="module")
def detector(scenes) -> nn.Module:
    """Averages, and says what is bright."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU(), nn.Conv2d(8, 12, 3, 2, 1), nn.ReLU(),
        nn.Conv2d(12, 12, 1), nn.ReLU(), nn.Upsample(scale_factor=2), nn.Conv2d(12, 1, 1), nn.Sigmoid(),
    )  # fmt: skip
    for layer in network:
        if isinstance(layer, nn.Conv2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            layer.weight.data /= layer.weight.data.sum((1, 2, 3), keepdim=True)
            nn.init.zeros_(layer.bias)
    network[7].weight.data *= 16
    network[7].bias.data -= 5
    network.eval().requires_grad_(False)
    found = network(torch.from_numpy(scaled(scenes[:40]))).numpy()
    assert agreement.present(found).tolist() == [True, False] * 20
    return network


def scaled(images: np.ndarray) -> np.ndarray:
    return (images.transpose(0, 3, 1, 2).astype(np.float32) - 128) / 64


def test_a_detector_is_cut_and_its_filter_sends_what_has_something(detector, scenes, tmp_path):
    network = torch_module.network(detector, torch.zeros(2, 3, 32, 32))
    report = train(network, scenes, None, RECIPE, tmp_path, name="bars")
    [mode] = report.modes
    assert report.whole == 1 and mode.accuracy > 0.85
    assert report.gate.recall > 0.8 and report.gate.saved > 0.8
    x = scaled(scenes[-80:])
    with open_graph(export(detector, torch.zeros(2, 3, 32, 32)), {}, threads=1) as whole:
        (uncut,) = whole.run({next(iter(whole.inputs)): x}).values()
    options = {"threads": 1, "prior": Estimate(1e7, 0.001, 0.001), "choose": fixed(1)}
    with Edge(report.edge, threads=1) as edge, Client(report.device, Direct(edge), **options) as device:
        assert device.table.threshold == pytest.approx(report.gate.threshold)
        results = [device.run(one, deadline=20) for one in x]
    sent = np.array([result.where == "edge" for result in results])
    present = np.arange(80) % 2 == 0
    # The very rows that measured the filter
    assert sent[present].mean() == pytest.approx(report.gate.recall, abs=0.03)
    assert 1 - sent[~present].mean() == pytest.approx(report.gate.saved, abs=0.03)
    assert agreement.boxes(np.concatenate([results[at].outputs[next(iter(results[at].outputs))]
                                           for at in np.flatnonzero(sent)]), uncut[sent]) > 0.8  # fmt: skip


def test_a_measure_of_one_s_own_and_no_filter(detector, scenes, tmp_path):
    network = torch_module.network(detector, torch.zeros(2, 3, 32, 32))
    recipe = SplitRecipe(cut="3", latent=2, bits=(2,), epochs=0, tail_epochs=0, stride=2)
    report = train(network, scenes[:40], None, recipe, tmp_path, measure=lambda found, uncut: 0.25)
    assert (report.whole, report.modes[0].accuracy, report.gate) == (0.25, 0.25, None)
    with Bundle.open(report.device) as bundle:
        assert np.isnan(modes.read(bundle).threshold)
    for changes in ({"measure": "classes"}, {"measure": "x"}, {"recall": 1.0}):
        with pytest.raises(UsageError, match=next(iter(changes))):
            train(network, scenes[:40], None, SplitRecipe(**{"cut": "3", **changes}), tmp_path)


def test_a_network_of_several_answers_is_refused_before_anything_is_trained(detector, scenes, tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = detector

        def forward(self, x):
            return self.one(x), self.one(x) * 2

    with pytest.raises(ConvertError, match="not one of each"):
        train(torch_module.network(Two(), torch.zeros(2, 3, 32, 32)), scenes[:9], None, SplitRecipe(), tmp_path)


def test_the_verb_splits_a_text_detector_where_it_finds_a_cut(ocr_folder, tmp_path, capsys):
    (source,) = ocr_folder.glob("*det*.onnx")
    images = np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3), np.uint8)
    np.savez(tmp_path / "data.npz", images=images, labels=np.arange(20) % 2)
    lines = (
        "latent = 4",
        "epochs = 1",
        "tail_epochs = 1",
        "batch = 8",
        'measure = "boxes"',
        "recall = 0.9",
        "held = 0.4",
    )
    (tmp_path / "r.toml").write_text("\n".join(("[split]", *lines, "shuffle = false")))
    words = ["--recipe", str(tmp_path / "r.toml"), "--data", str(tmp_path / "data.npz"), "--out", str(tmp_path)]
    assert main(["convert", str(source), *words, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["uncut"] == 1 and 0 <= said["modes"][0]["accuracy"] <= 1
    with Bundle.open(said["device"]) as device:
        assert modes.read(device).threshold == said["filter"]["threshold"]
