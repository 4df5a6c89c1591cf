"""Whether a bundle's prompts go through static graphs, and opening them: what `shoal.load` does for them.

Chunks go to the device that was asked for, where the bundle has graphs for it; on the CPU by themselves only where they
were made for it. It knows nothing about budgets.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..backends.provider import Device
from ..bundle import Bundle
from ..card import Card
from ..errors import BackendError, UsageError
from ..events import Event, Progress, silent
from ..session import PATIENCE, Place
from . import graphs, profile
from .layout import Static
from .prefill import Prefill
from .tasks import CPU

if TYPE_CHECKING:
    from ..language.decoder import Decoder

WAYS = ("auto", "static", "dynamic")
COMPILED = ("auto", "bundle", "none")


def chosen(bundle: Bundle, card: Card, backend: str, way: str, part: bool = False) -> Static | None:
    """The static graphs that prompts will go through on `backend` (auto, cpu, npu, npu:qnn, ..); None for none.

    `way` auto takes those that were made for it; static insists, and takes any on the CPU; dynamic takes none. Raises
    UsageError for another word and BackendError where static has nothing to take.
    """
    if way not in WAYS:
        raise UsageError(f"There is no prefill {way!r:.40}.", f"It is one of {', '.join(WAYS)}.", "Name one.")
    static = None
    if way != "dynamic" and card.task == "generate" and not part and not card.is_part:
        static = graphs.read(bundle, card)
    where = backend.partition(":")[0].replace("auto", CPU)
    made = static.backend.partition(":")[0] if static else ""
    if made and (made == where or (way == "static" and where == CPU)):
        return static
    if way == "static":
        why = f"Its static graphs were made for the {made}." if made else "It has no static graphs."
        raise BackendError(
            f"Prompts of {card.name} cannot go through static graphs on the {where}.", why,
            f"Convert the checkpoint with static graphs for the {where}, or leave prefill at auto.",
        )  # fmt: skip
    return None


def open_prefill(
    bundle: Bundle, static: Static, places: Mapping[str, Place], device: Device | None, kv: str, *, share: float = 1.0,
    threads: int = 0, ours: bool = True, way: str = "auto", compiled: str = "auto", patience: float = PATIENCE,
    progress: Progress = silent,
) -> Prefill | None:  # fmt: skip
    """The static path, open; `compiled` is as in graphs.open_all. Where `share` is 0 nothing must run on the device:
    then None, and an event, where its graphs cannot be opened. Raises BackendError, with `placement` where nodes fell
    back, and BundleError."""
    name = profile.key(bundle.digest, device, kv=kv, threads=threads)
    try:
        opened = graphs.open_all(
            bundle, static, places, device, kv, share=share, threads=threads, ours=ours, patience=patience,
            surveyed=profile.kept(name) is not None, compiled=compiled, progress=progress,
        )  # fmt: skip
    except BackendError as error:
        if device is None or share > 0 or way == "static" or compiled == "bundle":
            raise
        progress(Event("load", detail=f"prompts stay on the cpu: {error.what} {error.why}"))
        return None
    return Prefill(
        static, opened, device.backend if device else CPU, kv, fallback=share <= 0 and way != "static",
        progress=progress,
    )  # fmt: skip


def tune(
    prefill: Prefill, decoder: "Decoder", bundle: Bundle, device: Device | None, way: str, threads: int = 0,
    progress: Progress = silent,
) -> None:  # fmt: skip
    """Gives the path its expected times: those kept for this device, or measured now and kept.

    Not where that decides nothing: on a simulated device, whose speed says nothing of the one that it stands for, all
    of a prompt goes through chunks, and so it does where `way` is static, which the CPU runs in plain order.
    """
    name = profile.key(bundle.digest, device, kv=prefill.kv, threads=threads)
    known = profile.kept(name)
    prefill.forced = way == "static"
    if (device is None and prefill.forced) or (device is not None and device.simulated):
        if known is None:
            profile.keep(name, None, progress)
        return
    times = profile.times_of(known, prefill) if known is not None else None
    if times is None:
        times = profile.measure(prefill, decoder, progress)
        profile.keep(name, times, progress)
    prefill.times = times
