"""A network and pictures become a split network: a device's bundle and an edge's, with every mode measured.

A straight line: cut, distil, tune the tail for the frozen encoder, write head and tail as graphs, measure each mode on
held-out rows, pack. Everything that took long is kept in a folder of checkpoints, from which a second try goes on.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from shoal.runtime.errors import ConvertError, SourceError, UsageError
from shoal.runtime.events import Event, Progress, silent

from . import bottleneck, distil, export, modes
from .distil import CUT, Rows, Schedule, Student
from .entropic import FactorisedPrior
from .graph import cuts
from .network import Network, split
from .recipe import SplitRecipe
from .slimmable import Ensemble, Levels, Slim, recalibrate
from .tail import pack

_BATCH = 100


@dataclass(frozen=True)
class Report:
    """What was made. `whole` is the accuracy of the uncut network on the held-out rows (without labels, 1: the modes'
    are agreements with it); `encoder` is the digest of the device's part."""

    device: Path
    edge: Path
    encoder: str
    whole: float
    modes: tuple[modes.Mode, ...]
    losses: tuple[float, ...]


def read(path: str | Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Pictures uint8 [n, h, w, 3] and labels int [n], or None, from an .npz file with `images` and `labels`. Raises
    SourceError."""
    try:
        with np.load(path, allow_pickle=False) as found:
            images, labels = found["images"], found["labels"] if "labels" in found else None
    except (OSError, ValueError, KeyError, EOFError) as error:  # KeyError: an array that is not there
        raise SourceError(f"The data {path} cannot be read.", str(error)[:200], "Give an .npz with images.") from None
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or len(images) < 2:
        why = f"Its images are {images.dtype} {list(images.shape)}."
        raise SourceError(f"The data {path} cannot be used.", why, "Give uint8 [n, h, w, 3].")
    if labels is not None and labels.shape != images.shape[:1]:
        why = f"Labels are {list(labels.shape)} for {len(images)} images."
        raise SourceError(f"The data {path} cannot be used.", why, "Give a label for each.")
    return images, labels


def train(
    network: Network, images: np.ndarray, labels: np.ndarray | None, recipe: SplitRecipe, folder: str | Path, *,
    name: str = "", local: bytes | None = None, overwrite: bool = False, progress: Progress = silent,
) -> Report:  # fmt: skip
    """Splits `network` (sources.onnx.network, sources.torch_module.network) of one input fp32 [n, 3, h, w] and one
    output [n, classes]; images are uint8 [n, h, w, 3].

    Writes NAME.device.shoal (head, local answer, codecs, modes) and NAME.edge.shoal (tail, codecs, modes) to `folder`,
    checkpoints beside them. `local` is the ModelProto of what the device answers without an edge, by default the uncut
    network. Raises ConvertError where the cut is none, UsageError, StorageError.
    """
    folder, name = Path(folder), name or "split"
    network = network.eval().requires_grad_(False)
    recipe = recipe if recipe.cut else replace(recipe, cut=search(network, (3, *images.shape[1:3])))
    head, tail = split(network, recipe.cut)
    stem = None
    if recipe.stem:  # up to the cut itself there is nothing to split
        stem = head if recipe.stem == recipe.cut else split(head, recipe.stem)[0]
    rows, held = _rows(images, labels, recipe, head, tail, stem, progress)
    whole = float((held.arrays["outputs"].argmax(1) == held.arrays["label"]).mean())
    student = _student(recipe, rows, tail)
    frozen, losses = _teach(student, recipe, rows, folder / f"{name}.checkpoints", progress)

    picture = (3, *images.shape[1:3])
    latent = modes.latents(student, Rows({"input": held.arrays["input"][:1]})).shape[1:]
    inputs, outputs = network.graph.inputs[0].name, network.graph.outputs[0]
    classes = held.arrays["outputs"].shape[1:]
    graph = export.head(student.encoder, picture, latent, stem=stem, name=inputs)
    edge = export.network([student.decoder, student.tail], {"latent": latent}, outputs, classes)
    table = modes.table(student, rows, held, recipe.bits, graph, picture)
    progress(Event("modes", len(table), len(table), "measured", "modes"))
    found: dict[str, Any] = {
        "encoder": frozen,
        "modes": [mode.row() for mode in table],
        "codecs": {mode.codec: mode.tables.to_bytes() for mode in table},
        "overwrite": overwrite,
    }
    local = local or export.network([network], {inputs: picture}, outputs, classes)
    device, served = folder / f"{name}.device.shoal", folder / f"{name}.edge.shoal"
    alone = {"device_ms": round(modes.head_ms(local, picture), 3), "accuracy": round(whole, 5)}
    pack({"head": graph, "local": local}, device, name, local=alone, **found)
    pack({"tail": edge}, served, name, **found)
    return Report(device, served, frozen, whole, tuple(table), tuple(losses))


def search(network: Network, picture: Sequence[int]) -> str:
    """The cut of the smallest feature [c, h, w] among those with a tenth to a half of the work before them (the first
    of equal ones): what is before it the encoder replaces, and a decoder has little to make. Raises ConvertError."""
    found = cuts(network.graph, {network.graph.inputs[0].name: picture})
    total = found[0].macs_before + found[0].macs_after
    fit = [one for one in found if len(one.shape) == 3 and min(one.shape[1:]) > 1]
    near = [one for one in fit if 0.1 <= one.macs_before / max(total, 1) <= 0.5]
    if not fit:
        why = "None of its cuts is a map of several positions."
        raise ConvertError("No cut was found.", why, "Name one, with --cut or in the recipe.")
    return min(near or fit, key=lambda one: one.bytes).value


def _rows(images, labels, recipe, head, tail, stem, progress) -> tuple[Rows, Rows]:
    """Rows to learn from and rows held out, each with the stem's output and what the teacher makes of it."""
    order = np.random.default_rng(recipe.seed).permutation(len(images))
    kept = max(1, round(recipe.held * len(images)))
    if kept >= len(images):
        raise UsageError("There is nothing to train on.", f"There are {len(images)} images.", "Give more.")
    sets = []
    for chosen, mirrors in ((order[kept:], (False, True)[: 1 + recipe.mirror]), (order[:kept], (False,))):
        found: dict[str, list[np.ndarray]] = {}
        for mirror in mirrors:
            for at in range(0, len(chosen), _BATCH):
                picture = images[chosen[at : at + _BATCH]]
                given = _taught(picture[:, :, ::-1] if mirror else picture, recipe, head, tail, stem)
                for key, value in given.items():
                    found.setdefault(key, []).append(value)
                progress(Event("teacher", at, len(chosen), "features", "images"))
        arrays = {key: np.concatenate(value) for key, value in found.items()}
        right = labels[chosen] if labels is not None else arrays["outputs"][: len(chosen)].argmax(1)
        sets.append(Rows({**arrays, "label": np.tile(right, len(mirrors))}, copies=len(mirrors)))
    return sets[0], sets[1]


@torch.no_grad()
def _taught(picture: np.ndarray, recipe: SplitRecipe, head: Network, tail: Network, stem: Network | None) -> dict:
    x = torch.from_numpy(np.ascontiguousarray(picture.transpose(0, 3, 1, 2))).float()
    x = (x - recipe.mean) / recipe.deviation
    found = {"input": stem(x) if stem is not None else x, **distil.teach(head, tail, recipe.taps, x)}
    return {key: value.numpy() if key == "outputs" else value.half().numpy() for key, value in found.items()}


def _student(recipe: SplitRecipe, rows: Rows, tail: Network) -> Student:
    """Weights of the encoder and the decoder are drawn from the recipe's seed; the tail's are copied."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        given, feature = torch.from_numpy(rows.arrays["input"][:2]).float(), rows.arrays[CUT].shape[1:]
        if len(feature) != 3:
            raise ConvertError("The network cannot be cut here.", f"The feature is {list(feature)}, not [c, h, w].",
                               "Name a cut between convolutions.")  # fmt: skip
        stride = recipe.stride or 1 << round(np.log2(max(given.shape[2] / feature[1], 1)))

        def one(width: int = recipe.width) -> nn.Sequential:
            return bottleneck.encoder(recipe.encoder, given.shape[1], recipe.latent, stride, width)

        encoder: nn.Module = one()
        if recipe.members > 1:
            encoder = Ensemble(one() for _ in range(recipe.members))
        elif recipe.widths:
            encoder = Slim(one(), recipe.widths)
        with torch.no_grad():
            latent = tuple(encoder.eval()(given).shape[1:])
        decoder = bottleneck.decoder(recipe.decoder, latent, feature)
    choices = getattr(encoder, "choices", 1)
    channel = FactorisedPrior(recipe.latent) if recipe.beta else Levels(recipe.latent, choices)
    return Student(encoder, channel, decoder, Network(tail.trained()), recipe.taps)


def _key(student: Student, recipe: SplitRecipe, rows: Rows) -> str:
    """Names checkpoints: with another recipe, network or pictures nothing is gone on with."""
    found = hashlib.sha256(f"{recipe!r} {distil.digest(student)}".encode())
    for name, array in sorted(rows.arrays.items()):
        found.update(f"{name} {array.shape} {array.dtype}".encode())
        found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()[:12]


def _teach(
    student: Student, recipe: SplitRecipe, rows: Rows, folder: Path, progress: Progress
) -> tuple[str, list[float]]:
    """Both stages; the digest of the encoder between them, which the second leaves as it is."""
    names, bits = (CUT, *recipe.taps), (0,) if recipe.beta else recipe.bits
    key = _key(student, recipe, rows)
    schedule = Schedule(recipe.epochs, recipe.batch, recipe.rate, cosine=True, seed=recipe.seed)
    loss = distil.stage1(student, names=names, bits=bits, beta=recipe.beta)
    losses = distil.fit(student, student.stage(1), loss, rows, schedule, checkpoint=folder / f"{key}.1.pt",
                        stage="distil", progress=progress)  # fmt: skip
    recalibrate(student.encoder, lambda: (batch["input"] for batch in rows.batches(_BATCH)))
    frozen, choices = distil.digest(student.encoder), range(1, student.choices + 1)
    kept = {f"latent{choice}": modes.latents(student, rows, choice, copies=True) for choice in choices}
    if isinstance(student.channel, Levels):
        for choice in choices:
            student.channel.settle(kept[f"latent{choice}"], choice)
    tuned = Rows({**{key: rows.arrays[key] for key in ("label", "outputs")}, **kept}, copies=rows.copies)
    schedule = Schedule(recipe.tail_epochs, recipe.batch, recipe.tail_rate, cosine=True, seed=recipe.seed)
    picked = [(choice, number) for choice in choices for number in bits]
    loss = distil.stage2(student, modes=picked, alpha=recipe.alpha)
    losses += distil.fit(student, student.stage(2), loss, tuned, schedule, checkpoint=folder / f"{key}.2.pt",
                         stage="tail", progress=progress)  # fmt: skip
    student.eval().requires_grad_(False)
    assert distil.digest(student.encoder) == frozen
    return frozen, losses
