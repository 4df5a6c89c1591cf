"""EfficientNet-Lite0 on CIFAR-10 at 128 px, cut and trained by every recipe: the figures of docs/split-training.md.

    python tests/converters/split/measure_cifar.py DATA.npz WEIGHTS.pth FOLDER [STAGE ...]

Stages, in their order by default: uncut, taught, l12, n (n1 to n4), n1.tail, n2.tail, l12.tail, b12, e1 to e4, ens, b6,
b3, local, codecs, head. Each leaves its checkpoints and its figures in FOLDER, is skipped once it is done and goes on
where it was killed. The first layers (up to block 4, stride 8) are frozen throughout, so what they give is computed
once, for each picture and its mirror image.
"""

import copy
import io
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "data"))
from efficientnet_lite0 import EfficientNetLite0, _same  # noqa: E402

from shoal.converters.split import bottleneck, distil, export, modes  # noqa: E402
from shoal.converters.split.distil import CUT, Rows, Schedule, Student  # noqa: E402
from shoal.converters.split.entropic import FactorisedPrior  # noqa: E402
from shoal.converters.split.exits import Exit  # noqa: E402
from shoal.converters.split.slimmable import Ensemble, Levels, recalibrate  # noqa: E402

SIDE, TRAIN, TAPS = 128, 5000, ("blocks.10",)
FEATURE = (80, 8, 8)
BF16 = True  # of the frozen tail


class Stem(nn.Module):
    def __init__(self, whole, end):
        super().__init__()
        self.conv, self.norm, self.blocks = whole._conv_stem, whole._bn0, whole._blocks[:end]

    def forward(self, x):
        return self.blocks(F.relu6(self.norm(self.conv(_same(x, 3, 2)))))


class Tail(nn.Module):
    def __init__(self, whole, begin):
        super().__init__()
        self.blocks, self.conv, self.norm, self.linear = whole._blocks[begin:], whole._conv_head, whole._bn1, whole._fc

    def forward(self, x):
        return self.linear(F.relu6(self.norm(self.conv(self.blocks(x)))).mean((2, 3)))


class Measure:
    def __init__(self, data, weights, folder):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        whole = EfficientNetLite0()
        whole.load_state_dict(torch.load(weights, weights_only=True))
        whole._fc = nn.Linear(1280, 10)
        nn.init.zeros_(whole._fc.weight)
        nn.init.zeros_(whole._fc.bias)
        whole.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.stem, self.head, self.tail = Stem(whole, 5), whole._blocks[5:8], Tail(whole, 8)
        found = np.load(data)
        x = np.concatenate([found["x_train"], found["x_valid"]])
        y = np.concatenate([found["y_train"], found["y_valid"]]).reshape(-1).astype(np.int64)
        order = np.random.default_rng(0).permutation(len(x))
        self.small, self.labels = x[order], y[order]
        self.train = Rows({"input": self.features("train"), "label": np.tile(self.labels[:TRAIN], 2)}, mirrored=True)
        self.test = Rows({"input": self.features("test"), "label": self.labels[TRAIN:]})

    def say(self, *words):
        with open(self.folder / "log.txt", "a") as file:
            print(time.strftime("%H:%M:%S"), *words, file=file, flush=True)

    def progress(self, event):
        if event.done % 20 == 0 or event.done == event.total:
            self.say(event.stage, f"{event.done}/{event.total}", event.detail)

    def pictures(self, part):
        """uint8 [n, 128, 128, 3], upscaled."""
        chosen = self.small[:TRAIN] if part == "train" else self.small[TRAIN:]
        for at in range(0, len(chosen), 100):
            yield np.stack([np.asarray(Image.fromarray(one).resize((SIDE, SIDE), Image.BICUBIC))
                            for one in chosen[at : at + 100]])  # fmt: skip

    @torch.no_grad()
    def features(self, part):
        """What the stem gives, fp16, of pictures and then of mirrored ones where they train."""
        path = self.folder / f"stem.{part}.npy"
        if not path.exists():
            found, mirrored, begun = [], [], time.time()
            for batch in self.pictures(part):
                found.append(self.stem(scaled(batch)).half().numpy())
                if part == "train":
                    mirrored.append(self.stem(scaled(batch[:, :, ::-1])).half().numpy())
            np.save(path, np.concatenate(found + mirrored))
            self.say("stem", part, f"{time.time() - begun:.0f} s")
        return np.load(path, mmap_mode="r")

    def results(self, **new):
        path = self.folder / "results.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        if new:
            known.update(new)
            path.write_text(json.dumps(known, indent=1))
            self.say("result", json.dumps(new)[:2000])
        return known

    def fit(self, name, module, learns, loss, rows, schedule):
        begun = time.time()
        losses = distil.fit(module, learns, loss, rows, schedule, checkpoint=self.folder / f"{name}.pt", stage=name,
                            progress=self.progress)  # fmt: skip
        self.say(name, f"{time.time() - begun:.0f} s", [round(value, 3) for value in losses])
        return losses

    # --- stages

    def uncut(self):
        """Fine-tunes what is behind the stem; norms keep their statistics."""
        network = nn.Sequential(self.head, self.tail).eval().requires_grad_(True)

        def loss(batch, generator):
            return F.cross_entropy(network(batch["input"]), batch["label"], label_smoothing=0.1)

        self.fit("uncut", network, list(network.parameters()), loss, self.train,
                 Schedule(EPOCHS["uncut"], 50, 5e-4, cosine=True))  # fmt: skip
        network.requires_grad_(False)
        if "uncut" not in self.results():
            right = self.answers(lambda batch: network(batch["input"]))
            np.save(self.folder / "right.uncut.npy", right)
            self.results(uncut=float(right.mean()))

    @torch.no_grad()
    def answers(self, network):
        found = [network(batch).argmax(1).numpy() for batch in self.test.batches(250)]
        return np.concatenate(found) == self.test.arrays["label"]

    @torch.no_grad()
    def taught(self):
        """The teacher's features and answers of all training rows, fp16 beside the stem's."""
        names = (CUT, *TAPS, "outputs")
        paths = {name: self.folder / f"taught.{name}.npy" for name in names}
        if not all(path.exists() for path in paths.values()):
            found = {name: [] for name in names}
            rows, begun = self.train, time.time()
            for at in range(0, rows.whole, 250):
                given = distil.teach(self.head, self.tail, TAPS, rows.take(np.arange(at, at + 250))["input"])
                for name in names:
                    found[name].append(given[name].half().numpy())
            for name in names:
                np.save(paths[name], np.concatenate(found[name]))
            self.say("taught", f"{time.time() - begun:.0f} s")
        arrays = {name: np.load(path, mmap_mode="r") for name, path in paths.items()}
        return Rows({**self.train.arrays, **arrays}, mirrored=True)

    def student(self, name, encoder, channel, latent, bits, beta=0.0, start=None):
        """HND, then GHND, then the second stage with the encoder frozen; measured before and after it."""
        self.uncut()
        torch.manual_seed(1)
        student = Student(encoder(), channel, bottleneck.decoder("light", (latent, 8, 8), FEATURE, width=160),
                          copy.deepcopy(self.tail), TAPS)  # fmt: skip
        if start and (self.folder / f"{start}.ghnd.pt").exists():
            state = torch.load(self.folder / f"{start}.ghnd.pt", weights_only=True)["module"]
            student.load_state_dict(state)
        rows = self.taught()
        names = (CUT, *TAPS)
        if not start:
            learns = student.stage(1)
            loss = distil.stage1(student, bits=bits, beta=beta, copies=2, bf16=BF16)
            self.fit(f"{name}.hnd", student, learns, loss, rows, Schedule(EPOCHS["hnd"], 50, 2e-3))
        learns = student.stage(1)
        loss = distil.stage1(student, names=names, bits=bits, beta=beta, copies=2, bf16=BF16)
        epochs = EPOCHS["warm"] if start else EPOCHS["ghnd"]
        self.fit(f"{name}.ghnd", student, learns, loss, rows, Schedule(epochs, 50, 1e-3, cosine=True))
        if isinstance(channel, Levels):
            recalibrate(student.encoder, lambda: (batch["input"] for batch in self.train.batches(250)))
        student.eval()
        frozen = distil.digest(student.encoder)
        choices = range(1, student.choices + 1)
        kept = {f"latent{choice}": modes.latents(student, rows, choice, mirrored=True) for choice in choices}
        if isinstance(channel, Levels):
            for choice in choices:
                channel.settle(kept[f"latent{choice}"], choice)
        picked = [(choice, number) for choice in choices for number in bits]
        tuned = Rows({"label": rows.arrays["label"], "outputs": rows.arrays["outputs"], **kept}, mirrored=True)
        known = f"{name}.stage1" in self.results()
        before = None if known else self.measured(student, bits[-1:], f"{name}.stage1", student.choices)
        learns = student.stage(2)
        loss = distil.stage2(student, modes=picked)
        self.fit(f"{name}.tail", student, learns, loss, tuned, Schedule(EPOCHS["tail"], 50, 3e-4, cosine=True))
        if before is not None:
            self.results(**{f"{name}.stage1": before})
        if name not in self.results():
            same = distil.digest(student.encoder) == frozen
            self.results(**{name: {"modes": self.measured(student, bits, name), "encoder": frozen, "same": same}})
        return student

    def measured(self, student, bits, name, least=1, train=None, test=None):
        uncut, found = np.load(self.folder / "right.uncut.npy"), []
        test = test or self.test
        train = Rows({"input": (train or self.train).arrays["input"][:TRAIN]})
        for choice in range(least, student.choices + 1):
            learnt, held = modes.latents(student, train, choice), modes.latents(student, test, choice)
            for number in bits:
                tables = modes.tables(student, learnt, choice, number)
                sizes, outputs = modes.answers(student, tables, held)
                right = outputs.argmax(1) == self.test.arrays["label"]
                np.save(self.folder / f"right.{name}.e{choice}b{number}.npy", right)
                raw = held[0].size * tables.bits / 8
                ideal = tables.cost(tables.quantiser.quantise(held)) / 8 / len(held)
                less, half = modes.paired(right, uncut)
                row = {"encoder": choice, "bits": number or tables.bits, "bytes": float(sizes.mean()), "raw": raw}
                row |= {"ideal": ideal, "accuracy": float(right.mean()), "less": less, "interval": half}
                found.append(row)
        return found

    def own(self, *names):
        """Encoders behind the own layers up to the cut: HND alone, the tail as it is. l12 has levels at several
        numbers of bits, n1 to n4 are entropic, each going on where the one before ended."""
        self.uncut()
        rows = self.taught()
        given = Rows({"input": rows.arrays[CUT], CUT: rows.arrays[CUT]}, mirrored=True)
        test = self.cut_rows()
        student = None
        for name in names:
            epochs = EPOCHS["own warm" if student else "own"]
            student = student or self.linear(name, self.tail)
            levels = isinstance(student.channel, Levels)
            bits, beta = ((2, 3, 4, 8), 0.0) if levels else ((0,), OWN_BETAS[int(name[1:])])
            loss = distil.stage1(student, bits=bits, beta=beta)
            self.fit(name, student, student.stage(1), loss, given, Schedule(epochs, 50, 2e-3, cosine=True))
            student.eval().requires_grad_(False)
            if levels:
                student.channel.settle(modes.latents(student, given))
            if name not in self.results():
                self.results(**{name: {"modes": self.measured(student, bits[::-1], name, 1, given, test)}})

    def linear(self, name, tail):
        torch.manual_seed(1)
        latent = int(name[1:]) if name[0] == "l" else 24
        channel = Levels(latent) if name[0] == "l" else FactorisedPrior(latent)
        decoder = bottleneck.decoder("light", (latent, 8, 8), FEATURE, width=96)
        return Student(bottleneck.encoder("linear", 80, latent, 1), channel, decoder, tail)

    @torch.no_grad()
    def cut_rows(self):
        held = np.concatenate([self.head(batch["input"]).numpy() for batch in self.test.batches(250)])
        return Rows({"input": held, "label": self.test.arrays["label"]})

    def tuned(self, name):
        """The second stage of one of `own`."""
        self.uncut()
        rows, test = self.taught(), self.cut_rows()
        student = self.linear(name, copy.deepcopy(self.tail))
        student.load_state_dict(torch.load(self.folder / f"{name}.pt", weights_only=True)["module"])
        given = Rows({"input": rows.arrays[CUT]}, mirrored=True)
        levels = isinstance(student.channel, Levels)
        frozen, bits = distil.digest(student.encoder), (2, 3, 4, 8) if levels else (0,)
        kept = modes.latents(student, given, mirrored=True)
        if levels:
            student.channel.settle(kept)
        arrays = {"latent": kept, "label": rows.arrays["label"], "outputs": rows.arrays["outputs"]}
        loss = distil.stage2(student, modes=[(0, number) for number in bits])
        schedule = Schedule(EPOCHS["tail"], 50, 3e-4, cosine=True)
        self.fit(f"{name}.tail", student, student.stage(2), loss, Rows(arrays, mirrored=True), schedule)
        student.eval().requires_grad_(False)
        found = self.measured(student, bits[::-1], f"{name}.tail", 1, given, test)
        same = distil.digest(student.encoder) == frozen
        self.results(**{f"{name}.tail": {"modes": found, "encoder": frozen, "same": same}})

    def b(self, channels):
        body = lambda: bottleneck.encoder("separable", 40, channels, 2, 96)  # noqa: E731
        self.student(f"b{channels}", body, Levels(channels), channels, (2, 3, 4, 8))

    def e(self, number):
        body = lambda: bottleneck.encoder("separable", 40, 24, 2, 96)  # noqa: E731
        start = f"e{number - 1}" if number > 1 else None
        self.student(f"e{number}", body, FactorisedPrior(24), 24, (0,), beta=BETAS[number], start=start)

    def ens(self):
        members = lambda: Ensemble(bottleneck.encoder("thin", 40, 12, 2, 8) for _ in range(4))  # noqa: E731
        self.student("ens", members, Levels(12, 4), 12, (1, 2, 4))

    def local(self):
        """An exit on the stem's output: what a device answers that runs no more than the head's first part."""
        torch.manual_seed(1)
        leaves = Exit(40, 10, 160)

        def loss(batch, generator):
            return F.cross_entropy(leaves(batch["input"]), batch["label"])

        self.fit("local", leaves, list(leaves.parameters()), loss, self.train, Schedule(8, 50, 2e-3, cosine=True))
        right = self.answers(lambda batch: leaves(batch["input"]))
        less, half = modes.paired(right, np.load(self.folder / "right.uncut.npy"))
        self.results(local={"accuracy": float(right.mean()), "less": less, "interval": half})

    @torch.no_grad()
    def codecs(self):
        """The uncut network on the first 500 pictures of the test that went through JPEG and WebP."""
        self.uncut()
        found, uncut = {}, np.load(self.folder / "right.uncut.npy")[:500]
        wanted = [("JPEG", 75), ("JPEG", 2), ("JPEG", 10), ("WEBP", 0), ("WEBP", 10)]
        for kind, quality in wanted:
            sizes, right = [], []
            for at, batch in zip(range(5), self.pictures("test"), strict=False):
                back = []
                for one in batch:
                    file = io.BytesIO()
                    options = {"optimize": True} if kind == "JPEG" else {"method": 6}
                    if (kind, quality) == ("JPEG", 75):
                        options = {}
                    Image.fromarray(one).save(file, kind, quality=quality, **options)
                    sizes.append(file.tell())
                    back.append(np.asarray(Image.open(file).convert("RGB")))
                logits = self.tail(self.head(self.stem(scaled(np.stack(back)))))
                right.append(logits.argmax(1).numpy() == self.test.arrays["label"][at * 100 : at * 100 + len(batch)])
            right = np.concatenate(right)
            less, half = modes.paired(right, uncut)
            found[f"{kind} {quality}"] = {"bytes": float(np.mean(sizes)), "accuracy": float(right.mean()), "less": less,
                                          "interval": half}  # fmt: skip
            self.results(codecs=found)

    def head_times(self):
        """The ensemble's head in ONNX Runtime, one image, one thread: by members."""
        student = self.student("ens", lambda: Ensemble(bottleneck.encoder("thin", 40, 12, 2, 8) for _ in range(4)),
                               Levels(12, 4), 12, (1, 2, 4))  # fmt: skip
        graph = export.head(student.encoder, (3, SIDE, SIDE), (12, 8, 8), stem=self.stem)
        (self.folder / "ens.head.onnx").write_bytes(graph)
        times = [modes.head_ms(graph, (3, SIDE, SIDE), choice, runs=100) for choice in range(1, 5)]
        body = export.head(student.encoder, (40, 16, 16), (12, 8, 8))
        bodies = [modes.head_ms(body, (40, 16, 16), choice, runs=300) for choice in range(1, 5)]
        whole = export.network(
            nn.Sequential(self.stem, self.head, self.tail), {"image": (3, SIDE, SIDE)}, "logits", (10,)
        )
        self.results(head={"ms": times, "body_ms": bodies, "bytes": len(graph),
                           "whole_ms": modes.head_ms(whole, (3, SIDE, SIDE), runs=100)})  # fmt: skip


EPOCHS = {"own": 8, "own warm": 3, "uncut": 4, "hnd": 12, "ghnd": 8, "warm": 4, "tail": 3}
OWN_BETAS = {1: 4.0, 2: 12.0, 3: 36.0, 4: 108.0}
BETAS = {1: 5.0, 2: 20.0, 3: 60.0, 4: 180.0}  # a step's error is some 1e5


def scaled(batch):
    """uint8 [n, h, w, 3] to the network's fp32 [n, 3, h, w]."""
    return (torch.from_numpy(np.ascontiguousarray(batch.transpose(0, 3, 1, 2))).float() - 127) / 128


def main(data, weights, folder, *stages):
    torch.set_num_threads(1)  # two stages side by side are faster than one on two threads
    measure = Measure(data, weights, folder)
    run = {"uncut": measure.uncut, "taught": measure.taught, "local": measure.local, "codecs": measure.codecs,
           "ens": measure.ens, "head": measure.head_times}  # fmt: skip
    run.update({"l12": lambda: measure.own("l12"), "n": lambda: measure.own("n1", "n2", "n3", "n4")})
    tuned = ("l12", "n1", "n2", "n3", "n4")
    run.update({f"{name}.tail": (lambda name=name: measure.tuned(name)) for name in tuned})
    run.update({f"b{count}": (lambda count=count: measure.b(count)) for count in (3, 6, 12)})
    run.update({f"e{number}": (lambda number=number: measure.e(number)) for number in BETAS})
    usual = "uncut taught l12 n n1.tail n2.tail l12.tail b12 e1 e2 e3 e4 ens b6 b3 local codecs head"
    for stage in stages or usual.split():
        if {"n": "n4"}.get(stage, stage) not in measure.results():
            run[stage]()


if __name__ == "__main__":
    main(*sys.argv[1:])
