"""How fast a device takes chunks: measured once for a bundle on a device, and kept in the cache folder.

What is kept also says that the device has opened this bundle's graphs before, so that no child needs to try them first.
A profile that is missing, damaged or wrong costs time and changes no result.
"""

import hashlib
import json
import math
import time
from typing import TYPE_CHECKING

import numpy as np

from .. import device_cache, prepack
from ..backends.provider import Device
from ..errors import StorageError
from ..events import Event, Progress, silent
from .cut import Piece
from .prefill import Prefill, Times, in_order
from .tasks import build

if TYPE_CHECKING:
    from ..language.decoder import Decoder

_VERSION = 1
_TRIES = 3
_SLOW = 1.0  # seconds of a chunk from which on its first run is as good as another
_LIMIT = 16 << 30  # bytes of the cache folder


def key(digest: str, device: Device | None, **how) -> str:
    """The name of the profile of a bundle on a device, loaded in this way."""
    where = [device.name, device.listed.version, device.title, sorted(device.settings.items())] if device else ["cpu"]
    said = [_VERSION, digest, *where, *prepack.device(), sorted(how.items())]
    return "profile-" + hashlib.sha256(json.dumps(said).encode()).hexdigest()[:40]


def kept(name: str) -> dict | None:
    """What is kept under this name; None where there is nothing that can be used."""
    try:
        found = device_cache.find(device_cache.cache_folder(), name)
    except ImportError:  # no file locks here
        return None
    if found is None:
        return None
    found.close()
    return found.index


def keep(name: str, times: Times | None, progress: Progress = silent) -> None:
    """Keeps it for the next load; an event says where that cannot be."""
    folder = device_cache.cache_folder()
    said = None if times is None else [{str(n): list(s) for n, s in times.steps.items()}, times.fixed, times.each]
    try:
        with device_cache.making(folder, progress):
            device_cache.make_room(folder, 1 << 20, _LIMIT)
            with device_cache.create(folder, name, {"times": said}):
                pass
    except (StorageError, ImportError) as error:
        progress(Event("profile", detail=f"not kept, the next load measures again: {error}"))


def times_of(index: dict, prefill: Prefill) -> Times | None:
    """The times that are kept, where they fit these graphs."""
    try:
        steps, fixed, each = index["times"]
        found = Times({int(n): tuple(map(float, seconds)) for n, seconds in steps.items()}, float(fixed), float(each))
    except (LookupError, TypeError, ValueError, AttributeError):
        return None
    numbers = [found.fixed, found.each, *(one for seconds in found.steps.values() for one in seconds)]
    count = len(prefill.static.steps)
    fits = set(found.steps) == set(prefill.static.chunks) and all(len(one) == count for one in found.steps.values())
    return found if fits and all(0 <= number < math.inf for number in numbers) else None


def measure(prefill: Prefill, decoder: "Decoder", progress: Progress = silent) -> Times:
    """Runs a chunk of each length through the steps, one after another, and the decode graph with few and with many
    tokens. It writes to slot 0 of a cache that holds nothing yet. Raises BackendError where the device fails."""
    static, found = prefill.static, dict[int, tuple[float, ...]]()
    for done, length in enumerate(static.chunks):
        progress(Event("profile", done, len(static.chunks) + 1, f"chunks of {length}", "lengths"))
        count = min(length, decoder.cache.context)
        tasks, places = build(static, [length], [True], 1, prefill.device, lambda length, step: 0.0)

        piece = Piece(0, count, length)

        def work(index: int, processor: str, piece=piece, places=places) -> None:
            prefill.run_step(decoder, 0, [0] * piece.count, 0, piece, places[index])

        tries = [in_order(tasks, work)]
        while len(tries) < _TRIES and tries[0].makespan < _SLOW:
            tries.append(in_order(tasks, work))
        seconds = [0.0] * len(static.steps)
        for runs in zip(*(schedule.runs for schedule in tries), strict=True):
            # The best: the first warms up, and others may take the processor
            seconds[places[runs[0].task].step] = min(run.end - run.start for run in runs)
        found[length] = tuple(seconds)
    progress(Event("profile", len(static.chunks), len(static.chunks) + 1, "the cpu's graph", "lengths"))
    many = min(decoder.chunk, decoder.cache.context)
    one, most = _dynamic(decoder, 1), _dynamic(decoder, many)
    each = max(0.0, most - one) / max(1, many - 1)
    return Times(found, max(0.0, one - each), each)


def _dynamic(decoder: "Decoder", count: int) -> float:
    """Seconds that the decode graph takes for so many tokens, the better of two."""
    best = math.inf
    for _ in range(2):
        started = time.perf_counter()
        decoder.forward(0, np.zeros((1, count), np.int64), [0], [count - 1])
        best = min(best, time.perf_counter() - started)
    return best
