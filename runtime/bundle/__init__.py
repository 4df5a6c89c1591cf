"""A bundle: one file that holds a model's graphs and weights, checked before it is trusted, mapped instead of copied.

docs/format.md describes it byte by byte. Nothing here knows what is inside a section.
"""

from .layout import Graph, Section
from .read import Bundle
from .write import create

__all__ = ["Bundle", "Graph", "Section", "create"]
