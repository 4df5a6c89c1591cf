"""Kernels of our own, in C++: a shared library that ONNX Runtime registers as the operators of domain "shoal", and the
same functions for Python, called without the GIL.

The library is made when the package is installed, where there is a compiler (build.py). Without it everything works
all the same: lower.py says a graph in ONNX Runtime's own operators. It knows nothing about bundles or models.
"""

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import BackendError, UsageError
from .layout import LinearFormat

if TYPE_CHECKING:
    from ..bitstack.layout import StackFormat

DOMAIN = "shoal"
OPERATORS = frozenset(
    {"QuantizedLinear", "QuantizedRows", "CachedAttention", "StackedLinear", "StackedRows", "Experts", "RouteExperts"}
)
LIBRARY = Path(__file__).with_name("libshoal_kernels.so")
_WHY = {1: "the format or the size of an array is impossible", 2: "memory ran out", 3: "this machine lacks that path",
        4: "a row is out of range"}  # fmt: skip


@functools.cache
def _loaded() -> tuple[ctypes.CDLL | None, str]:
    """The library, or why there is none."""
    if not LIBRARY.exists():
        return None, "it was not built: no C++ compiler was found when shoal was installed"
    try:
        library = ctypes.CDLL(str(LIBRARY))
        library.shoal_isa.restype = ctypes.c_char_p
        library.shoal_buffer_register.restype = ctypes.c_int64
        library.shoal_stack_register.restype = ctypes.c_int64
        library.shoal_peak.restype = ctypes.c_double
        library.shoal_experts_open.restype = library.shoal_experts_traced.restype = ctypes.c_int64
    except (OSError, AttributeError) as error:
        return None, f"it cannot be loaded: {error}"
    return library, ""


def available() -> bool:
    return _loaded()[0] is not None


def missing() -> str:
    """Why the library is not there; empty where it is."""
    return _loaded()[1]


def isa() -> str:
    """The instruction set in use: amx, avx512, avx2, i8mm, neon or scalar. Raises BackendError without the library."""
    return _library().shoal_isa().decode()


def has(path: str) -> bool:
    """Whether the kernels' `path` of that name runs on this machine."""
    return available() and bool(_library().shoal_has(path.encode()))


def linear(format: LinearFormat, weights: np.ndarray, x: np.ndarray, *, bias: np.ndarray | None = None,
           path: str = "", threads: int = 1) -> np.ndarray:  # fmt: skip
    """x fp32 [rows, inputs] times the matrix that `weights` uint8 hold: fp32 [rows, outputs], as QuantizedLinear."""
    format.check()
    x, bias = _rows(format, x), _bias(format, bias)
    weights = np.ascontiguousarray(weights, np.uint8)
    y = np.empty((len(x), format.outputs), np.float32)
    _done(_library().shoal_linear(
        path.encode() if path else None, *_numbers(format), _pointer(weights), ctypes.c_int64(weights.nbytes),
        ctypes.c_int64(len(x)), _pointer(x), None, ctypes.c_float(0), _pointer(bias), None, ctypes.c_int(0),
        _pointer(y), ctypes.c_int(threads),
    ))  # fmt: skip
    return y


def rows(format: LinearFormat, weights: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Rows `ids` of the matrix, fp32 [n, inputs]."""
    format.check()
    weights, ids = np.ascontiguousarray(weights, np.uint8), np.ascontiguousarray(ids, np.int64)
    y = np.empty((ids.size, format.inputs), np.float32)
    _done(_library().shoal_linear_rows(
        *_numbers(format), _pointer(weights), ctypes.c_int64(weights.nbytes), _pointer(ids), ctypes.c_int64(ids.size),
        _pointer(y),
    ))  # fmt: skip
    return y


def stacked(format: "StackFormat", payloads: Sequence[np.ndarray], x: np.ndarray,
            base_format: LinearFormat | None = None, base: np.ndarray | None = None, bias: np.ndarray | None = None,
            path: str = "", threads: int = 1) -> np.ndarray:  # fmt: skip
    """x fp32 [rows, inputs] times the matrix of these blocks on top of `base`: fp32 [rows, outputs], as
    StackedLinear."""
    x, bias = _rows(format, x), _bias(format, bias)
    y = np.empty((len(x), format.outputs), np.float32)
    with_blocks = _Blocks(format, payloads, base_format, base)
    _done(_library().shoal_stacked(
        path.encode() if path else None, *with_blocks.arguments, ctypes.c_int64(len(x)), _pointer(x), None,
        ctypes.c_float(0), _pointer(bias), None, ctypes.c_int(0), _pointer(y), ctypes.c_int(threads),
    ))  # fmt: skip
    return y


def stacked_rows(format: "StackFormat", payloads: Sequence[np.ndarray], ids: np.ndarray,
                 base_format: LinearFormat | None = None, base: np.ndarray | None = None) -> np.ndarray:  # fmt: skip
    """Rows `ids` of that matrix, fp32 [n, inputs], as StackedRows."""
    ids = np.ascontiguousarray(ids, np.int64)
    y = np.empty((ids.size, format.inputs), np.float32)
    with_blocks = _Blocks(format, payloads, base_format, base)
    _done(_library().shoal_stacked_rows(
        *with_blocks.arguments, _pointer(ids), ctypes.c_int64(ids.size), _pointer(y)
    ))  # fmt: skip
    return y


def choose_signs(carried: np.ndarray, left: np.ndarray, factor: np.ndarray, roots: np.ndarray,
                 sizes: Sequence[np.ndarray], signs: Sequence[np.ndarray], threads: int = 2) -> float:  # fmt: skip
    """For consecutive inputs, from the last to the first: the signs whose sum of +-sizes is nearest to what is
    `carried` to an input, and that taken from what is `left`; all fp32 [inputs, outputs] with inputs as rows, `signs`
    uint8. `factor` [inputs, inputs], upper triangular, may be a part of a larger matrix, says what an error is carried
    on with. Returns the sum of (roots * what was missed)^2."""
    inputs, outputs = left.shape
    errors = np.zeros(-(-outputs // 64))
    _done(_library().shoal_signs(
        ctypes.c_int64(inputs), ctypes.c_int64(outputs), _pointer(carried), _pointer(left), _pointer(factor),
        ctypes.c_int64(factor.strides[0] // 4), _pointer(roots), ctypes.c_int(len(sizes)), _pointers(sizes),
        _pointers(signs), _pointer(errors), ctypes.c_int(threads),
    ))  # fmt: skip
    return float(errors.sum())


def choose_signs_again(pull: np.ndarray, left: np.ndarray, moments: np.ndarray, sizes: Sequence[np.ndarray],
                       signs: Sequence[np.ndarray], threads: int = 2) -> np.ndarray:  # fmt: skip
    """The same for signs that are there: each input's are chosen again for the best, given all other errors, of which
    `pull` is the moments' product with all that was left before. Returns by what the sums of +-sizes changed."""
    inputs, outputs = left.shape
    moved = np.empty_like(left)
    _done(_library().shoal_signs_again(
        ctypes.c_int64(inputs), ctypes.c_int64(outputs), _pointer(pull), _pointer(left), _pointer(moments),
        ctypes.c_int64(moments.strides[0] // 4), ctypes.c_int(len(sizes)), _pointers(sizes), _pointers(signs),
        _pointer(moved), ctypes.c_int(threads),
    ))  # fmt: skip
    return moved


def read(data: np.ndarray, threads: int = 1) -> None:
    """Reads every byte of `data` as a product of one row would: the limit of a decode step over the same bytes."""
    total = ctypes.c_uint64()
    _library().shoal_read(_pointer(data), ctypes.c_int64(data.nbytes), ctypes.c_int(threads), ctypes.byref(total))


def peak(threads: int = 1) -> float:
    """Multiply-adds a second of int8 products whose operands stay in the first cache, measured now (some 10 ms)."""
    return float(_library().shoal_peak(ctypes.c_int(threads)))


class Buffer:
    """Bytes that a graph's weights name by `handle`; `set` changes them between two runs. It keeps the array alive."""

    def __init__(self, data: np.ndarray):
        self._data = np.ascontiguousarray(data, np.uint8)
        self.handle = _library().shoal_buffer_register(_pointer(self._data), ctypes.c_int64(self._data.nbytes))
        if self.handle < 0:
            raise BackendError("No more buffers can be registered.", "There are a million.", "Close some.")

    def set(self, data: np.ndarray) -> None:
        data = np.ascontiguousarray(data, np.uint8)
        if not _library().shoal_buffer_set(ctypes.c_int64(self.handle), _pointer(data), ctypes.c_int64(data.nbytes)):
            raise UsageError("The buffer is closed.", "close() was called.", "Make a new one.")
        self._data = data

    def close(self) -> None:
        """A graph that still names it is refused at its next run."""
        _library().shoal_buffer_release(ctypes.c_int64(self.handle))


class Stack:
    """The blocks of `matrices` matrices, which a graph names by `handle`; `set` changes those of one between two runs.
    It keeps their arrays alive, and nothing that was replaced."""

    def __init__(self, matrices: int):
        self._payloads: dict[int, list[np.ndarray]] = {}
        self.handle = _library().shoal_stack_register(ctypes.c_int64(matrices))
        if self.handle < 0:
            raise BackendError("The stack cannot be registered.", f"It has {matrices} matrices.", "Close some stacks.")

    def set(
        self, matrix: int, payloads: Sequence[np.ndarray], base: tuple[LinearFormat, np.ndarray] | None = None
    ) -> None:
        """The blocks of `matrix` are these from now on, in this order, on top of `base`: its format and bytes."""
        arrays = [_bytes(payload) for payload in payloads]
        sizes = (ctypes.c_int64 * len(arrays))(*(array.nbytes for array in arrays))
        format, below = (base[0].check(), _bytes(base[1])) if base else (LinearFormat(0, 0, 0, 0, 0), None)
        count = ctypes.c_int64
        if not _library().shoal_stack_set(
            count(self.handle), count(matrix), _pointers(arrays), sizes, ctypes.c_int(len(arrays)), _pointer(below),
            count(0 if below is None else below.nbytes), ctypes.c_int(format.bits), count(format.group),
            count(format.span),
        ):  # fmt: skip
            why = f"It was closed, has no matrix {matrix}, or cannot hold {len(arrays)} blocks of one."
            raise UsageError("The stack cannot be changed.", why, "Make a new one.")
        self._payloads[matrix] = arrays if below is None else [*arrays, below]

    def close(self) -> None:
        """A graph that still names it is refused at its next run."""
        _library().shoal_stack_release(ctypes.c_int64(self.handle))
        self._payloads.clear()


def open_experts(*arguments) -> int:
    """A store's handle (experts_capi.cpp), or below 0 a number of errno's."""
    return _library().shoal_experts_open(*arguments)


def experts_do(function: str, handle: int, *arguments) -> int:
    """What a function of the library returns for a store."""
    return getattr(_library(), function)(ctypes.c_int64(handle), *arguments)


def traced_experts(handle: int, layer: int, kind: int, to: np.ndarray | None) -> int:
    """How many numbers a store kept of a layer, and them in `to`."""
    return _library().shoal_experts_traced(
        ctypes.c_int64(handle), ctypes.c_int(layer), ctypes.c_int(kind), None if to is None else _pointer(to)
    )


class _Blocks:
    """Of a stacked matrix: what the C functions are given. The arrays live as long as this does."""

    def __init__(self, format, payloads, base_format: LinearFormat | None, base):
        count, small = ctypes.c_int64, ctypes.c_int
        self._payloads = [_bytes(payload) for payload in payloads]
        self._base = None if base is None else _bytes(base)
        of = base_format.check() if base_format and base is not None else LinearFormat(0, 0, 0, 0, 0)
        self.arguments = (
            count(format.inputs), count(format.outputs), small(format.rank), small(format.rotated),
            _pointers(self._payloads), count(min((one.nbytes for one in self._payloads), default=0)),
            small(len(self._payloads)), small(of.bits), count(of.group), count(of.span), _pointer(self._base),
            count(0 if self._base is None else self._base.nbytes),
        )  # fmt: skip


def call(function: str, *arguments) -> None:
    """Calls a function of the library that returns 0 where it was done. Raises BackendError where it was not."""
    _done(getattr(_library(), function)(*arguments))


def _library() -> ctypes.CDLL:
    library, why = _loaded()
    if library is None:
        raise BackendError(
            "The kernels cannot be used.", f"{why[0].upper()}{why[1:]}.", "Install a C++ compiler and shoal again."
        )
    return library


def _numbers(format: LinearFormat) -> tuple:
    count = ctypes.c_int64
    group, span = count(format.group), count(format.span)
    return (
        count(format.inputs),
        count(format.outputs),
        ctypes.c_int(format.bits),
        group,
        span,
        ctypes.c_int(format.rotated),
    )


def _rows(format: "LinearFormat | StackFormat", x: np.ndarray) -> np.ndarray:
    x = np.ascontiguousarray(x, np.float32)
    if x.ndim != 2 or x.shape[1] != format.inputs:
        raise UsageError(f"x has shape {x.shape}.", f"It must be [rows, {format.inputs}].", "Reshape it.")
    return x


def _bias(format: "LinearFormat | StackFormat", bias: np.ndarray | None) -> np.ndarray | None:
    if bias is None:
        return None
    bias = np.ascontiguousarray(bias, np.float32)
    if bias.shape != (format.outputs,):
        raise UsageError(f"bias has shape {bias.shape}.", f"It must be [{format.outputs}].", "Reshape it.")
    return bias


def _bytes(data) -> np.ndarray:
    """Any buffer's bytes, where they are if they lie together."""
    view = data if isinstance(data, np.ndarray) else np.frombuffer(data, np.uint8)
    return np.ascontiguousarray(view, np.uint8)


def _pointers(arrays: Sequence[np.ndarray]) -> ctypes.Array:
    return (ctypes.c_void_p * len(arrays))(*(array.ctypes.data for array in arrays))


def _pointer(array: np.ndarray | None) -> ctypes.c_void_p | None:
    return None if array is None else ctypes.c_void_p(array.ctypes.data)


def _done(code: int) -> None:
    if code:
        raise BackendError("A kernel was refused.", f"Of its arguments, {_WHY.get(code, code)}.", "Correct them.")
