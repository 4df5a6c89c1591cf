"""shoal.runtime: what a device app embeds. numpy, onnxruntime and flatbuffers, nothing else at import."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .model import load as load

__all__ = ["load"]


def __getattr__(name: str):
    if name == "load":
        from .model import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
