"""Folders of pictures: classes, orientation, sizes; what is broken is named, and what is too large is never decoded."""

import io
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from shoal.cli import main
from shoal.converters.sources import onnx
from shoal.converters.split import pictures
from shoal.converters.split.network import export
from shoal.converters.split.pictures import read_folder
from shoal.converters.split.recipe import SplitRecipe
from shoal.converters.split.train import read
from shoal.runtime.errors import SourceError, UsageError
from shoal.runtime.vision.preprocess import Preprocess


def picture(seed: int, height: int, width: int) -> np.ndarray:
    """Smooth colours, so that JPEG and resizing hardly change them."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (4, 4, 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def save(path: Path, array: np.ndarray, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def test_subfolders_are_classes_in_the_order_of_their_names(tmp_path):
    for number, (kind, name) in enumerate((("dog", "b.png"), ("cat", "z.png"), ("dog", "a.png"), ("cat", "x/y.png"))):
        save(tmp_path / kind / name, picture(number, 20, 20))
    (tmp_path / "cat" / "notes.txt").write_text("no picture")
    (tmp_path / ".hidden").mkdir()
    images, labels = read_folder(tmp_path, 20, 20)
    assert labels.tolist() == [0, 0, 1, 1]
    for found, seed in zip(images, (3, 1, 2, 0), strict=True):
        np.testing.assert_array_equal(found, picture(seed, 20, 20))


def test_folders_of_digits_are_the_numbers_themselves(tmp_path):
    for kind in ("7", "010", "0"):
        save(tmp_path / kind / "a.png", picture(int(kind), 8, 8))
    images, labels = read_folder(tmp_path, 8, 8)
    assert labels.tolist() == [0, 10, 7]
    np.testing.assert_array_equal(images[2], picture(7, 8, 8))


@pytest.mark.parametrize("fit", ["crop", "stretch", "letterbox"])
def test_a_picture_is_resized_as_a_device_does_it(tmp_path, fit):
    wide, large = picture(1, 60, 100), picture(2, 700, 900)
    save(tmp_path / "a.png", wide)
    save(tmp_path / "b.png", large)
    images, labels = read_folder(tmp_path, 32, 40, fit=fit)
    look = Preprocess(32, 40, std=(1.0,), fit=fit, layout="nhwc")
    assert labels is None and images.shape == (2, 32, 40, 3)
    assert np.abs(images[0] - look(wide[None])[0]).max() <= 0.5
    assert np.abs(images[1] - look(large[None])[0]).max() < 2.5  # averaged first, 4 pixels to one and more


def test_every_format_and_mode_gives_the_same_colours(tmp_path):
    array = picture(3, 24, 24)
    image = Image.fromarray(array)
    for name, options in (("a.png", {}), ("b.bmp", {}), ("c.webp", {"lossless": True}), ("d.tif", {}), ("e.ppm", {}),
                          ("f.jpg", {"quality": 97, "subsampling": 0}), ("g.gif", {})):  # fmt: skip
        image.save(tmp_path / name, **options)
    image.convert("RGBA").save(tmp_path / "h.png")
    image.convert("CMYK").save(tmp_path / "i.jpg", quality=97)
    images, _ = read_folder(tmp_path, 24, 24)
    for found, most in zip(images, (0, 0, 0, 0, 0, 12, 60, 0, 25), strict=True):
        assert np.abs(found.astype(int) - array).max() <= most


def test_gray_of_sixteen_bits_keeps_its_high_ones(tmp_path):
    deep = (np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16).astype(np.uint16)
    for name in ("a.png", "b.png"):
        Image.fromarray(deep).save(tmp_path / name)
    images, _ = read_folder(tmp_path, 64, 64)
    np.testing.assert_array_equal(images[0], np.repeat((deep >> 8).astype(np.uint8)[..., None], 3, axis=2))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_its_camera_says(tmp_path, orientation):
    upright = picture(4, 40, 24)
    turned = [None, upright, upright[:, ::-1], upright[::-1, ::-1], upright[::-1], upright.swapaxes(0, 1),
              upright.swapaxes(0, 1)[:, ::-1], upright.swapaxes(0, 1)[::-1, ::-1],
              upright.swapaxes(0, 1)[::-1]]  # fmt: skip
    # What a camera stores is what its orientation takes to the upright picture
    undone = {1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("a.jpg", "b.jpg"):
        save(tmp_path / name, np.ascontiguousarray(turned[undone]), quality=97, subsampling=0, exif=exif)
    images, _ = read_folder(tmp_path, 40, 24)
    assert np.abs(images[0].astype(int) - upright).max() < 15


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(side: int) -> bytes:
    """A PNG of some hundred bytes that says it has side x side pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def test_broken_pictures_are_named_all_at_once(tmp_path):
    good = save(tmp_path / "x" / "good.png", picture(0, 30, 30)).read_bytes()
    stream = io.BytesIO()
    Image.fromarray(picture(0, 30, 30)).save(stream, "JPEG")
    for name, data in (("cut.png", good[:200]), ("cut.jpg", stream.getvalue()[:300]), ("empty.png", b""),
                       ("bomb.png", bomb(60_000)), ("text.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n" * 9)):  # fmt: skip
        (tmp_path / "x" / name).write_bytes(data)
    with pytest.raises(SourceError) as caught:
        read_folder(tmp_path, 16, 16)
    for name in ("cut.png", "cut.jpg", "empty.png", "bomb.png", "text.jpg"):
        assert f"x/{name} (" in caught.value.why
    assert "good.png" not in caught.value.why and "bomb.png (over 67,108,864 pixels)" in caught.value.why
    (tmp_path / "x" / "bomb.png").write_bytes(bomb(9_000))  # which Pillow would only warn of
    with pytest.raises(SourceError, match="bomb.png .over 67,108,864 pixels"):
        read_folder(tmp_path, 16, 16)
    for number in range(6):
        (tmp_path / "x" / f"more{number}.png").write_bytes(b"?")
    with pytest.raises(SourceError, match="and 6 more"):
        read_folder(tmp_path, 16, 16)


def test_damage_anywhere_is_refused_or_read(tmp_path):
    rng = np.random.default_rng(0)
    save(tmp_path / "a.png", picture(0, 16, 16))
    for suffix, options in (("jpg", {}), ("png", {}), ("gif", {}), ("tif", {"compression": "tiff_lzw"}), ("webp", {})):
        path = save(tmp_path / f"b.{suffix}", picture(1, 40, 40), **options)
        good = path.read_bytes()
        for _ in range(25):
            damaged = bytearray(good)
            for _ in range(4):
                damaged[rng.integers(0, len(damaged))] = rng.integers(0, 256)
            path.write_bytes(damaged[: rng.integers(1, len(damaged) + 1)])
            try:
                assert read_folder(tmp_path, 16, 16)[0].shape == (2, 16, 16, 3)
            except SourceError as error:
                assert path.name in error.why
        path.unlink()


def test_what_is_no_data_is_refused(tmp_path, monkeypatch):
    with pytest.raises(SourceError, match="0 pictures"):
        read_folder(tmp_path, 8, 8)
    with pytest.raises(SourceError, match="cannot be read"):
        read_folder(tmp_path / "nothing", 8, 8)
    save(tmp_path / "cat" / "a.png", picture(0, 8, 8))
    save(tmp_path / "b.png", picture(0, 8, 8))
    with pytest.raises(SourceError, match="b.png lies beside the folder cat"):
        read_folder(tmp_path, 8, 8)
    (tmp_path / "b.png").unlink()
    save(tmp_path / "cat" / "b.png", picture(0, 8, 8))
    monkeypatch.setattr(pictures, "MOST_BYTES", 300)
    with pytest.raises(SourceError, match="2 pictures; from 2 to 1 "):
        read_folder(tmp_path, 8, 8)


def test_without_pillow_it_says_what_to_install(tmp_path):
    save(tmp_path / "a.png", picture(0, 8, 8))
    code = f"""
import sys
sys.modules["PIL"] = None
from shoal.converters.split.pictures import read_folder
from shoal.runtime.errors import UsageError
try: read_folder({str(tmp_path)!r}, 8, 8)
except UsageError as error: print(error.fix)
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'shoal[train]'" in done.stdout


@pytest.fixture(scope="module")
def network(teacher) -> bytes:
    """The small teacher, of pictures of 16 x 16."""
    whole = torch.nn.Sequential(teacher.head, teacher.tail)
    return export(whole, torch.zeros(2, 3, 16, 16), inputs=("image",), outputs=("logits",))


def test_the_size_is_the_network_s_or_the_recipe_s(network, tmp_path):
    for name in ("a.png", "b.png"):
        save(tmp_path / name, picture(1, 50, 30))
    taken = onnx.network(network)
    assert read(tmp_path, taken)[0].shape == (2, 16, 16, 3)
    assert read(tmp_path, taken, SplitRecipe(size=24, fit="stretch"))[0].shape == (2, 24, 24, 3)
    with pytest.raises(UsageError, match="size = 224"):
        read(tmp_path)


def test_the_verb_learns_from_a_folder(network, tmp_path, capsys):
    (tmp_path / "toy.onnx").write_bytes(network)
    classes = 0
    for number in range(60):
        classes = max(classes, number % 4)
        save(tmp_path / "data" / str(number % 4) / f"{number}.jpg", picture(number % 4, 24, 30))
    (tmp_path / "r.toml").write_text("[split]\nlatent = 4\nepochs = 1\ntail_epochs = 1\n")
    words = ["convert", str(tmp_path / "toy.onnx"), "--recipe", str(tmp_path / "r.toml"), "--out", str(tmp_path)]
    assert main([*words, "--data", str(tmp_path / "data"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert Path(said["device"]).exists() and len(said["modes"]) == 1
    (tmp_path / "data" / "3").rename(tmp_path / "data" / "300")
    assert main([*words, "--data", str(tmp_path / "data"), "--json"]) == 2
    assert "from 0 to 300" in capsys.readouterr().err
