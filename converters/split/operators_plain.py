"""ONNX operators in torch that compute number by number, reduce, compare or move numbers (see operators.py).

Lengths and axes stay on the CPU: they are computed from shapes, and a device would be waited for.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .operators import OPERATORS, listed, operator, padded

_MOST = 1 << 30  # elements of what a node makes from a shape alone
TYPES = {1: torch.float32, 2: torch.uint8, 3: torch.int8, 5: torch.int16, 6: torch.int32, 7: torch.int64,
         9: torch.bool, 10: torch.float16, 11: torch.float64}  # fmt: skip


def _together(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors on one device: small ones that were computed from shapes follow those that hold data."""
    there = next((one.device for one in tensors if one.device.type != "cpu"), None)
    return tensors if there is None else tuple(one.to(there) for one in tensors)


def _pairs(function: Callable) -> Callable:
    return lambda at, a, b: function(*_together(a, b))


def _over(function: Callable) -> Callable:
    """Of any number of inputs, two by two."""

    def reduced(at, first, *others):
        for other in others:
            first = function(*_together(first, other))
        return first

    return reduced


def _divide(a: Tensor, b: Tensor) -> Tensor:
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


OPERATORS |= {
    "Add": _pairs(torch.add), "Sub": _pairs(torch.sub), "Mul": _pairs(torch.mul), "Div": _pairs(_divide),
    "MatMul": _pairs(torch.matmul), "Pow": _pairs(lambda a, b: torch.pow(a, b.to(a.dtype) if b.ndim else b.item())),
    "Equal": _pairs(torch.eq), "Greater": _pairs(torch.gt), "GreaterOrEqual": _pairs(torch.ge),
    "Less": _pairs(torch.lt), "LessOrEqual": _pairs(torch.le), "And": _pairs(torch.logical_and),
    "Or": _pairs(torch.logical_or), "Xor": _pairs(torch.logical_xor), "Not": lambda at, x: torch.logical_not(x),
    "Max": _over(torch.maximum), "Min": _over(torch.minimum), "Sum": _over(torch.add),
    "Mean": lambda at, *x: _over(torch.add)(at, *x) / len(x),
    "PRelu": _pairs(lambda x, slope: torch.where(x < 0, slope * x, x)),
    "Mod": lambda at, a, b: (torch.fmod if at("fmod", 0) else torch.remainder)(*_together(a, b)),
    "Where": lambda at, c, a, b: torch.where(*_together(c, a, b)),
    "Relu": lambda at, x: F.relu(x), "Sigmoid": lambda at, x: torch.sigmoid(x), "Tanh": lambda at, x: torch.tanh(x),
    "HardSigmoid": lambda at, x: (at("alpha", 0.2) * x + at("beta", 0.5)).clamp(0, 1),
    "HardSwish": lambda at, x: x * (x / 6 + 0.5).clamp(0, 1), "Mish": lambda at, x: F.mish(x),
    "LeakyRelu": lambda at, x: F.leaky_relu(x, at("alpha", 0.01)), "Elu": lambda at, x: F.elu(x, at("alpha", 1.0)),
    "Selu": lambda at, x: F.selu(x), "Celu": lambda at, x: F.celu(x, at("alpha", 1.0)),
    "Softplus": lambda at, x: F.softplus(x), "Softsign": lambda at, x: F.softsign(x),
    "Gelu": lambda at, x: F.gelu(x, approximate=at("approximate", "none")),
    "Abs": lambda at, x: x.abs(), "Neg": lambda at, x: -x, "Ceil": lambda at, x: x.ceil(),
    "Floor": lambda at, x: x.floor(), "Round": lambda at, x: x.round(), "Sign": lambda at, x: x.sign(),
    "Reciprocal": lambda at, x: 1 / x, "Exp": lambda at, x: x.exp(), "Log": lambda at, x: x.log(),
    "Sqrt": lambda at, x: x.sqrt(), "Erf": lambda at, x: x.erf(), "Sin": lambda at, x: x.sin(),
    "Cos": lambda at, x: x.cos(), "Identity": lambda at, x: x,
    "Einsum": lambda at, *x: torch.einsum(at("equation"), *x),
    "Transpose": lambda at, x: x.permute(at("perm", list(range(x.ndim))[::-1])),
    "Concat": lambda at, *x: torch.cat(_together(*x), at("axis")),
    "Shape": lambda at, x: torch.tensor(list(x.shape)[slice(at("start", 0), at("end"))], dtype=torch.int64),
    "Size": lambda at, x: torch.tensor(x.numel()),
    "CastLike": lambda at, x, like: x.to(like.dtype),
}  # fmt: skip


@operator("Cast")
def _cast(at, x):
    if at("to") not in TYPES:
        raise at.refuse(f"It makes numbers of ONNX's type {at('to')}.")
    return x.to(TYPES[at("to")])


@operator("Clip")
def _clip(at, x, low=None, high=None):
    low = at("min") if low is None else low.item()
    high = at("max") if high is None else high.item()
    return x if low is None and high is None else x.clamp(low, high)


def _reducer(function: Callable) -> Callable:
    def reduce(at, x, axes=None):
        over = at("axes") if axes is None else listed(axes)
        if not over and at("noop_with_empty_axes", 0):
            return x
        return function(x, [axis % x.ndim for axis in over] if over else list(range(x.ndim)), bool(at("keepdims", 1)))

    return reduce


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted(axes, reverse=True):
        x = x.prod(axis, keep)
    return x


OPERATORS |= {
    "ReduceMean": _reducer(torch.mean), "ReduceSum": _reducer(torch.sum), "ReduceMax": _reducer(torch.amax),
    "ReduceMin": _reducer(torch.amin), "ReduceProd": _reducer(_product),
    "ReduceL1": _reducer(lambda x, axes, keep: x.abs().sum(axes, keep)),
    "ReduceL2": _reducer(lambda x, axes, keep: x.square().sum(axes, keep).sqrt()),
    "ReduceSumSquare": _reducer(lambda x, axes, keep: x.square().sum(axes, keep)),
    "ReduceLogSumExp": _reducer(torch.logsumexp),
}  # fmt: skip


@operator("ArgMax", "ArgMin")
def _arg(at, x):
    axis = at("axis", 0)
    find = torch.argmax if at.node.startswith("ArgMax") else torch.argmin
    if at("select_last_index", 0):
        found = x.shape[axis] - 1 - find(x.flip(axis), axis, True)
    else:
        found = find(x, axis, True)
    return found if at("keepdims", 1) else found.squeeze(axis)


@operator("TopK")
def _top(at, x, k):
    values, where = x.topk(int(k), at("axis", -1), bool(at("largest", 1)))
    return values, where


@operator("CumSum")
def _cumulate(at, x, axis):
    axis = int(axis)
    x = x.flip(axis) if at("reverse", 0) else x
    y = x.cumsum(axis) - x if at("exclusive", 0) else x.cumsum(axis)
    return y.flip(axis) if at("reverse", 0) else y


@operator("Reshape")
def _reshape(at, x, shape):
    wanted = listed(shape)
    if not at("allowzero", 0):
        wanted = [x.shape[i] if length == 0 else length for i, length in enumerate(wanted)]
    return x.reshape(wanted)


@operator("Flatten")
def _flatten(at, x):
    axis = at("axis", 1)
    axis = axis + x.ndim if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), -1)


@operator("Squeeze")
def _squeeze(at, x, axes=None):
    gone = at("axes") if axes is None else listed(axes)
    return x.squeeze(tuple(gone)) if gone else x.squeeze()


@operator("Unsqueeze")
def _unsqueeze(at, x, axes=None):
    new = at("axes") if axes is None else listed(axes)
    for axis in sorted(one % (x.ndim + len(new)) for one in new):
        x = x.unsqueeze(axis)
    return x


@operator("Split")
def _split(at, x, lengths=None):
    axis = at("axis", 0)
    parts = at("split") if lengths is None else listed(lengths)
    if not parts:
        each = -(-x.shape[axis] // at.outputs)
        parts = [min(each, x.shape[axis] - i * each) for i in range(at.outputs)]
    return x.split(parts, axis)


@operator("Slice")
def _slice(at, x, starts=None, ends=None, axes=None, steps=None):
    starts = at("starts") if starts is None else listed(starts)
    ends = at("ends") if ends is None else listed(ends)
    axes = at("axes") if axes is None else listed(axes)
    steps = listed(steps) or [1] * len(starts)
    for axis, start, end, step in zip(axes or range(len(starts)), starts, ends, steps, strict=True):
        where = range(*slice(start, end, step).indices(x.shape[axis]))
        if step > 0:
            x = x[(slice(None),) * (axis % x.ndim) + (slice(where.start, max(where.stop, where.start), step),)]
        else:
            x = x.index_select(axis, torch.tensor(list(where), dtype=torch.int64, device=x.device))
    return x


@operator("Gather")
def _gather(at, x, indices):
    axis = at("axis", 0) % x.ndim
    where = indices.to(x.device).long()
    where = torch.where(where < 0, where + x.shape[axis], where)
    found = x.index_select(axis, where.reshape(-1))
    return found.reshape(*x.shape[:axis], *where.shape, *x.shape[axis + 1 :])


@operator("GatherElements")
def _gather_elements(at, x, indices):
    axis = at("axis", 0)
    where = indices.to(x.device).long()
    return x.gather(axis, torch.where(where < 0, where + x.shape[axis], where))


@operator("Expand")
def _expand(at, x, shape):
    return x.expand(_small(at, torch.broadcast_shapes(x.shape, listed(shape))))


@operator("Tile")
def _tile(at, x, repeats):
    times = listed(repeats)
    _small(at, [length * n for length, n in zip(x.shape, times, strict=True)])
    return x.repeat(times)


@operator("Range")
def _range(at, start, limit, delta):
    first, last, step = start.item(), limit.item(), delta.item()
    _small(at, [max(math.ceil((last - first) / step), 0) if step else _MOST + 1])
    return torch.arange(first, last, step, dtype=start.dtype)


@operator("ConstantOfShape")
def _constant_of_shape(at, shape):
    fill = at("value")
    value = torch.zeros(1) if fill is None else torch.from_numpy(fill.copy())
    return value.reshape(()).expand(_small(at, listed(shape))).clone()


@operator("OneHot")
def _one_hot(at, indices, depth, values):
    count = int(depth.reshape(()))
    hot = torch.arange(_small(at, [count])[0]).to(indices.device) == (indices % count).unsqueeze(-1)
    return torch.where(hot, values[1], values[0]).movedim(-1, at("axis", -1))


@operator("Trilu")
def _triangle(at, x, k=None):
    diagonal = 0 if k is None else int(k)
    return x.triu(diagonal) if at("upper", 1) else x.tril(diagonal)


@operator("Pad")
def _pad(at, x, pads=None, value=None, axes=None):
    given = at("pads") if pads is None else listed(pads)
    which = range(x.ndim) if axes is None else [axis % x.ndim for axis in listed(axes)]
    around = [0] * 2 * x.ndim
    for i, axis in enumerate(which):
        around[axis], around[x.ndim + axis] = given[i], given[len(given) // 2 + i]
    _small(at, [n + around[i] + around[x.ndim + i] for i, n in enumerate(x.shape)])
    mode = at("mode", "constant")
    if mode == "constant":
        return padded(x, around, at("value", 0.0) if value is None else value.item())
    for axis, length in enumerate(x.shape):
        before, behind = around[axis], around[x.ndim + axis]
        if not before and not behind:
            continue
        where = torch.arange(-before, length + behind, device=x.device)
        if mode == "edge":
            where = where.clamp(0, length - 1)
        elif mode == "wrap":
            where = where % length
        else:  # reflect
            where = where.abs()
            where = length - 1 - (length - 1 - where).abs()
        x = x.index_select(axis, where)
    return x


@operator("DepthToSpace")
def _depth_to_space(at, x):
    (n, c, h, w), b = x.shape, at("blocksize")
    if at("mode", "DCR") == "DCR":
        x = x.reshape(n, b, b, c // b**2, h, w).permute(0, 3, 4, 1, 5, 2)
    else:
        x = x.reshape(n, c // b**2, b, b, h, w).permute(0, 1, 4, 2, 5, 3)
    return x.reshape(n, c // b**2, h * b, w * b)


@operator("SpaceToDepth")
def _space_to_depth(at, x):
    (n, c, h, w), b = x.shape, at("blocksize")
    return x.reshape(n, c, h // b, b, w // b, b).permute(0, 3, 5, 1, 2, 4).reshape(n, c * b**2, h // b, w // b)


def _small(at, shape):
    """`shape`, unless a file of a few bytes asks for gigabytes with it."""
    if math.prod(shape) > _MOST:
        raise at.refuse(f"It asks for {math.prod(shape)} numbers.")
    return shape
