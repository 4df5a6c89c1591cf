"""EfficientNet-Lite0 on CIFAR-10 at 128 px, cut and trained by every recipe: the figures of docs/split-training.md.

    python tests/converters/split/measure_cifar.py [--dev] DATA.npz WEIGHTS.pth FOLDER [STAGE ...]

Stages are uncut, the names of SPLITS, local, codecs, tails, times and chart; all of them by default. Each leaves its
checkpoints and its figures in FOLDER, is skipped once it is done and goes on where it was killed. The first layers (up
to block 4) are frozen throughout, so what they give is computed once, for each picture and its changed copies. With
--dev the 3,000 pictures of the test stay away: 4,000 train, and the other 1,000 of the 5,000 choose among recipes.
"""

import copy
import hashlib
import io
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from efficientnet_parts import SIDE, enlarged, parts, scaled
from PIL import Image
from torch import nn
from torch.nn import functional as F

from shoal.chart import Line, draw
from shoal.converters.split import bottleneck, distil, export, modes
from shoal.converters.split.distil import CUT, Rows, Schedule, Student
from shoal.converters.split.entropic import FactorisedPrior
from shoal.converters.split.exits import Exit
from shoal.converters.split.slimmable import Ensemble, Levels, Slim, recalibrate
from shoal.runtime.session import open_graph
from shoal.runtime.split.codec import Codec

IMAGE, FEATURES = (3, SIDE, SIDE), {4: (40, 16, 16), 7: (80, 8, 8), 10: (112, 8, 8)}  # behind these blocks
TRAIN, COPIES = 5000, 8  # each picture, its mirror image, and 6 that are moved and scaled
BATCH = 50


@dataclass(frozen=True)
class Split:
    """A projection (`linear`) behind the device's own blocks up to `behind`, 7 or 10; behind block 4 an ensemble of
    small encoders, or one at several widths, with a decoder to block 7."""

    latent: int
    bits: tuple[int, ...] = (0,)
    beta: float = 0.0
    behind: int = 7
    members: int = 1
    widths: tuple[float, ...] = ()
    hnd: int = 10
    tail: int = 4

    @property
    def choices(self):
        return len(self.widths) or self.members

    @property
    def shape(self):
        return self.latent, 8, 8

    def encoder(self):
        if self.members > 1:
            return Ensemble(bottleneck.encoder("thin", 40, self.latent, 2, 8) for _ in range(self.members))
        if self.widths:
            return Slim(bottleneck.encoder("separable", 40, self.latent, 2, 96), self.widths)
        return bottleneck.encoder("linear", FEATURES[self.behind][0], self.latent, 1)

    def student(self, tail):
        torch.manual_seed(1)
        channel = FactorisedPrior(self.latent) if self.beta else Levels(self.latent, self.choices)
        decoder = bottleneck.decoder("light", self.shape, FEATURES[max(self.behind, 7)], width=128)
        return Student(self.encoder(), channel, decoder, copy.deepcopy(tail))


LEVELS = (8, 4, 3, 2)
SPLITS = {
    "n1": Split(24, beta=4),
    "l12": Split(12, LEVELS),
    "n2": Split(24, beta=12),
    "n1 longer": Split(24, beta=4, hnd=30, tail=16),
    "l24": Split(24, LEVELS),
    "d1": Split(24, beta=4, behind=10, hnd=5, tail=3),
    "d2": Split(24, beta=12, behind=10, hnd=5, tail=3),
    "ens": Split(12, (4, 2, 1), behind=4, members=4),
    "wide": Split(24, (4, 2), behind=4, widths=(0.25, 0.5, 0.75, 1)),
}


class Measure:
    def __init__(self, data, weights, folder, dev=False):
        self.folder, self.dev = Path(folder), dev
        self.folder.mkdir(parents=True, exist_ok=True)
        self.stem, self.head, self.tail = parts(weights, 10)
        found = np.load(data)
        x = np.concatenate([found["x_train"], found["x_valid"]])
        y = np.concatenate([found["y_train"], found["y_valid"]]).reshape(-1).astype(np.int64)
        order = np.random.default_rng(0).permutation(len(x))
        x, y = x[order], y[order]
        begin = 4000 if dev else TRAIN
        end = TRAIN if dev else len(x)
        self.small = {"train": x[:begin], "test": x[begin:end]}
        self.labels = {"train": y[:begin], "test": y[begin:end]}
        self.features = {4: {part: self.kept(f"stem.{part}", (self.stem,), IMAGE, FEATURES[4], self.pictures(part))
                             for part in self.small}}  # fmt: skip

    def say(self, *words):
        with open(self.folder / "log.txt", "a") as file:
            print(time.strftime("%H:%M:%S"), *words, file=file, flush=True)

    def progress(self, event):
        if event.done % 100 == 0 or event.done == event.total:
            self.say(event.stage, f"{event.done}/{event.total}", event.detail)

    def results(self, **new):
        path = self.folder / "results.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        if new:
            known.update(new)
            path.write_text(json.dumps(known, indent=1))
            self.say("result", json.dumps(new)[:2000])
        return known

    def pictures(self, part):
        """fp32 [n, 3, 128, 128], by batches; of those that train all copies, one after the other."""
        for number in range(COPIES if part == "train" else 1):
            for at in range(0, len(self.small[part]), BATCH):
                yield scaled(enlarged(self.small[part][at : at + BATCH], number, at)).numpy()

    def kept(self, name, layers, given, shape, batches):
        """What frozen layers give for batches, fp16 [n, *shape], by ONNX Runtime, computed once."""
        path = self.folder / f"{name}.npy"
        if not path.exists():
            begun, found = time.time(), []
            with torch.no_grad(), open_graph(export.network(layers, {"x": given}, "y", shape), {}, threads=1) as graph:
                for batch in batches:
                    found.append(graph.run({"x": batch})["y"].astype(np.float16))
            np.save(path, np.concatenate(found))
            self.say(name, f"{time.time() - begun:.0f} s")
        return np.load(path, mmap_mode="r")

    def fit(self, name, module, learns, loss, rows, schedule):
        begun = time.time()
        losses = distil.fit(module, learns, loss, rows, schedule, checkpoint=self.folder / f"{name}.pt", stage=name,
                            progress=self.progress)  # fmt: skip
        self.say(name, f"{time.time() - begun:.0f} s", [round(value, 3) for value in losses])

    # --- stages

    def uncut(self):
        """Tunes what is behind the stem, norms keeping their statistics; then its features and answers, of all rows."""
        network = nn.Sequential(self.head, self.tail).eval().requires_grad_(True)

        def loss(batch, generator):
            return F.cross_entropy(network(batch["input"]), batch["label"], label_smoothing=0.1)

        plain = {"input": self.features[4]["train"][: 2 * len(self.labels["train"])]}
        rows = Rows({**plain, "label": np.tile(self.labels["train"], 2)}, copies=2)
        self.fit("uncut", network, list(network.parameters()), loss, rows, Schedule(4, 50, 5e-4, cosine=True))
        network.requires_grad_(False)
        self.heads = {4: (self.stem,), 7: (self.stem, self.head), 10: (self.stem, self.head, self.tail.blocks[:3])}
        late = copy.deepcopy(self.tail)
        late.blocks = late.blocks[3:]
        self.tails_behind = {7: self.tail, 10: late}
        for behind, before, name in ((7, 4, "cut"), (10, 7, "late")):
            self.features[behind] = {}
            for part, given in self.features[before].items():
                self.features[behind][part] = self.kept(f"{name}.{part}", self.heads[behind][-1:], FEATURES[before],
                                                        FEATURES[behind], pieces(given))  # fmt: skip
        self.outputs = {part: self.kept(f"outputs.{part}", (self.tail,), FEATURES[7], (10,), pieces(given))
                        for part, given in self.features[7].items()}  # fmt: skip
        if "uncut" not in self.results():
            self.results(uncut=self.against(self.outputs["test"])["accuracy"])

    def rows(self, part, behind=7):
        """What goes into the encoder, and what the uncut network makes of it."""
        copies = COPIES if part == "train" else 1
        arrays = {"input": self.features[behind][part], CUT: self.features[max(behind, 7)][part]}
        arrays |= {"outputs": self.outputs[part], "label": np.tile(self.labels[part], copies)}
        return Rows(arrays, copies=copies)

    def split(self, name):
        """HND; then the encoder is frozen, and decoder and tail learn. It is measured before that and after it."""
        one, rows = SPLITS[name], self.rows("train", SPLITS[name].behind)
        student, choices = one.student(self.tails_behind[max(one.behind, 7)]), range(1, one.choices + 1)
        picked = [(choice, bits) for choice in choices for bits in one.bits]
        loss = distil.stage1(student, bits=one.bits, beta=one.beta, copies=3 if one.choices > 1 else 2)
        schedule = Schedule(one.hnd, BATCH, 2e-3, cosine=True)
        self.fit(f"{name}.hnd", student, student.stage(1), loss, rows, schedule)
        recalibrate(student.encoder, lambda: (batch["input"] for batch in rows.batches(250)))
        student.eval().requires_grad_(False)
        frozen = distil.digest(student.encoder)
        kept = {f"latent{choice}": modes.latents(student, rows, choice, copies=True) for choice in choices}
        if isinstance(student.channel, Levels):
            for choice in choices:
                student.channel.settle(kept[f"latent{choice}"], choice)
        before = self.measured(student, name, kept, one.bits[:1]) if name not in self.results() else None
        tuned = Rows({key: rows.arrays[key] for key in ("label", "outputs")} | kept, copies=COPIES)
        schedule = Schedule(one.tail, BATCH, 3e-4, cosine=True)
        loss = distil.stage2(student, modes=picked, bf16=True)
        self.fit(f"{name}.tail", student, student.stage(2), loss, tuned, schedule)
        student.eval().requires_grad_(False)
        if before is not None:
            found = {"before": before, "modes": self.measured(student, name, kept, one.bits), "encoder": frozen}
            self.results(**{name: found | {"same": distil.digest(student.encoder) == frozen}})
        return student

    def measured(self, student, name, kept, bits):
        """Each mode: tables of the latents that trained, a message of each picture of the test, decoded, and answered
        by the tail's graph."""
        one, found = SPLITS[name], []
        count, test = len(self.labels["train"]), self.rows("test", one.behind)
        for choice in range(1, one.choices + 1):
            held = modes.latents(student, test, choice)
            for number in bits:
                tables = modes.tables(student, kept[f"latent{choice}"][:count], choice, number)
                sizes, outputs = self.answered(student, one, tables, held)
                ideal = tables.cost(tables.quantiser.quantise(held)) / 8 / len(held)
                row = {"encoder": choice, "bits": number or tables.bits, "bytes": float(sizes.mean())}
                found.append(row | {"raw": held[0].size * tables.bits / 8, "ideal": ideal})
                found[-1] |= self.against(outputs, f"{name}.e{choice}b{number}")
        return found

    def answered(self, student, one, tables, held):
        """Bytes of each latent's message, and what the tail's graph makes of it in ONNX Runtime."""
        codec = Codec(tables, held.shape[1:])
        messages = [codec.encode(held[at : at + 1]) for at in range(len(held))]
        received = np.concatenate([codec.decode(message) for message in messages])
        with open_graph(self.tail_file(student, one), {}, threads=1) as graph:
            outputs = [graph.run({"latent": piece})["y"] for piece in pieces(received)]
        return np.array([len(message) for message in messages]), np.concatenate(outputs)

    def against(self, outputs, name=""):
        """Accuracy, and its difference to the uncut network's on the same pictures, the first of the test."""
        right, uncut = (one.argmax(1) == self.labels["test"][: len(one)] for one in (outputs, self.outputs["test"]))
        less, half = modes.paired(right, uncut[: len(right)])
        if name:
            np.save(self.folder / f"right.{name}.npy", right)
        return {"accuracy": float(right.mean()), "less": less, "interval": half}

    def local(self):
        """An exit on the stem's output: what a device answers that runs no more than the head's first part."""
        torch.manual_seed(1)
        leaves, rows = Exit(40, 10, 160), self.rows("train", 4)

        def loss(batch, generator):
            return F.cross_entropy(leaves(batch["input"]), batch["label"])

        self.fit("local", leaves, list(leaves.parameters()), loss, rows, Schedule(8, BATCH, 2e-3, cosine=True))
        with torch.no_grad():
            found = [leaves(batch["input"]).numpy() for batch in self.rows("test", 4).batches(250)]
        self.results(local=self.against(np.concatenate(found), "local"))

    def codecs(self):
        """The uncut network on the test's first 1,000 pictures after they went through JPEG and WebP."""
        found, whole = {}, (self.stem, self.head, self.tail)
        with torch.no_grad():
            graph = open_graph(export.network(whole, {"x": IMAGE}, "y", (10,)), {}, threads=1)
        for kind, quality, options in CODECS:
            sizes, outputs = [], []
            for at in range(0, 1000, BATCH):
                back = []
                for picture in enlarged(self.small["test"][at : at + BATCH]):
                    file = io.BytesIO()
                    Image.fromarray(picture).save(file, kind, quality=quality, **options)
                    sizes.append(file.tell())
                    back.append(np.asarray(Image.open(file).convert("RGB")))
                outputs.append(graph.run({"x": scaled(np.stack(back)).numpy()})["y"])
            name = f"{kind} {quality}" + " optimised" * ("optimize" in options)
            found[name] = {"bytes": float(np.mean(sizes)), **self.against(np.concatenate(outputs))}
            self.say(name, found[name])
        self.results(codecs=found)

    def tails(self, name="n1"):
        """A second tail for the encoder of a split that is done: a small one, for another task (is it an animal?). The
        head's file is written before and after, and both tails answer the same messages."""
        student, rows = self.split(name), self.rows("train", SPLITS[name].behind)
        one, before = SPLITS[name], self.head_file(student, name)
        animals = {part: np.isin(labels, ANIMALS).astype(np.int64) for part, labels in self.labels.items()}
        torch.manual_seed(2)
        decoder = bottleneck.decoder("light", one.shape, FEATURES[7], width=64)
        other = Student(student.encoder, student.channel, decoder, Exit(80, 2, 160))
        arrays = {"label": np.tile(animals["train"], COPIES), "latent": modes.latents(student, rows, copies=True)}
        loss = distil.stage2(other, modes=((0, one.bits[0]),), alpha=1)
        schedule = Schedule(4, BATCH, 2e-3, cosine=True)
        self.fit(f"{name}.animals", other, other.stage(2), loss, Rows(arrays, copies=COPIES), schedule)
        held = modes.latents(student, self.rows("test", one.behind))
        tables, found = modes.tables(student, arrays["latent"][: len(animals["train"])], 0, one.bits[0]), {}
        for kind, maker, labels in (("ten classes", student, self.labels["test"]), ("animals", other, animals["test"])):
            _, outputs = self.answered(maker, one, tables, held)
            tail = hashlib.sha256(self.tail_file(maker, one)).hexdigest()
            found[kind] = {"accuracy": float((outputs.argmax(1) == labels).mean()), "tail": tail}
        after = self.head_file(other, name)
        self.results(tails=found | {"head": hashlib.sha256(after).hexdigest(), "same": before == after})

    @torch.no_grad()
    def head_file(self, student, name):
        """The device's whole network, image to latent."""
        one = SPLITS[name]
        return export.head(student.encoder, IMAGE, one.shape, stem=nn.Sequential(*self.heads[one.behind]))

    @torch.no_grad()
    def tail_file(self, student, one):
        tail, classes = student.tail, 10
        if isinstance(tail, Exit):  # its temperature is 1
            tail, classes = tail.layers, 2
        return export.network((student.decoder, tail), {"latent": one.shape}, "y", (classes,))

    def times(self):
        """In ONNX Runtime, one picture, one thread: of the ensemble's head by members (weights do not matter), of its
        members alone, and of the uncut network."""
        choices = range(1, SPLITS["ens"].members + 1)
        student = SPLITS["ens"].student(self.tail).eval()
        graph, body = self.head_file(student, "ens"), export.head(student.encoder, FEATURES[4], SPLITS["ens"].shape)
        with torch.no_grad():
            whole = export.network((self.stem, self.head, self.tail), {"x": IMAGE}, "y", (10,))
        found = {"head": [modes.head_ms(graph, IMAGE, choice, runs=120) for choice in choices]}
        found["members alone"] = [modes.head_ms(body, FEATURES[4], choice, runs=300) for choice in choices]
        self.results(times=found | {"uncut": modes.head_ms(whole, IMAGE, runs=120)})

    def chart(self):
        """docs/split-cifar.svg, of what was measured."""
        found, curves = self.results(), {}
        for keys, label in (("n1 n2", "entropic, 24 channels"), ("d1 d2", "entropic, behind block 10"),
                            ("l24", "8 to 2 bits, 24 channels"), ("l12", "8 to 2 bits, 12 channels"),
                            ("ens", "ensemble of 4, at 4, 2 and 1 bits"),
                            ("wide", "behind block 4, a quarter to all of its width, 4 bits")):  # fmt: skip
            rows = [row for key in keys.split() if key in found for row in found[key]["modes"]]
            fit = {"ens": lambda row: row["encoder"] == 4, "wide": lambda row: row["bits"] == 4}
            curves[label] = list(filter(fit.get(keys), rows))
        curves["entropic, trained longer"] = found.get("n1 longer", {}).get("modes", [])
        for kind in ("JPEG", "WEBP"):
            rows = [row for key, row in found.get("codecs", {}).items() if key.startswith(kind) and key != "JPEG 75"]
            curves[f"{kind} of the picture"] = [row for row in rows if row["accuracy"] > 0.7]
        lines = [Line(label, tuple((100 * row["accuracy"], row["bytes"]) for row in rows))
                 for label, rows in curves.items() if rows]  # fmt: skip
        description = f"Bytes of a picture's message by the accuracy of what is answered; uncut {found['uncut']:.2%}."
        (self.folder / "split-cifar.svg").write_text(
            draw(lines, title="What a message costs and what its answer is worth", description=description,
                 x_label="accuracy, %", y_label="bytes"))  # fmt: skip


ANIMALS = (2, 3, 4, 5, 6, 7)  # the others are vehicles
CODECS = [("JPEG", 75, {}), *(("JPEG", quality, {"optimize": True}) for quality in (75, 30, 10, 3, 1))]
CODECS += [("WEBP", quality, {"method": 6}) for quality in (75, 30, 10, 3, 0)]


def pieces(array):
    for at in range(0, len(array), BATCH):
        yield array[at : at + BATCH].astype(np.float32)


def main(data, weights, folder, *stages, dev=False):
    torch.set_num_threads(1)  # two stages side by side are faster than one on two threads
    measure = Measure(data, weights, folder, dev)
    measure.uncut()
    for stage in stages or (*SPLITS, "local", "codecs", "tails", "times", "chart"):
        if stage not in measure.results():
            measure.split(stage) if stage in SPLITS else getattr(measure, stage)()


if __name__ == "__main__":
    given = [word for word in sys.argv[1:] if word != "--dev"]
    main(*given, dev="--dev" in sys.argv)
