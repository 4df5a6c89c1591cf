"""From a network and pictures to two bundles: what a device sends through them is answered as the mode table says."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from shoal.cli import main
from shoal.converters.sources import onnx, torch_module
from shoal.converters.split import recipe as recipes
from shoal.converters.split.network import export
from shoal.converters.split.recipe import SplitRecipe
from shoal.converters.split.train import read, train
from shoal.runtime.bundle import Bundle
from shoal.runtime.errors import SourceError, UsageError
from shoal.runtime.session import Place, open_graph
from shoal.runtime.split.codec import Codec
from shoal.runtime.split.modes import parse
from shoal.runtime.split.tables import Tables

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "data"))
from small_teacher import pictures  # noqa: E402

SMALL = SplitRecipe(
    cut="0", taps=("1.first",), latent=4, stride=4, width=16, bits=(2, 4), epochs=3, batch=50, rate=3e-3, tail_epochs=2,
    tail_rate=1e-3, mean=128, deviation=32,
)  # fmt: skip


@pytest.fixture(scope="module")
def data() -> tuple[np.ndarray, np.ndarray]:
    x, labels = pictures(800, 3)
    return np.clip(x * 32 + 128, 0, 255).round().astype(np.uint8).transpose(0, 2, 3, 1), labels


@pytest.fixture(scope="module")
def whole(teacher) -> nn.Module:
    return nn.Sequential(teacher.head, teacher.tail)


def opened(bundle: Bundle, role: str):
    weights = bundle.section("weights", "weights")
    place = Place(str(bundle.path), weights.offset, weights.length, bundle.fileno())
    return open_graph(bundle.bytes(bundle.section("graph", role)), {"weights": place}, threads=1)


def held(data, recipe: SplitRecipe) -> tuple[np.ndarray, np.ndarray]:
    order = np.random.default_rng(recipe.seed).permutation(len(data[0]))[: round(recipe.held * len(data[0]))]
    x = (data[0][order].transpose(0, 3, 1, 2).astype(np.float32) - recipe.mean) / recipe.deviation
    return x.astype(np.float32), data[1][order]


@pytest.mark.parametrize(
    "changes",
    [
        {"members": 2},
        {"widths": (0.5, 1.0)},
        {"beta": 2.0, "mirror": True},
        {"encoder": "linear", "stem": "0", "stride": 1, "epochs": 1},
    ],
    ids=["members", "widths", "entropic", "behind-its-own-layers"],
)
def test_what_is_packed_answers_as_its_table_says(whole, data, changes, tmp_path):
    recipe = dataclasses.replace(SMALL, **changes)
    network = torch_module.network(whole, torch.zeros(2, 3, 16, 16))
    report = train(network, *data, recipe, tmp_path, name="toy")
    x, labels = held(data, recipe)
    with Bundle.open(report.device) as device, Bundle.open(report.edge) as edge:
        table = parse(device.bytes(device.section("modes")))
        assert table.modes == parse(edge.bytes(edge.section("modes"))).modes
        assert (
            len(table.modes) == {"members": 4, "widths": 4, "beta": 1}.get(next(iter(changes)), 2)
            and table.encoder == report.encoder
        )
        assert table.local.accuracy == pytest.approx(report.whole, abs=1e-4)
        with opened(device, "head") as head, opened(edge, "tail") as tail, opened(device, "local") as local:
            (image,) = head.inputs.keys() - {"encoder"}
            for mode in table.modes:
                codec = Codec(Tables.from_bytes(device.bytes(device.section("codec", mode.codec))), (4, 4, 4))
                feeds = {image: x, **({"encoder": np.array(mode.encoder)} if mode.encoder else {})}
                latents = head.run(feeds)["latent"]
                messages = [codec.encode(latents[at : at + 1]) for at in range(len(x))]
                assert np.mean([len(one) for one in messages]) == pytest.approx(mode.bytes, abs=1.5)
                received = np.concatenate([codec.decode(one) for one in messages])
                (logits,) = tail.run({"latent": received}).values()
                assert (logits.argmax(1) == labels).mean() == pytest.approx(mode.accuracy, abs=0.02)
            (alone,) = local.run({image: x}).values()
            assert (alone.argmax(1) == labels).mean() == pytest.approx(report.whole, abs=0.01)
            assert list(tail.outputs) == list(local.outputs)


def test_an_onnx_file_that_is_not_labelled(whole, data, tmp_path):
    model = export(whole, torch.zeros(2, 3, 16, 16), inputs=("image",), outputs=("logits",))
    network = onnx.network(model)
    cut = next(node.outputs[0] for node in network.graph.nodes if node.op == "Relu")
    recipe = dataclasses.replace(SMALL, cut=cut, taps=(), stride=2, bits=(4,), alpha=0.0)
    report = train(network, data[0], None, recipe, tmp_path)
    assert report.whole == 1 and report.modes[0].accuracy > 0.4  # of what the uncut network says


def test_a_second_try_only_reads_what_is_done(whole, data, tmp_path):
    network = torch_module.network(whole, torch.zeros(2, 3, 16, 16))
    recipe = dataclasses.replace(SMALL, bits=(3,), epochs=1, tail_epochs=1)
    digests, trained = [], []

    def files() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pt")}

    for rows in (data, data, (data[0][::-1].copy(), data[1][::-1].copy())):
        before = files()
        report = train(network, *rows, recipe, tmp_path, overwrite=True)
        trained.append({name for name, when in files().items() if before.get(name) != when})
        with Bundle.open(report.edge) as edge:
            digests.append((edge.section("weights", "weights").sha256, report.encoder, report.losses))
    assert digests[0] == digests[1] and not trained[1]
    assert digests[2] != digests[0] and len(trained[2]) == 2 and not trained[0] & trained[2]  # other pictures


def test_the_verb_splits_an_onnx_file_where_it_finds_a_cut(whole, data, tmp_path, capsys):
    model = export(whole, torch.zeros(2, 3, 16, 16), inputs=("image",), outputs=("logits",))
    (tmp_path / "toy.onnx").write_bytes(model)
    np.savez(tmp_path / "data.npz", images=data[0], labels=data[1])
    (tmp_path / "r.toml").write_text("[split]\nlatent = 4\nbits = [2, 4]\nepochs = 1\ntail_epochs = 1\nrate = 3e-3\n")
    words = [
        "convert",
        str(tmp_path / "toy.onnx"),
        "--recipe",
        str(tmp_path / "r.toml"),
        "--out",
        str(tmp_path / "made"),
    ]
    assert main([*words, "--json"]) == 2  # no data
    assert main([*words, "--data", str(tmp_path / "data.npz"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [mode["bits"] for mode in said["modes"]] == [2, 4]
    assert Path(said["device"]).name == "toy.device.shoal" and Path(said["edge"]).exists()


def test_the_verb_splits_a_classifier_from_elsewhere(ocr_folder, tmp_path, capsys):
    """Of opset 11: what is written beside a network's own nodes is of its opset too."""
    images = np.random.default_rng(0).integers(0, 256, (40, 48, 192, 3), np.uint8)
    np.savez(tmp_path / "data.npz", images=images)
    (tmp_path / "r.toml").write_text("[split]\nlatent = 4\nepochs = 1\ntail_epochs = 1\n")
    words = ["--recipe", str(tmp_path / "r.toml"), "--data", str(tmp_path / "data.npz"), "--out", str(tmp_path)]
    (source,) = ocr_folder.glob("*cls*.onnx")
    assert main(["convert", str(source), *words, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    with Bundle.open(said["edge"]) as edge, opened(edge, "tail") as tail:
        (latent,) = tail.inputs.values()
        assert latent.dims[1] == 4


def test_recipes_are_read_and_refused_by_the_field(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text('[split]\ncut = "x"\nbits = [2, 4]\nbeta = 1\nmirror = true\n')
    found = recipes.load(path, latent=7)
    assert (found.cut, found.bits, found.beta, found.mirror, found.latent) == ("x", (2, 4), 1, True, 7)
    for line, said in (
        ("latnet = 3", "latnet"), ("bits = 4", "bits"), ("bits = [9]", "bits"), ('encoder = "big"', "encoder"),
        ("latent = 1.5", "latent"), ("held = 1", "held"), ("members = 2\nwidths = [0.5, 1]", "members"),
        ("members = 2\nbeta = 1", "beta"), ("bits = [", "TOML"),
    ):  # fmt: skip
        path.write_text(f'[split]\ncut = "x"\n{line}\n')
        with pytest.raises(UsageError, match=said):
            recipes.load(path)
    path.write_text("cut = 1")
    with pytest.raises(UsageError, match="split"):
        recipes.load(path)


def test_data_is_looked_at_before_it_is_used(tmp_path, data):
    path = tmp_path / "a.npz"
    np.savez(path, images=data[0], labels=data[1])
    assert (read(path)[0] == data[0]).all() and (read(path)[1] == data[1]).all()
    for arrays in ({"images": data[0].astype(float)}, {"images": data[0], "labels": data[1][:3]}, {"x": data[0]}):
        np.savez(path, **arrays)
        with pytest.raises(SourceError):
            read(path)
    path.write_bytes(b"PK nothing")
    with pytest.raises(SourceError):
        read(path)
