"""A network and pictures become a split network: a device's bundle and an edge's, with every mode measured.

A straight line: cut, distil, tune the tail for the frozen encoder, train a filter if there is to be one, write head and
tail as graphs, measure each mode on held-out rows, pack. Everything that took long is kept in a folder of checkpoints,
from which a second try goes on.
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

from . import agreement, bottleneck, distil, export, modes
from .distil import CUT, Rows, Schedule, Student
from .entropic import FactorisedPrior
from .graph import channels_first, cuts
from .network import Network, split
from .neural_filter import NeuralFilter, filter_loss, saved, scores, threshold_for
from .pictures import read_folder
from .recipe import SplitRecipe
from .slimmable import Ensemble, Levels, Slim, recalibrate
from .tail import pack

_BATCH = 100


@dataclass(frozen=True)
class Report:
    """What was made. `whole` is the accuracy of the uncut network on the held-out rows (without labels, 1: the modes'
    are agreements with it); `encoder` is the digest of the device's part, `gate` its filter if it has one."""

    device: Path
    edge: Path
    encoder: str
    whole: float
    modes: tuple[modes.Mode, ...]
    losses: tuple[float, ...]
    gate: "Gate | None" = None


@dataclass(frozen=True)
class Gate:
    """A filter, and its threshold, from half of the held-out rows. Of the other half: the `recall` of rows with
    something in them, and the part of those without for which nothing is sent."""

    network: NeuralFilter
    threshold: float
    recall: float
    saved: float


def read(
    path: str | Path, network: Network | None = None, recipe: SplitRecipe | None = None, progress: Progress = silent
) -> tuple[np.ndarray, np.ndarray | None]:
    """Pictures uint8 [n, h, w, 3] and labels int [n], or None, from an .npz file with `images` and `labels`, or from a
    folder of pictures (pictures.py), which are made as large as `network` takes them, or the recipe says. Raises
    SourceError, UsageError."""
    if Path(path).is_dir():
        recipe = recipe or SplitRecipe()
        height, width = _size(network, recipe)
        return read_folder(path, height, width, fit=recipe.fit, progress=progress)
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
    name: str = "", local: bytes | None = None, measure: agreement.Agreement | None = None, overwrite: bool = False,
    progress: Progress = silent,
) -> Report:  # fmt: skip
    """Splits `network` (sources.onnx.network, sources.torch_module.network) of one input fp32 [n, 3, h, w] and one
    output, logits [n, classes] or maps [n, channels, h, w]; images are uint8 [n, h, w, 3]. One whose input
    is [n, h, w, 3] takes [n, 3, h, w] from then on.

    Labels are classes, by which modes are measured; where the output is maps, they say whether there is anything in a
    picture, by default what the uncut network finds. `measure` takes outputs and the uncut network's, instead of the
    recipe's. Writes NAME.device.shoal (head, local answer, codecs, modes) and NAME.edge.shoal (tail, codecs, modes) to
    `folder`, checkpoints beside them. `local` is the ModelProto of what the device answers without an edge, by default
    the uncut network. Raises ConvertError where the cut is none or the network has not one input and one output,
    UsageError, StorageError.
    """
    folder, name = Path(folder), name or "split"
    ports = [port.name for port in network.graph.inputs], network.graph.outputs
    if any(len(names) != 1 for names in ports):
        why = f"It takes {', '.join(ports[0])} and gives {', '.join(ports[1])}, not one of each."
        raise ConvertError("The network cannot be split.", why, "Export it with one input, and one output of all.")
    if channels_first(network.graph) is not network.graph:
        network = Network(channels_first(network.trained()))
    network = network.eval().requires_grad_(False)
    _check(network, images)
    recipe = recipe if recipe.cut else replace(recipe, cut=search(network, (3, *images.shape[1:3])))
    head, tail = split(network, recipe.cut)
    stem = None
    if recipe.stem:  # up to the cut itself there is nothing to split
        stem = head if recipe.stem == recipe.cut else split(head, recipe.stem)[0]
    rows, held = _rows(images, labels, recipe, head, tail, stem, progress)
    wanted, classes = held.arrays["label"], held.arrays["outputs"].shape[1:]
    if measure is None:
        measure = agreement.named(recipe.measure, classes)
    if measure is not agreement.classes:
        wanted = held.arrays["outputs"]
    whole = measure(held.arrays["outputs"], wanted)
    student = _student(recipe, rows, tail)
    frozen, losses = _teach(student, recipe, rows, folder / f"{name}.checkpoints", progress)
    gate = _gate(recipe, rows, held, folder / f"{name}.checkpoints", progress) if recipe.recall else None

    picture = (3, *images.shape[1:3])
    latent = modes.latents(student, Rows({"input": held.arrays["input"][:1]})).shape[1:]
    inputs, outputs = network.graph.inputs[0].name, network.graph.outputs[0]
    graph = export.head(student.encoder, picture, latent, stem=stem, name=inputs, gate=gate.network if gate else None)
    edge = export.network([student.decoder, student.tail], {"latent": latent}, outputs, classes)
    table = modes.table(student, rows, held, recipe.bits, graph, picture, lambda outputs: measure(outputs, wanted))
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
    threshold = gate.threshold if gate else None
    pack({"head": graph, "local": local}, device, name, local=alone, threshold=threshold, **found)
    pack({"tail": edge}, served, name, **found)
    return Report(device, served, frozen, whole, tuple(table), tuple(losses), gate)


def _check(network: Network, images: np.ndarray) -> None:
    """Raises UsageError where the network takes no such pictures."""
    port = network.graph.inputs[0]
    taken, given = port.dims, (None, 3, *images.shape[1:3])
    same = all(not isinstance(one, int) or one == other for one, other in zip(taken[1:], given[1:], strict=False))
    if taken and (len(taken) != 4 or not same):
        why = (
            f"Its input {port.name!r:.80} is {list(taken)}; they are {images.shape[1]} x {images.shape[2]} pixels, RGB."
        )
        raise UsageError("The network takes no such pictures.", why, "Give them in its size.")


def _size(network: Network | None, recipe: SplitRecipe) -> tuple[int, int]:
    """(height, width) of pictures in pixels. Raises UsageError where nothing says."""
    dims = channels_first(network.graph).inputs[0].dims if network is not None and not recipe.size else ()
    height, width = dims[2:] if len(dims) == 4 else (recipe.size or None,) * 2
    if not isinstance(height, int) or not isinstance(width, int):
        why = "The network takes pictures of any size."
        raise UsageError("How large are the pictures to be?", why, "Say so in the recipe: size = 224.")
    return height, width


def search(network: Network, picture: Sequence[int]) -> str:
    """The cut of the smallest feature [c, h, w] among those with a tenth to a half of the work before them, or else
    less (the first of equal ones): what is before it the encoder replaces, and a decoder has little to make. Raises
    ConvertError."""
    found = cuts(network.graph, {network.graph.inputs[0].name: picture})
    total = found[0].macs_before + found[0].macs_after
    fit = [one for one in found if len(one.shape) == 3 and min(one.shape[1:]) > 1]
    early = [one for one in fit if one.macs_before / max(total, 1) <= 0.5]
    near = [one for one in early if one.macs_before / max(total, 1) >= 0.1]
    if not fit:
        why = "None of its cuts is a map of several positions."
        raise ConvertError("No cut was found.", why, "Name one, with --cut or in the recipe.")
    return min(near or early or fit, key=lambda one: one.bytes).value


def _rows(images, labels, recipe, head, tail, stem, progress) -> tuple[Rows, Rows]:
    """Rows to learn from and rows held out, each with the stem's output and what the teacher makes of it."""
    kept = max(1, round(recipe.held * len(images)))
    order = np.roll(np.arange(len(images)), kept)  # those held out first
    if recipe.shuffle:
        order = np.random.default_rng(recipe.seed).permutation(len(images))
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
        said = arrays["outputs"][: len(chosen)]
        classes = said.shape[-1]
        if labels is not None and said.ndim == 2 and not 0 <= labels.min() <= labels.max() < classes:
            why = f"They are from {labels.min()} to {labels.max()}; the network has {classes} classes."
            raise UsageError("The labels are not the network's.", why, "Number them from 0, in the network's order.")
        if labels is not None:
            right = labels[chosen]
        else:
            right = said.argmax(1) if said.ndim == 2 else agreement.present(said).astype(np.int64)
        sets.append(Rows({**arrays, "label": np.tile(right, len(mirrors))}, copies=len(mirrors)))
    return sets[0], sets[1]


@torch.no_grad()
def _taught(picture: np.ndarray, recipe: SplitRecipe, head: Network, tail: Network, stem: Network | None) -> dict:
    x = torch.from_numpy(np.ascontiguousarray(picture.transpose(0, 3, 1, 2))).float()
    x = (x - recipe.mean) / recipe.deviation
    found = {"input": stem(x) if stem is not None else x, **distil.teach(head, tail, recipe.taps, x)}
    exact = {key for key, value in found.items() if key == "outputs" and value.ndim == 2}
    return {key: value.numpy() if key in exact else value.half().numpy() for key, value in found.items()}


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


def _key(student: nn.Module, recipe: SplitRecipe, rows: Rows) -> str:
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


def _gate(recipe: SplitRecipe, rows: Rows, held: Rows, folder: Path, progress: Progress) -> Gate:
    """Trains a filter on the stem's output, for as long as the first stage."""
    if recipe.measure in ("", "classes") and rows.arrays["outputs"].ndim == 2:
        why = "Its labels are classes; none says that there is nothing."
        raise UsageError("A classifier gets no filter.", why, "Leave recall out of the recipe.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        network = NeuralFilter(rows.arrays["input"].shape[1:], width=16, anywhere=True)
    schedule = Schedule(recipe.epochs, recipe.batch, recipe.rate, cosine=True, seed=recipe.seed)
    distil.fit(network, list(network.parameters()), filter_loss(network), rows, schedule, stage="filter",
               checkpoint=folder / f"{_key(network, recipe, rows)}.filter.pt", progress=progress)  # fmt: skip
    network.eval().requires_grad_(False)
    given, present = scores(network, held), held.arrays["label"] > 0
    half = (len(given) + 1) // 2
    threshold = threshold_for(given[:half], present[:half], recipe.recall)
    return Gate(network, threshold, *saved(given[half:], present[half:], threshold))
