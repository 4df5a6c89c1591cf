"""PP-OCRv4's text detector, cut and filtered, on text over photographs: the figures of docs/split-training.md.

    python tests/converters/split/measure_detector.py DETECTOR.onnx PHOTOGRAPHS FOLDER [STAGE ...]

PHOTOGRAPHS is a folder of pictures; every third of them is held out with all its frames, so nothing that measures comes
from a photograph that trained. Half of the frames have one to three lines of text, which are the objects; a frame with
none in which the detector finds some anyway is left out. Stages, in their order by default: frames (frames.npz), levels
and entropic (the recipes, by the verb's own function), measure (results.json: bundles through the client, JPEG at
several qualities). Needs Pillow.
"""

import io
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from shoal.converters.sources.onnx import network
from shoal.converters.split import agreement
from shoal.converters.split.recipe import SplitRecipe
from shoal.converters.split.train import read, train
from shoal.runtime.session import open_graph
from shoal.runtime.split.client import Client
from shoal.runtime.split.link import Direct, Edge
from shoal.runtime.split.policy import fixed

SIDE, TRAIN, HELD = 192, 1000, 800
WORDS = "EXIT open Sale platform 12:45 No entry Market STOP Room 307 bakery 49.90 Please wait Line 6 north gate".split()
LEVELS = SplitRecipe(
    cut="hardswish_62.tmp_0", stem="hardswish_62.tmp_0", encoder="linear", latent=12, stride=2, bits=(2, 4), epochs=6,
    batch=20, rate=2e-3, tail_epochs=1, tail_rate=3e-4, held=HELD / (TRAIN + HELD), shuffle=False, measure="boxes",
    recall=0.95,
)  # fmt: skip
RECIPES = {"levels": LEVELS, "entropic": replace(LEVELS, beta=20.0, rate=8e-3, epochs=5, recall=0.0)}
QUALITIES = (75, 30, 20, 10, 5, 2)


def frames(photographs: Path, detector: Path) -> dict[str, np.ndarray]:
    """uint8 [n, SIDE, SIDE, 3] and whether text was put there, those to train with first."""
    rng = np.random.default_rng(0)
    paths = sorted(path for path in photographs.iterdir() if path.suffix in (".jpg", ".png"))
    groups = [paths[i] for i in range(len(paths)) if i % 3], paths[::3]
    images, labels, dropped = [], [], 0
    with open_graph(detector.read_bytes(), {}, threads=1) as found:
        for group, count in zip(groups, (TRAIN, HELD), strict=True):
            made = 0
            for at in range(len(group)):  # photograph by photograph, so that halves of those held out share none
                photograph = Image.open(group[at]).convert("RGB")
                photograph.thumbnail((1200, 1200))
                while made < count * (at + 1) // len(group):
                    there = made % 2
                    frame = crop(photograph, rng)
                    if there:
                        frame = written(frame, rng)
                    pixels = np.asarray(frame)
                    if not there and len(agreement.regions(run(found, pixels[None])[0, 0])[0]):
                        dropped += 1
                        continue
                    images.append(pixels)
                    labels.append(there)
                    made += 1
    print(len(paths), "photographs,", len(images), "frames,", dropped, "without text left out")
    return {"images": np.stack(images), "labels": np.array(labels)}


def crop(photograph: Image.Image, rng) -> Image.Image:
    side = int(min(photograph.size) * rng.uniform(0.3, 1))
    x, y = (int(rng.integers(0, length - side + 1)) for length in photograph.size)
    frame = photograph.crop((x, y, x + side, y + side)).resize((SIDE, SIDE), Image.BICUBIC)
    return frame.transpose(Image.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else frame


def written(frame: Image.Image, rng) -> Image.Image:
    """With one to three lines of text, in a colour that stands out, some of them on a plate and slanted."""
    wanted = rng.integers(1, 4)
    while wanted:
        text = " ".join(rng.choice(WORDS, rng.integers(1, 4)))
        font = ImageFont.load_default(int(rng.integers(11, 30)))
        left, top, right, bottom = (int(side) for side in font.getbbox(text))
        size = right - left + 8, bottom - top + 8
        if size[0] >= SIDE - 4:
            continue
        wanted -= 1
        x, y = int(rng.integers(0, SIDE - size[0])), int(rng.integers(0, SIDE - size[1]))
        behind = np.asarray(frame)[y : y + size[1], x : x + size[0]].mean()
        light = rng.integers(170, 256, 3) if behind < 128 else rng.integers(0, 80, 3)
        plate = Image.new("RGBA", size, (0, 0, 0, 0))
        if rng.random() < 0.3:
            plate = Image.new("RGBA", size, (*(255 - int(c) for c in light), 255))
        ImageDraw.Draw(plate).text((4 - left, 4 - top), text, font=font, fill=(*map(int, light), 255))
        plate = plate.rotate(float(rng.uniform(-12, 12)), Image.BICUBIC, expand=True)
        frame.paste(plate, (x, y), plate)
    return frame


def run(session, pixels: np.ndarray) -> np.ndarray:
    """The detector's map fp32 [n, 1, SIDE, SIDE] of pictures uint8."""
    (name,) = session.inputs
    (found,) = session.run({name: scaled(pixels)}).values()
    return found


def scaled(pixels: np.ndarray) -> np.ndarray:
    return ((pixels.transpose(0, 3, 1, 2).astype(np.float32) - LEVELS.mean) / LEVELS.deviation).astype(np.float32)


def jpeg(pixels: np.ndarray, quality: int) -> tuple[np.ndarray, np.ndarray]:
    sizes, back = [], []
    for one in pixels:
        file = io.BytesIO()
        Image.fromarray(one).save(file, "JPEG", quality=quality, optimize=True)
        sizes.append(file.tell())
        back.append(np.asarray(Image.open(file).convert("RGB")))
    return np.array(sizes), np.stack(back)


def measure(detector: Path, folder: Path) -> dict:
    """On the second half of what was held out, which neither trained nor chose the threshold."""
    images, labels = read(folder / "frames.npz")
    half = len(images) - (len(images) - TRAIN) // 2
    images, there = images[half:], labels[half:].astype(bool)
    with open_graph(detector.read_bytes(), {}, threads=1) as session:
        uncut = np.concatenate([run(session, one[None]) for one in images])
        finds = np.array([len(agreement.regions(one[0])[0]) > 0 for one in uncut])
        found = {"frames": len(images), "with text": int(there.sum()), "jpeg": {}}
        found["the detector finds some"] = [float(finds[there].mean()), float(finds[~there].mean())]
        for quality in QUALITIES:
            sizes, back = jpeg(images, quality)
            maps = np.concatenate([run(session, one[None]) for one in back])
            row = {"bytes": sizes.mean(), "bytes with text": sizes[there].mean(), "hmean": agreement.boxes(maps, uncut)}
            found["jpeg"][quality] = {key: float(value) for key, value in row.items()}
    for name in RECIPES:
        with Edge(folder / f"{name}.edge.shoal", threads=1) as edge:
            for mode in edge.table.modes:
                with Client(folder / f"{name}.device.shoal", Direct(edge), choose=fixed(mode.id), threads=1) as client:
                    results = [client.run(scaled(one[None]), deadline=60) for one in images]
                found[f"{name} {mode.codec}"] = said(results, uncut, there)
    return found


def said(results: list, uncut: np.ndarray, there: np.ndarray) -> dict:
    sent = np.array([result.where == "edge" for result in results])
    size = np.array([result.bytes for result in results])
    maps = np.concatenate([next(iter(result.outputs.values()), np.zeros_like(uncut[:1])) for result in results])
    return {
        "sent of frames with text": float(sent[there].mean()),
        "sent of frames without": float(sent[~there].mean()),
        "bytes where sent": float(size[sent].mean()),
        "bytes a frame with text": float(size[there].mean()),
        "bytes a frame without": float(size[~there].mean()),
        "hmean": agreement.boxes(maps, uncut),
        "hmean where sent": agreement.boxes(maps[sent], uncut[sent]),
        "head ms": 1e3 * float(np.median([result.seconds.head for result in results])),
    }


def main(detector, photographs, folder, *stages):
    detector, folder = Path(detector), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for stage in stages or ("frames", *RECIPES, "measure"):
        begun = time.time()
        if stage == "frames":
            np.savez_compressed(folder / "frames.npz", **frames(Path(photographs), detector))
        elif stage in RECIPES:
            report = train(
                network(detector),
                *read(folder / "frames.npz"),
                RECIPES[stage],
                folder,
                name=stage,
                overwrite=True,
                progress=lambda e: print(e.stage, e.done, e.total, e.detail, flush=True),
            )
            print(report)
        else:
            found = measure(detector, folder)
            (folder / "results.json").write_text(json.dumps(found, indent=1))
            print(json.dumps(found, indent=1))
        print(stage, f"{time.time() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
