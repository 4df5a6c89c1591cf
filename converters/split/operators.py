"""ONNX operators in torch, as the standard defines them for opsets 9 to 21: layers, norms, pools, resizing.

Each is a function of what the node says (`At`) and of its inputs, of which one left out is None; gradients flow through
all of them. What ONNX Runtime does is the reference, and the tests hold them to it. Operators that only move or compare
numbers are in operators_plain.py.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shoal.runtime.errors import ConvertError

Axis = tuple[Tensor, Tensor]
OPERATORS: dict[str, Callable[..., Any]] = {}


@dataclass
class At:
    """What a node says: its attributes, of which opset, how many outputs it has and whether anything reads one of them
    but the first; `training` as of its module."""

    node: str
    attributes: Mapping[str, Any]
    opset: int
    outputs: int = 1
    further: bool = False
    training: bool = False

    def __call__(self, name: str, default: Any = None) -> Any:
        return self.attributes.get(name, default)

    def refuse(self, why: str) -> ConvertError:
        return ConvertError(f"The {self.node} cannot be trained.", why, "Export the network without it, or cut behind.")


def operator(*names: str) -> Callable[[Callable], Callable]:
    """Makes a function known as the operators of these names."""

    def known(function: Callable) -> Callable:
        OPERATORS.update(dict.fromkeys(names, function))
        return function

    return known


def listed(x: Tensor | None) -> list | None:
    """A tensor of lengths, axes or scales as Python numbers."""
    return None if x is None else x.reshape(-1).tolist()


def _around(at: At, x: Tensor, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> list[int]:
    """The padding: what comes before each axis, then what comes behind each."""
    auto, n = at("auto_pad", "NOTSET"), len(kernel)
    if auto in ("NOTSET", ""):
        return list(at("pads", [0] * 2 * n))
    if auto == "VALID":
        return [0] * 2 * n
    before, behind = [], []
    for size, k, s, d in zip(x.shape[2:], kernel, strides, dilations, strict=True):
        whole = max((math.ceil(size / s) - 1) * s + (k - 1) * d + 1 - size, 0)
        small, large = whole // 2, whole - whole // 2
        before.append(small if auto == "SAME_UPPER" else large)
        behind.append(large if auto == "SAME_UPPER" else small)
    return before + behind


def padded(x: Tensor, pads: Sequence[int], value: float = 0.0) -> Tensor:
    """`x` with the last axes padded; `pads` as ONNX has them, all befores and then all behinds. Negative ones crop."""
    n = len(pads) // 2
    return F.pad(x, [pads[i + side] for i in reversed(range(n)) for side in (0, n)], value=value) if any(pads) else x


@operator("Conv")
def _conv(at, x, weight, bias=None):
    n = weight.ndim - 2
    strides, dilations = at("strides", [1] * n), at("dilations", [1] * n)
    pads = _around(at, x, weight.shape[2:], strides, dilations)
    if pads[:n] != pads[n:]:
        x, pads = padded(x, pads), [0] * n
    convolve = (F.conv1d, F.conv2d, F.conv3d)[n - 1]
    return convolve(x, weight, bias, strides, pads[:n], dilations, at("group", 1))


@operator("ConvTranspose")
def _conv_transpose(at, x, weight, bias=None):
    n = weight.ndim - 2
    strides, dilations = at("strides", [1] * n), at("dilations", [1] * n)
    extra = at("output_padding", [0] * n)
    sizes = [(size - 1) * s + (k - 1) * d + 1 + e for size, s, k, d, e in
             zip(x.shape[2:], strides, weight.shape[2:], dilations, extra, strict=True)]  # fmt: skip
    auto, pads = at("auto_pad", "NOTSET"), at("pads", [0] * 2 * n)
    wanted = at("output_shape") or ([size * s for size, s in zip(x.shape[2:], strides, strict=True)]
                                    if auto.startswith("SAME") else None)  # fmt: skip
    if wanted:
        whole = [size - want for size, want in zip(sizes, wanted[-n:], strict=True)]
        small, large = [one // 2 for one in whole], [one - one // 2 for one in whole]
        pads = small + large if auto == "SAME_UPPER" else large + small
    convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[n - 1]
    # torch wants an output padding below the stride, so it is appended here, where the bias comes afterwards
    y = convolve(x, weight, None, strides, 0, 0, at("group", 1), dilations)
    y = padded(y, [-one for one in pads[:n]] + [e - one for one, e in zip(pads[n:], extra, strict=True)])
    return y if bias is None else y + bias.reshape(-1, *[1] * n)


def _window(at: At, x: Tensor) -> tuple[list[int], list[int], list[int], list[int], list[int]]:
    """Of a pool: kernel, strides, dilations, the padding, and how far the last window hangs over behind each axis."""
    kernel = list(at("kernel_shape"))
    n = len(kernel)
    strides, dilations = list(at("strides", [1] * n)), list(at("dilations", [1] * n))
    pads, over = _around(at, x, kernel, strides, dilations), [0] * n
    for i in range(n) if at("ceil_mode", 0) else ():
        span, length = (kernel[i] - 1) * dilations[i] + 1, x.shape[2 + i] + pads[i] + pads[n + i]
        windows = math.ceil((length - span) / strides[i]) + 1
        if (windows - 1) * strides[i] >= x.shape[2 + i] + pads[i]:  # it would begin in the padding
            windows -= 1
        over[i] = max((windows - 1) * strides[i] + span - length, 0)
    return kernel, strides, dilations, pads, over


@operator("MaxPool")
def _max_pool(at, x):
    if at.further:
        raise at.refuse("Its second output, where the largest ones were, is not known here.")
    kernel, strides, dilations, pads, over = _window(at, x)
    n = len(kernel)
    x = padded(x, pads[:n] + [pad + more for pad, more in zip(pads[n:], over, strict=True)], -math.inf)
    return (F.max_pool1d, F.max_pool2d, F.max_pool3d)[n - 1](x, kernel, strides, 0, dilations)


@operator("AveragePool")
def _average_pool(at, x):
    kernel, strides, dilations, pads, over = _window(at, x)
    n = len(kernel)
    if any(d != 1 for d in dilations):
        raise at.refuse("It is dilated.")
    pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[n - 1]
    if not any(pads) and not any(over):
        return pool(x, kernel, strides)
    beyond = [0] * n + over
    counted = torch.ones_like(x[:1, :1])
    counted = padded(padded(counted, pads, 1.0 if at("count_include_pad", 0) else 0.0), beyond)
    return pool(padded(padded(x, pads), beyond), kernel, strides) / pool(counted, kernel, strides)


@operator("GlobalAveragePool")
def _global_average_pool(at, x):
    return x.mean(tuple(range(2, x.ndim)), keepdim=True)


@operator("GlobalMaxPool")
def _global_max_pool(at, x):
    return x.amax(tuple(range(2, x.ndim)), keepdim=True)


@operator("BatchNormalization")
def _batch_norm(at, x, scale, shift, mean, variance):
    return F.batch_norm(x, mean, variance, scale, shift, at.training, 1 - at("momentum", 0.9), at("epsilon", 1e-5))


@operator("InstanceNormalization")
def _instance_norm(at, x, scale, shift):
    return F.instance_norm(x, None, None, scale, shift, True, 0.0, at("epsilon", 1e-5))


@operator("GroupNormalization")
def _group_norm(at, x, scale, shift):
    groups = at("num_groups")
    if at.opset < 21:  # a scale for each group
        scale, shift = (one.repeat_interleave(x.shape[1] // groups) for one in (scale, shift))
    return F.group_norm(x, groups, scale, shift, at("epsilon", 1e-5))


@operator("LayerNormalization")
def _layer_norm(at, x, scale, shift=None):
    if at.further:
        raise at.refuse("Its second output, the mean, is not known here.")
    axis = at("axis", -1) % x.ndim
    shape = x.shape[axis:]
    return F.layer_norm(x, shape, scale.expand(shape), None if shift is None else shift.expand(shape),
                        at("epsilon", 1e-5))  # fmt: skip


@operator("LRN")
def _local_response_norm(at, x):
    size = at("size")
    squares = F.pad(x.square().unsqueeze(1), [0] * 2 * (x.ndim - 2) + [(size - 1) // 2, size // 2])
    total = squares.unfold(2, size, 1).sum(-1).squeeze(1)
    return x / (at("bias", 1.0) + at("alpha", 1e-4) / size * total) ** at("beta", 0.75)


@operator("LpNormalization")
def _lp_norm(at, x):
    return x / x.norm(at("p", 2), at("axis", -1), keepdim=True)


@operator("Gemm")
def _gemm(at, a, b, c=None):
    y = at("alpha", 1.0) * ((a.t() if at("transA", 0) else a) @ (b.t() if at("transB", 0) else b))
    return y if c is None else y + at("beta", 1.0) * c


@operator("Softmax", "LogSoftmax")
def _softmax(at, x, how=None):
    axis = at("axis", -1 if at.opset >= 13 else 1)
    flat = x if at.opset >= 13 else x.flatten(axis % x.ndim)  # all from the axis on together
    function = F.log_softmax if at.node.startswith("Log") else F.softmax
    return function(flat, axis if at.opset >= 13 else -1).reshape(x.shape)


@operator("Dropout")
def _dropout(at, x, ratio=None, training=None):
    share = at("ratio", 0.5) if ratio is None else float(ratio)
    return F.dropout(x, share, at.training)


@operator("Upsample")
def _upsample(at, x, scales=None):
    factors = at("scales") if scales is None else listed(scales)
    mode = at("mode", "nearest")
    return _resized(x, factors, None, range(x.ndim), mode, "asymmetric", "floor", 0.0, 0)


@operator("Resize")
def _resize(at, x, roi=None, scales=None, sizes=None):
    if at.opset < 11:  # its second input is the scales, and it samples as Upsample does
        return _upsample(at, x, roi)
    axes = [axis % x.ndim for axis in at("axes", range(x.ndim))]
    mode, transform = at("mode", "nearest"), at("coordinate_transformation_mode", "half_pixel")
    for name, default in (("antialias", 0), ("keep_aspect_ratio_policy", "stretch")):
        if at(name, default) != default:
            raise at.refuse(f"Its {name} is {at(name)}.")
    if transform == "tf_crop_and_resize":
        raise at.refuse("It crops (tf_crop_and_resize).")
    factors = listed(scales) if scales is not None and scales.numel() else None
    return _resized(x, factors, listed(sizes), axes, mode, transform, at("nearest_mode", "round_prefer_floor"),
                    at("cubic_coeff_a", -0.75), at("exclude_outside", 0))  # fmt: skip


def _resized(x, factors, sizes, axes, mode, transform, nearest, a, outside):
    for i, axis in enumerate(axes):
        before = x.shape[axis]
        after = int(sizes[i]) if sizes else math.floor(before * factors[i])
        factor = after / before if sizes else factors[i]
        if after == before and factor == 1:
            continue
        to = torch.arange(after, dtype=torch.float32, device=x.device)
        if transform == "align_corners":
            at = to * ((before - 1) / (after - 1)) if after > 1 else to * 0
        elif transform == "asymmetric":
            at = to / factor
        elif transform == "pytorch_half_pixel" and after == 1:
            at = to * 0
        else:
            at = (to + 0.5) / factor - 0.5
            if transform == "half_pixel_symmetric":
                at = at + before / 2 * (1 - after / (factor * before))
        x = _sampled(x, axis, at, mode, nearest, a, outside)
    return x


def _sampled(x: Tensor, axis: int, at: Tensor, mode: str, nearest: str, a: float, outside: int) -> Tensor:
    """`x` along an axis where `at` says: the nearest number, or a sum of the 2 or 4 around it."""
    last = x.shape[axis] - 1
    if mode == "nearest":
        picked = {"floor": at.floor(), "ceil": at.ceil(), "round_prefer_ceil": (at + 0.5).floor()}
        return x.index_select(axis, picked.get(nearest, (at - 0.5).ceil()).clamp(0, last).long())
    low = at.floor()
    t = at - low
    if mode == "linear":
        taps = [(low, 1 - t), (low + 1, t)]
    else:
        far, near = (lambda d: ((a * d - 5 * a) * d + 8 * a) * d - 4 * a), (lambda d: ((a + 2) * d - a - 3) * d * d + 1)
        taps = [(low - 1, far(t + 1)), (low, near(t)), (low + 1, near(1 - t)), (low + 2, far(2 - t))]
        if outside:
            taps = [(where, weight * ((where >= 0) & (where <= last))) for where, weight in taps]
            total = sum(weight for _, weight in taps)
            taps = [(where, weight / total) for where, weight in taps]
    form = [-1 if i == axis else 1 for i in range(x.ndim)]
    return sum(x.index_select(axis, where.clamp(0, last).long()) * weight.reshape(form) for where, weight in taps)
