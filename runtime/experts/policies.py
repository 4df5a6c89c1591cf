"""What a cache policy would have done on recorded routing: the code that the expert store runs, in C++, over a trace.

Nothing is read and nothing computed; times enter only as how many reads fit beside one layer. It knows nothing about
models or files. The policies are described in runtime/kernels/expert_cache.h.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from .. import kernels
from ..errors import UsageError

# As ExpertPolicy numbers them. Belady's reads the future: no store can have it, and none reads less
POLICIES = ("lru", "lfu", "hobbit", "apex", "mrs", "shallow", "belady")
PARAMETERS = 5


@dataclass(frozen=True, eq=False)
class Counts:
    """What happened to each sequence of a trace, int64 [sequences] each, in experts.

    Of the uses of experts `hits` were there and `misses` were not; `compulsory` of these are the first uses of all.
    `prefetched` were read on a guess: `useful` ones were used before they left, `wasted` ones were not. `late` guesses
    were right, but there was no time to read them. `cold` uses were not there before the guesses about their layer,
    which had `foretold` of them.
    """

    hits: np.ndarray
    misses: np.ndarray
    compulsory: np.ndarray
    prefetched: np.ndarray
    useful: np.ndarray
    late: np.ndarray
    wasted: np.ndarray
    cold: np.ndarray
    foretold: np.ndarray

    @property
    def uses(self) -> np.ndarray:
        return self.hits + self.misses

    @property
    def reads(self) -> np.ndarray:
        """All that was read, on demand and on guesses."""
        return self.misses + self.prefetched

    def total(self) -> dict[str, int]:
        return {field.name: int(getattr(self, field.name).sum()) for field in fields(self)}


def simulate(ids: np.ndarray, experts: int, slots: int, policy: str = "lru", *, scores: np.ndarray | None = None,
             predicted: np.ndarray | None = None, reads: float = -1.0, starts: Sequence[int] | np.ndarray = (0,),
             parameters: Sequence[float] | None = None) -> Counts:  # fmt: skip
    """Runs `policy` with `slots` slots for all layers together over the routing `ids` int [tokens, layers, top_k].

    A negative id is nobody. `scores` float [tokens, layers, experts]: the router's, which only `mrs` looks at.
    `predicted` int [tokens, layers, width]: guesses about each layer, the best first, made before the layer before it
    runs; while that runs `reads` of them can be read (below 0: all). `starts`: the first token of each sequence.
    `parameters`: of the policy, in place of its own. Raises UsageError for what cannot be, BackendError without the
    kernels.
    """
    if policy not in POLICIES:
        raise _refuse(f"the policy {policy!r:.40}", f"There are {', '.join(POLICIES)}.", "Name one of these.")
    ids = np.ascontiguousarray(ids, np.int32)
    if ids.ndim != 3 or not ids.shape[1]:
        raise _refuse(f"ids of shape {ids.shape}", "They must be [tokens, layers, top_k].", "Reshape them.")
    tokens, layers, top_k = ids.shape
    if not tokens or not top_k:
        raise _refuse("a trace without tokens", "There is nothing to run.", "Record some.")
    scores = _like(ids, scores, np.float32, "scores", experts)
    predicted = _like(ids, predicted, np.int32, "predicted")
    begin = np.ascontiguousarray(starts, np.int64)
    given = [] if parameters is None else [float(one) for one in parameters]
    if len(given) > PARAMETERS or not np.isfinite(given).all():
        raise _refuse(f"parameters {given!r:.60}", f"A policy has at most {PARAMETERS}, all finite.", "Correct them.")
    own = (ctypes.c_double * PARAMETERS)(*given, *[0.0] * (PARAMETERS - len(given))) if given else None
    if not 1 <= slots < 1 << 31 or not np.isfinite(reads):
        raise _refuse(f"{slots!r:.20} slots", "There must be at least one.", "Ask for more.")
    found = np.zeros((len(begin), len(fields(Counts))), np.int64)
    kernels.call(
        "shoal_experts_simulate", ctypes.c_int(layers), ctypes.c_int(experts), ctypes.c_int64(tokens),
        ctypes.c_int(top_k), _pointer(ids), _pointer(scores), _pointer(predicted),
        ctypes.c_int(0 if predicted is None else predicted.shape[2]),
        ctypes.c_double(reads), _pointer(begin), ctypes.c_int64(len(begin)), ctypes.c_int(slots),
        ctypes.c_int(POLICIES.index(policy)), own, _pointer(found),
    )  # fmt: skip
    return Counts(*np.ascontiguousarray(found.T))


def depths(ids: np.ndarray, experts: int, window: int) -> np.ndarray:
    """Of one layer's routing `ids` int [tokens, top_k]: where each use finds its expert in a stack whose order is how
    often the next `window` tokens use it, then recency (Mattson et al. 1970); int32 [tokens, top_k], from 1: a cache of
    so many slots has it. A first use is behind all experts seen before it, and has `experts` more; nobody is at 0."""
    ids = np.ascontiguousarray(ids, np.int32)
    if ids.ndim != 2:
        raise _refuse(f"ids of shape {ids.shape}", "They must be [tokens, top_k].", "Reshape them.")
    found = np.empty_like(ids)
    kernels.call(
        "shoal_experts_depths", ctypes.c_int(experts), ctypes.c_int64(len(ids)), ctypes.c_int(ids.shape[1]),
        _pointer(ids), ctypes.c_int64(window), _pointer(found),
    )  # fmt: skip
    return found


def _like(ids: np.ndarray, array: np.ndarray | None, kind, name: str, last: int = 0) -> np.ndarray | None:
    if array is None:
        return None
    array = np.ascontiguousarray(array, kind)
    if array.ndim != 3 or array.shape[:2] != ids.shape[:2] or (last and array.shape[2] != last):
        why = f"They must be [{ids.shape[0]}, {ids.shape[1]}, {last or 'width'}]."
        raise _refuse(f"{name} of shape {array.shape}", why, "Reshape them.")
    return array


def _pointer(array: np.ndarray | None) -> ctypes.c_void_p | None:
    return None if array is None else ctypes.c_void_p(array.ctypes.data)


def _refuse(what: str, why: str, fix: str) -> UsageError:
    return UsageError(f"The simulation cannot use {what}.", why, fix)
