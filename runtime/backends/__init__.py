"""Where a graph may run: one file a backend, each an ONNX Runtime execution provider.

A backend's file has NAME, PROVIDERS (ORT's names, best first) and `absent(providers)`: why it cannot be used here, or
"" where it can. Bundles today hold graphs for the CPU; asking for another backend is refused, never quietly ignored.
"""

import importlib
import pkgutil
from dataclasses import dataclass

from ..errors import BackendError, UsageError


@dataclass(frozen=True)
class Backend:
    """`providers` are those that ORT offers here; `absent` says why there is none ("" where there is)."""

    name: str
    providers: tuple[str, ...]
    absent: str


def discover(offered: list[str]) -> list[Backend]:
    """Every backend that shoal knows, given the providers that ORT offers."""
    found = []
    for info in sorted(pkgutil.iter_modules(__path__), key=lambda info: info.name):
        module = importlib.import_module(f".{info.name}", __name__)
        providers = tuple(name for name in module.PROVIDERS if name in offered)
        found.append(Backend(module.NAME, providers, "" if providers else module.absent(offered)))
    return found


def choose(name: str) -> str:
    """The backend for `name` (auto, cpu, gpu, npu). Raises UsageError for another word, BackendError where none can."""
    if name in ("auto", "cpu"):
        return "cpu"
    if name not in ("gpu", "npu"):
        raise UsageError(f"There is no backend {name!r}.", "It is one of auto, cpu, gpu and npu.", "Name one.")
    raise BackendError(
        f"This bundle cannot run on the {name}.", "Its graphs are for the CPU.", "Load with backend='cpu' or 'auto'."
    )
