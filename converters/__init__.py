"""shoal.converters: checkpoints become bundles, on a workstation. Nothing here is needed to run one."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .convert import convert as convert
    from .recipe import Recipe as Recipe

__all__ = ["Recipe", "convert"]


def __getattr__(name: str):
    if name == "convert":
        from .convert import convert

        return convert
    if name == "Recipe":
        from .recipe import Recipe

        return Recipe
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
