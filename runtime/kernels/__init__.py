"""Kernels of our own, in C++: a shared library that ONNX Runtime registers as the operators of domain "shoal", and the
same functions for Python, called without the GIL.

The library is made when the package is installed, where there is a compiler (build.py). Without it everything works
all the same: lower.py says a graph in ONNX Runtime's own operators. It knows nothing about bundles or models.
"""

import ctypes
import functools
from pathlib import Path

import numpy as np

from ..errors import BackendError, UsageError
from .layout import LinearFormat

DOMAIN = "shoal"
OPERATORS = frozenset({"QuantizedLinear", "QuantizedRows", "CachedAttention"})
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
        library.shoal_peak.restype = ctypes.c_double
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
    x = np.ascontiguousarray(x, np.float32)
    weights = np.ascontiguousarray(weights, np.uint8)
    if x.ndim != 2 or x.shape[1] != format.inputs:
        raise UsageError(f"x has shape {x.shape}.", f"It must be [rows, {format.inputs}].", "Reshape it.")
    if bias is not None:
        bias = np.ascontiguousarray(bias, np.float32)
        if bias.shape != (format.outputs,):
            raise UsageError(f"bias has shape {bias.shape}.", f"It must be [{format.outputs}].", "Reshape it.")
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


def _pointer(array: np.ndarray | None) -> ctypes.c_void_p | None:
    return None if array is None else ctypes.c_void_p(array.ctypes.data)


def _done(code: int) -> None:
    if code:
        raise BackendError("A kernel was refused.", f"Of its arguments, {_WHY.get(code, code)}.", "Correct them.")
