"""A real network that reads a line of print, cut in two, and a photographed page to read.

PP-OCRv4's recogniser from a package, in ONNX: the convolutions are for the device, the transformer and what chooses the
letters for the edge. Between them goes a latent of 480 x 1 x T numbers, a byte each.
"""

import struct
import zlib
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper, utils

from shoal.converters.split.tail import pack, pack_tail

CUT, LETTERS = "p2o.AveragePool.1", "softmax_11.tmp_0"  # names of values in the network
STEP, ZERO = 0.125, 11  # of a byte of the latent, which is (value / STEP) + ZERO
HEIGHT, WIDTH = 48, 768  # of what the network sees
TOPS, TALL = (8, 45, 61, 77, 95, 167), 22  # of the lines on the page


def cut_in_two(path: Path, device: Path, edge: Path) -> list[str]:
    """Writes the device's bundle, which has both halves so that it can go on alone, and the edge's; the letters."""
    model = onnx.shape_inference.infer_shapes(onnx.load(path))
    cutter = utils.Extractor(model)
    scale = [numpy_helper.from_array(np.float32(STEP), "step"), numpy_helper.from_array(np.uint8(ZERO), "zero")]
    latent = helper.make_tensor_value_info("latent", TensorProto.UINT8, ["n", 480, 1, "t"])

    head = cutter.extract_model(["x"], [CUT])
    head.graph.node.append(helper.make_node("QuantizeLinear", [CUT, "step", "zero"], ["latent"]))
    head.graph.initializer.extend(scale)
    head.graph.output[0].CopyFrom(latent)

    tail = cutter.extract_model([CUT], [LETTERS])
    tail.graph.node.insert(0, helper.make_node("DequantizeLinear", ["latent", "step", "zero"], [CUT]))
    tail.graph.node.append(helper.make_node("ArgMax", [LETTERS], ["letters"], axis=2, keepdims=0))
    tail.graph.initializer.extend(scale)
    tail.graph.input[0].CopyFrom(latent)
    tail.graph.output[0].CopyFrom(helper.make_tensor_value_info("letters", TensorProto.INT64, ["n", "t"]))

    halves = {"head": head.SerializeToString(), "tail": tail.SerializeToString()}
    pack(halves, device, "reader", overwrite=True)
    pack_tail(halves["tail"], edge, "reader", overwrite=True)
    known = next(entry.value for entry in model.metadata_props if entry.key == "character")
    return ["", *known.splitlines(), " "]


def frames(page: Path) -> list[np.ndarray]:
    """Lines of the page as the network takes them: fp32 [1, 3, HEIGHT, WIDTH] from -1 to 1."""
    image = read_png(page)
    return [
        np.repeat(_resized(image[top : top + TALL], HEIGHT, WIDTH)[None, None] / np.float32(127.5) - 1, 3, axis=1)
        for top in TOPS
    ]


def text(letters: np.ndarray, known: list[str]) -> str:
    """What the numbers of the letters [T] spell: repeated ones count once, 0 is none."""
    return "".join(known[one] for one, before in zip(letters, [0, *letters], strict=False) if one and one != before)


def read_png(path: Path) -> np.ndarray:
    """A gray PNG of 8 bits, uint8 [height, width] (the W3C's specification, section 9)."""
    data, at, packed = path.read_bytes(), 8, b""
    width, height = struct.unpack_from(">II", data, 16)
    while at < len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        packed += data[at + 8 : at + 8 + length] if kind == b"IDAT" else b""
        at += length + 12
    rows = np.frombuffer(zlib.decompress(packed), np.uint8).reshape(height, width + 1)
    image = np.zeros((height + 1, width + 1), int)  # a row of zeros above, a column of them before
    for y, (how, *row) in enumerate(rows.tolist(), 1):
        for x, value in enumerate(row, 1):
            before, above, corner = (int(image[y - dy, x - dx]) for dy, dx in ((0, 1), (1, 0), (1, 1)))
            nearest = min((before, above, corner), key=lambda one: abs(before + above - corner - one))  # noqa: B023
            image[y, x] = (value + (0, before, above, (before + above) // 2, nearest)[how]) & 255
    return image[1:, 1:].astype(np.uint8)


def _resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear, fp32."""
    for length in (height, width):  # each time along the first axis
        at = np.clip((np.arange(length) + 0.5) * len(image) / length - 0.5, 0, len(image) - 1)
        low = np.minimum(at.astype(int), len(image) - 2)
        part = (at - low).astype(np.float32)[:, None]
        image = (image[low] * (1 - part) + image[low + 1] * part).T
    return image.astype(np.float32)
