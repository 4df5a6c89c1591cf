"""How a network is cut and what is trained there: frozen values from the table [split] of a TOML file.

It knows nothing about networks: whether a cut is there shows when one is cut.
"""

import dataclasses
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.runtime.errors import UsageError

ENCODERS = ("ghnd", "bottlefit", "entropic", "separable", "thin", "linear")
DECODERS = ("ghnd", "bottlefit", "entropic", "light")


@dataclass(frozen=True)
class SplitRecipe:
    """`cut` names the feature that the decoder makes, "" for the smallest behind a tenth to a half of the work, `stem`
    an earlier one up to which the device runs the network's own layers, "" for none; `taps` are later features that are
    distilled too (none: HND). The `encoder` gives `latent` channels at 1 / `stride` of the stem's output (0: at about
    the cut's size), in `members` of an ensemble or at `widths`. `bits` are those of a latent's element, or, with `beta`
    above 0, a learned prior says how many, and `beta` is what a bit may cost in squared error of features. `epochs` and
    `rate` are of the first stage, `tail_epochs` and `tail_rate` of the second, in which labels weigh `alpha` and the
    teacher's answers the rest. A part `held` of the rows trains nothing and measures the modes. Pictures are (x - mean)
    / deviation of bytes."""

    cut: str = ""
    stem: str = ""
    taps: tuple[str, ...] = ()
    encoder: str = "separable"
    decoder: str = "light"
    latent: int = 12
    stride: int = 0
    width: int = 0
    members: int = 1
    widths: tuple[float, ...] = ()
    bits: tuple[int, ...] = (8,)
    beta: float = 0.0
    epochs: int = 10
    batch: int = 64
    rate: float = 1e-3
    tail_epochs: int = 5
    tail_rate: float = 3e-4
    alpha: float = 0.5
    held: float = 0.2
    mirror: bool = False
    mean: float = 127.5
    deviation: float = 127.5
    seed: int = 0

    def __post_init__(self):
        for name, allowed in (("encoder", ENCODERS), ("decoder", DECODERS)):
            if getattr(self, name) not in allowed:
                raise _refuse(f"{name} is {getattr(self, name)!r}", "one of " + ", ".join(allowed))
        if not self.bits or not all(bits in range(1, 9) for bits in self.bits):
            raise _refuse(f"bits are {list(self.bits)}", "numbers from 1 to 8")
        if not 1 <= self.members <= 16 or (self.widths and self.members > 1):
            raise _refuse(f"members are {self.members}, widths {list(self.widths)}", "up to 16 members, or widths")
        if self.beta < 0 or (self.beta and (self.members > 1 or self.widths)):
            raise _refuse(f"beta is {self.beta}", "0, or above it for an encoder without choices")
        if not 0 < self.held < 1 or not 0 <= self.alpha <= 1 or not self.deviation:
            raise _refuse("held, alpha or deviation is out of range", "above 0 and below 1, from 0 to 1, and not 0")


def load(recipe: "str | Path | SplitRecipe", **changes: Any) -> SplitRecipe:
    """A recipe from a TOML file's table [split], or itself; `changes` replace fields. Raises UsageError with the field
    that is wrong."""
    if isinstance(recipe, SplitRecipe):
        return dataclasses.replace(recipe, **changes)
    try:
        raw = tomllib.loads(Path(recipe).read_bytes().decode()).get("split")
    except OSError as error:
        raise UsageError(f"The recipe {recipe} cannot be read.", str(error), "Check the path.") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"The recipe {recipe} is not TOML.", str(error), "Mend the line that it names.") from None
    if not isinstance(raw, dict):
        raise _refuse("table [split] is missing", "a table of its fields")
    known = {item.name: item for item in dataclasses.fields(SplitRecipe)}
    for key, value in raw.items():
        if key not in known:
            raise _refuse(f"split has an unknown field {key!r}", ", ".join(known))
        default = known[key].default
        if isinstance(default, tuple):
            of: Any = {"taps": str, "bits": int, "widths": (int, float)}[key]
            if not isinstance(value, list) or not all(
                isinstance(one, of) and not isinstance(one, bool) for one in value
            ):
                raise _refuse(f"{key} is {value!r}", "a list")
            raw[key] = tuple(value)
        elif type(value) is not type(default) and not (isinstance(default, float) and type(value) is int):
            raise _refuse(f"{key} is {value!r}", f"of type {type(default).__name__}")
    return SplitRecipe(**{**raw, **changes})


def _refuse(what: str, allowed: str) -> UsageError:
    return UsageError("The recipe cannot be used.", f"Its {what}.", f"It must be {allowed}.")
