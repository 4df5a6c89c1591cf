"""Folders of pictures as data to learn from: subfolders are classes, or pictures lie side by side and have no labels.

    FOLDER/cat/1.jpg, FOLDER/dog/7.png      labels 0 and 1: folders in the order of their names, of digits the numbers
    FOLDER/1.jpg, FOLDER/2.jpg              no labels

A picture is untrusted: what its header says is looked at before its pixels are decoded, only formats of pictures are
tried, and one at a time is in memory beside those that are made. One that is broken or too large is named. It is turned
as its EXIF orientation says, and resized as runtime/vision/preprocess.py does. Needs Pillow, imported when a folder is
read.
"""

import os
import warnings
from pathlib import Path
from types import ModuleType

import numpy as np

from shoal.runtime.errors import ShoalError, SourceError, UsageError
from shoal.runtime.events import Event, Progress, silent
from shoal.runtime.vision.preprocess import Preprocess

FORMATS = {"JPEG": (".jpg", ".jpeg"), "PNG": (".png",), "WEBP": (".webp",), "BMP": (".bmp",), "GIF": (".gif",),
           "TIFF": (".tif", ".tiff"), "PPM": (".ppm", ".pgm")}  # fmt: skip
MOST_PIXELS = 64 << 20  # of one picture, before it is decoded
MOST_BYTES = 4 << 30  # of all of them as they are made
_SUFFIXES = frozenset(suffix for suffixes in FORMATS.values() for suffix in suffixes)
_AHEAD = 4  # times the wanted size to which a larger picture is first averaged, in whole steps
_NAMED = 5


def read_folder(
    folder: str | os.PathLike, height: int, width: int, *, fit: str = "crop", progress: Progress = silent
) -> tuple[np.ndarray, np.ndarray | None]:
    """(images uint8 RGB [n, height, width, 3], labels int64 [n] or None), in the order of classes and names. `fit` is
    Preprocess's. Files that are no pictures by their names are left out. Progress has the stage "pictures". Raises
    UsageError without Pillow, SourceError with the names of pictures that cannot be read."""
    image = _pillow()
    paths, labels = _found(Path(folder))
    if len(paths) < 2 or len(paths) * height * width * 3 > MOST_BYTES:
        most = MOST_BYTES // (height * width * 3)
        why = f"It has {len(paths):,} pictures; from 2 to {most:,} can be used at {width} x {height} pixels."
        raise SourceError(f"The data {folder} cannot be used.", why, "Give so many .jpg, .png or .webp files.")
    look = Preprocess(height, width, std=(1.0,), fit=fit, layout="nhwc")
    images = np.empty((len(paths), height, width, 3), np.uint8)
    broken: list[str] = []
    for at, path in enumerate(paths):
        progress(Event("pictures", at, len(paths), path.name, "pictures"))
        try:
            made = look(_decoded(image, path, _AHEAD * max(height, width))[None])[0]
            images[at] = np.rint(made).clip(0, 255)
        except Exception as error:  # of whatever a decoder finds in a damaged file
            broken.append(f"{path.relative_to(folder)} ({_why(error)})")
    progress(Event("pictures", len(paths), len(paths), "", "pictures"))
    if broken:
        more = f" and {len(broken) - _NAMED:,} more" if len(broken) > _NAMED else ""
        why = f"{', '.join(broken[:_NAMED])}{more}."
        raise SourceError(f"Pictures of {folder} cannot be read.", why, "Mend or remove them.")
    return images, labels


def _found(folder: Path) -> tuple[list[Path], np.ndarray | None]:
    """The pictures' paths, and the classes that their folders are."""
    try:
        inner = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        flat = sorted(entry for entry in folder.iterdir() if _is_picture(entry))
        if not inner:
            return flat, None
        if flat:
            why = f"{flat[0].name} lies beside the folder {inner[0].name}."
            raise SourceError(f"The data {folder} cannot be used.", why, "Put every picture into its class's folder.")
        numbered = all(entry.name.isascii() and entry.name.isdigit() and len(entry.name) < 10 for entry in inner)
        paths, labels = list[Path](), list[int]()
        for place, entry in enumerate(inner):
            mine = sorted(Path(at, name) for at, _, names in os.walk(entry) for name in names)
            mine = [path for path in mine if _is_picture(path)]
            paths += mine
            labels += [int(entry.name) if numbered else place] * len(mine)
    except OSError as error:
        raise SourceError(f"The data {folder} cannot be read.", f"{error.strerror}.", "Check the path.") from None
    return paths, np.array(labels, np.int64)


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in _SUFFIXES and not path.name.startswith(".") and path.is_file()


def _decoded(image: ModuleType, path: Path, enough: int) -> np.ndarray:
    """uint8 RGB [h, w, 3], the right way up; of a picture that is much larger than `enough` an average of whole blocks
    of its pixels."""
    from PIL import ImageOps

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sizes, which are judged below, and of tags
        with image.open(path, formats=tuple(FORMATS)) as opened:
            if opened.width * opened.height > MOST_PIXELS:
                raise _refused(f"over {MOST_PIXELS:,} pixels")
            if opened.mode.startswith(("I", "F")):
                if not opened.mode.startswith("I;16"):
                    raise _refused(f"numbers of the mode {opened.mode}")
                deep = np.asarray(opened)
                opened = image.fromarray((deep.astype(np.uint32) >> 8).astype(np.uint8))
            picture = ImageOps.exif_transpose(opened).convert("RGB")
    step = min(picture.width, picture.height) // enough
    return np.asarray(picture.reduce(step) if step > 1 else picture)


def _why(error: Exception) -> str:
    """What a picture's failure is called, without Pillow's path of the file."""
    if isinstance(error, ShoalError):
        return error.why
    known = {"UnidentifiedImageError": "no picture", "DecompressionBombError": f"over {MOST_PIXELS:,} pixels"}
    return known.get(type(error).__name__, " ".join(str(error).split())[:100] or type(error).__name__)


def _pillow() -> ModuleType:
    try:
        from PIL import Image
    except ImportError:
        why = "Pillow, which decodes them, is not installed."
        fix = "Run pip install 'shoal[train]', or give an .npz file of images."
        raise UsageError("A folder of pictures cannot be read.", why, fix) from None
    return Image


def _refused(why: str) -> SourceError:
    return SourceError("A picture cannot be used.", why, "Remove it.")
