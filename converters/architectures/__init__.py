"""One file a model family. A file says which `model_type`s it takes (MODEL_TYPES), reads their configuration
(card), lists the tensors it needs (tensors) and builds any range of blocks (build). A new model is a new file.

A file may name a PREFIX that some checkpoints of the family put before every tensor's name."""

import functools
import importlib
import pkgutil
from types import ModuleType
from typing import TypeGuard

from shoal.runtime.card import Card
from shoal.runtime.errors import ConvertError


@functools.cache
def _families() -> dict[str, ModuleType]:
    families = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f".{info.name}", __name__)
        for model_type in getattr(module, "MODEL_TYPES", ()):
            families[model_type] = module
    return families


def find(source) -> tuple[ModuleType, Card]:
    """The architecture and card of a checkpoint; refuses, before anything is written, what cannot be converted.

    Raises ConvertError with everything that is missing: unknown model type, unsupported settings, absent tensors,
    wrong shapes.
    """
    config = source.config()
    model_type = config.get("model_type")
    families = _families()
    if not isinstance(model_type, str) or model_type not in families:
        raise ConvertError(
            f"A model of type {model_type!r} cannot be converted.",
            "shoal has no architecture of that name.",
            f"Supported are {', '.join(sorted(families))}.",
        )
    architecture = families[model_type]
    problems: list[str] = []
    card = architecture.card(Config(config, problems), source.describe())
    present = source.tensors()
    prefix = getattr(architecture, "PREFIX", "")
    if card is not None:
        for name, shape in architecture.tensors(card).items():
            # A negative length is the least that a table must have
            wanted = "[" + ", ".join(str(n) if n >= 0 else f"{-n} or more" for n in shape) + "]"
            info = present.get(name) or present.get(prefix + name)
            if info is None:
                problems.append(f"tensor {name} {wanted} is missing")
            elif not _fits(tuple(info.shape), shape):
                problems.append(f"tensor {name} is {list(info.shape)}, not {wanted}")
    if problems or card is None:
        shown = problems[:12] + ([f"and {len(problems) - 12} more"] if len(problems) > 12 else [])
        raise ConvertError(
            f"This {model_type} checkpoint cannot be converted.", "; ".join(shown) + ".",
            "Use a complete checkpoint of a supported model; nothing was written.",
        )  # fmt: skip
    return architecture, card


def _fits(found: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    return len(found) == len(wanted) and all(n == m or n >= -m > 0 for n, m in zip(found, wanted, strict=True))


def is_positive(value) -> TypeGuard[float]:
    """Whether a value from outside is a number above zero that is of any use as a float."""
    return type(value) in (int, float) and 0 < value < 1e30


class Config:
    """A Hugging Face configuration from outside: every field checked for type and range, all problems collected."""

    def __init__(self, values: dict, problems: list[str]):
        self.values, self.problems = values, problems

    def integer(self, key: str, default: int | None = None, low: int = 1, high: int = 1 << 24) -> int:
        value = self.values.get(key)
        value = default if value is None else value
        if type(value) is not int or not low <= value <= high:
            self.problems.append(f"{key} is {value!r:.60}, not a count from {low} to {high}")
            return low
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number above zero."""
        value = self.values.get(key)
        value = default if value is None else value
        if not is_positive(value):
            self.problems.append(f"{key} is {value!r:.60}, not a positive number")
            return 1.0
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.values.get(key)
        return value if isinstance(value, bool) else default

    def text(self, key: str, default: str = "") -> str:
        value = self.values.get(key)
        return value if isinstance(value, str) else default

    def ids(self, key: str) -> tuple[int, ...]:
        """Token ids: one, several or none, which some write as -1."""
        value = self.values.get(key)
        found = value if isinstance(value, list) else [] if value is None else [value]
        if any(type(item) is not int or item >= 1 << 24 for item in found):
            self.problems.append(f"{key} is {value!r:.60}, not token ids")
            return ()
        return tuple(item for item in found if item >= 0)

    def table(self, key: str) -> dict:
        value = self.values.get(key)
        return value if isinstance(value, dict) else {}

    def refuse(self, problem: str) -> None:
        self.problems.append(problem)
