"""An exit of EfficientNet-Lite0 on CIFAR-10, behind its first five blocks: the figures of docs/split-training.md.

    python tests/converters/split/measure_exits.py DATA.npz FOLDER

FOLDER is measure_cifar.py's: what the stem gives of all pictures, and the uncut network's answers. Of the 5,000
training pictures 4,000, with their changed copies, train the exit and 1,000 fit its temperature; the 3,000 test
pictures are reported on, of which neither saw any.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from shoal.converters.split import distil, modes
from shoal.converters.split.distil import Rows, Schedule
from shoal.converters.split.exits import Exit, calibration_error, confidences, curve, fit_temperature

TRAIN, FITTED = 5000, 1000
THRESHOLDS = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 1.01)


def main(data, folder):
    torch.set_num_threads(1)
    folder, found = Path(folder), np.load(data)
    labels = np.concatenate([found["y_train"], found["y_valid"]]).reshape(-1).astype(np.int64)
    labels = labels[np.random.default_rng(0).permutation(len(labels))]  # as measure_cifar.py orders them
    train, test = (np.load(folder / f"stem.{part}.npy", mmap_mode="r") for part in ("train", "test"))
    late = np.load(folder / "outputs.test.npy").argmax(1) == labels[TRAIN:]
    kept, copies = TRAIN - FITTED, len(train) // TRAIN  # row i + TRAIN is row i, changed
    given = np.concatenate([train[at * TRAIN : at * TRAIN + kept] for at in range(copies)])
    rows = Rows({"input": given, "label": np.tile(labels[:kept], copies)})
    torch.manual_seed(0)
    leaves, begun = Exit(train.shape[1], 10, 96, halvings=2), time.time()

    def loss(batch, generator):
        return F.cross_entropy(leaves(batch["input"]), batch["label"])

    distil.fit(leaves, list(leaves.parameters()), loss, rows, Schedule(3, 50, 3e-3, cosine=True))
    leaves.eval()
    print(f"trained, {time.time() - begun:.0f} s")

    @torch.no_grad()
    def logits(part):
        given = Rows({"input": part})
        return np.concatenate([leaves(batch["input"]).numpy() for batch in given.batches(250)])

    temperature = fit_temperature(logits(train[kept:TRAIN]), labels[kept:TRAIN])
    answers, wanted = logits(test), labels[TRAIN:]
    early = answers.argmax(1) == wanted
    confidence = confidences(answers, temperature)
    print(json.dumps({
        "exit": float(early.mean()), "uncut": float(late.mean()), "temperature": temperature,
        "less": modes.paired(early, late),
        "error before": calibration_error(confidences(answers), early),
        "error": calibration_error(confidence, early),
        "points": [
            {"threshold": point.threshold, "exits": point.exits, "accuracy": point.accuracy,
             "right of those": float(early[confidence >= point.threshold].mean()) if point.exits else None,
             "said of those": float(confidence[confidence >= point.threshold].mean()) if point.exits else None,
             "error of those": calibration_error(confidence[confidence >= point.threshold],
                                                 early[confidence >= point.threshold]) if point.exits else None,
             "less": modes.paired(np.where(confidence >= point.threshold, early, late), late)}
            for point in curve(confidence, early, late, THRESHOLDS)
        ],
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
