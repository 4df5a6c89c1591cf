"""Pictures as a network takes them: resized, normalised, laid out. It knows nothing about files of pictures.

A resized pixel is the mean of those around it, weighted by a triangle that reaches one pixel in every direction, or as
far as one pixel of the result where that is smaller (bilinear with antialias): what Pillow's BILINEAR and torch's
interpolate(antialias=True) compute, here in fp32 and without rounding between.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np

from ..errors import BundleError, UsageError

FITS, CHANNELS, LAYOUTS = ("stretch", "crop", "letterbox"), ("rgb", "bgr"), ("nchw", "nhwc")
_LONGEST = 1 << 14  # of a side that a bundle asks for


@dataclass(frozen=True)
class Preprocess:
    """What a network sees of a picture.

    `height` and `width` of its input. `fit`: "stretch" takes the whole picture without its proportions; "crop" scales
    the picture until it covers the input divided by `share`, and takes the middle; "letterbox" scales it until it fits
    and fills the rest, right and below, with `fill`. Of every number from 0 to 255, (x - mean) / std, each one number
    or three; `channels` and `layout` are those of the input. Fields are what goes into JSON (`dataclasses.asdict`).
    """

    height: int
    width: int
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (255.0,)
    fit: str = "stretch"
    share: float = 1.0
    fill: float = 114.0
    channels: str = "rgb"
    layout: str = "nchw"

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", tuple(map(float, self.mean)))
        object.__setattr__(self, "std", tuple(map(float, self.std)))
        numbers = (*self.mean, *self.std, self.share, self.fill)
        right = (
            all(isinstance(n, int) and 1 <= n <= _LONGEST for n in (self.height, self.width))
            and len(self.mean) in (1, 3) and len(self.std) in (1, 3) and all(map(math.isfinite, numbers))
            and all(one > 0 for one in self.std) and 0.1 <= self.share <= 1
            and self.fit in FITS and self.channels in CHANNELS and self.layout in LAYOUTS
        )  # fmt: skip
        if not right:
            why = f"{self} has a value that is not allowed."
            raise UsageError("The preprocessing cannot be used.", why, "See the fields of Preprocess.")

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> Self:
        """From JSON. Raises BundleError for what is not one."""
        try:
            known = {field.name: said[field.name] for field in fields(cls) if field.name in said}
            return cls(**known)
        except (UsageError, TypeError, ValueError, AttributeError) as error:
            why = f"{error.why if isinstance(error, UsageError) else error}"
            fix = "Copy or convert the bundle again."
            raise BundleError("The bundle's preprocessing is not one.", why, fix) from None

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """uint8 RGB [n, h, w, 3] of one size to fp32 [n, 3, height, width] ("nchw") or [n, height, width, 3]."""
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape:
            why = f"They are {images.dtype} {list(images.shape)}."
            raise UsageError("The pictures cannot be used.", why, "Give uint8 RGB [n, height, width, 3].")
        scale_y, scale_x, top, left = self._placed(*images.shape[1:3])
        made = np.full((len(images), self.height, self.width, 3), self.fill, np.float32)
        tall, wide = (max(1, round(n * s)) for n, s in zip(images.shape[1:3], (scale_y, scale_x), strict=True))
        for image, out in zip(images, made, strict=True):
            small = resize(image, tall, wide)[max(0, -top) :, max(0, -left) :][: self.height, : self.width]
            out[: small.shape[0], : small.shape[1]] = small
        made -= np.array(self.mean, np.float32)
        made /= np.array(self.std, np.float32)
        if self.channels == "bgr":
            made = made[..., ::-1]
        return np.ascontiguousarray(made.transpose(0, 3, 1, 2) if self.layout == "nchw" else made)

    def back(self, boxes: np.ndarray, height: int, width: int) -> np.ndarray:
        """Boxes [k, 4] (x, y, x, y) in pixels of the input as boxes in a picture of `height` by `width`, cut off at its
        edges."""
        scale_y, scale_x, top, left = self._placed(height, width)
        moved = (np.asarray(boxes, np.float32) - (left, top, left, top)) / (scale_x, scale_y, scale_x, scale_y)
        return moved.clip(0, (width, height, width, height)).astype(np.float32)

    def _placed(self, height: int, width: int) -> tuple[float, float, int, int]:
        """How a picture is scaled, and where its corner then is in the input."""
        tall, wide = self.height / height, self.width / width
        if self.fit == "stretch":
            return tall, wide, 0, 0
        scale = max(tall, wide) / self.share if self.fit == "crop" else min(tall, wide)
        sides = [(max(1, round(n * scale)), n, to) for n, to in ((height, self.height), (width, self.width))]
        (scale_y, top), (scale_x, left) = ((to / n, min(0, round((room - to) / 2))) for to, n, room in sides)
        return scale_y, scale_x, top, left


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """[h, w, c] of any numbers, as fp32 [height, width, c]."""
    made = np.asarray(image, np.float32)
    if made.shape[0] != height:
        made = (_weights(made.shape[0], height) @ made.reshape(made.shape[0], -1)).reshape(height, *made.shape[1:])
    return made if made.shape[1] == width else _weights(made.shape[1], width) @ made


@functools.lru_cache(maxsize=16)
def _weights(before: int, after: int) -> np.ndarray:
    """fp32 [after, before]: what each pixel of a row gets of those that were there."""
    scale = before / after
    reach = max(scale, 1.0)
    middle = (np.arange(after)[:, None] + 0.5) * scale
    at = np.arange(before)[None, :] + 0.5
    weights = np.maximum(0.0, 1.0 - np.abs(at - middle) / reach)
    made = (weights / weights.sum(1, keepdims=True)).astype(np.float32)
    made.setflags(write=False)
    return made


def normalised(mean: Sequence[float], std: Sequence[float]) -> dict[str, tuple[float, ...]]:
    """`mean` and `std` for numbers from 0 to 1, as torch's models state them, as those for 0 to 255."""
    return {"mean": tuple(255.0 * one for one in mean), "std": tuple(255.0 * one for one in std)}
