"""shoal: the public names, loaded when first used, so that `import shoal` costs nothing."""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .converters.convert import convert as convert
    from .runtime import load as load
    from .runtime.budget import Plan as Plan
    from .runtime.budget import plan as plan
    from .runtime.errors import ShoalError as ShoalError

_WHERE = {
    "load": "shoal.runtime.model",
    "plan": "shoal.runtime.model",
    "convert": "shoal.converters.convert",
    "ShoalError": "shoal.runtime.errors",
}
__all__ = [*_WHERE]


def __getattr__(name: str):
    import importlib

    if name not in _WHERE:
        raise AttributeError(f"module 'shoal' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)
