"""How a checkpoint is converted: frozen values, versioned, from a name or from TOML.

A recipe decides the format of every tensor. It knows nothing about files, graphs or models.
"""

import dataclasses
import fnmatch
import json
import math
import tomllib
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from shoal.runtime.errors import UsageError
from shoal.runtime.kernels.layout import BLOCK, MAX_SPAN, LinearFormat

METHODS = ("rtn", "gptq", "bitstack")
SORTS = ("proxy", "average", "greedy", "random")


@dataclass(frozen=True)
class Format:
    """How a weight matrix is stored: 32 is fp32, anything less integers as runtime/kernels/linear.h tells.

    With 4, 3 or 2 bits each `group` of inputs has a multiplier and, unless `symmetric`, a zero point, and each `span`
    of them an fp32 scale. With 8 bits a group has the scale itself. 0 is the usual: groups of 32, all else whole rows.
    What is `rotated` loses less: outliers, of weights and of activations, are spread over 64 inputs.
    """

    bits: int = 32
    group: int = 0
    symmetric: bool = False
    span: int = 0
    rotated: bool = True

    def __post_init__(self):
        if self.bits not in (32, 8, 4, 3, 2):
            raise _refuse(f"bits is {self.bits!r}", "one of 32, 8, 4, 3 and 2")
        if self.group not in (0, 32, 64, 128, 256):
            raise _refuse(f"group is {self.group!r}", "one of 32, 64, 128 and 256, or 0 for the usual")
        if self.bits < 8 and not self.group:
            object.__setattr__(self, "group", 32)
        if self.span and self.bits >= 8:
            raise _refuse(f"span is {self.span!r} with {self.bits} bits", "0: there, a scale is the group's")
        if not 0 <= self.span <= MAX_SPAN or self.span % max(BLOCK, self.group):
            raise _refuse(f"span is {self.span!r}", f"0 or a multiple of {BLOCK} and of group, up to {MAX_SPAN}")

    def __str__(self):
        if self.bits == 32:
            return "fp32"
        group, span = f"g{self.group}" if self.group else "", f"x{self.span}" if self.span else ""
        return f"int{self.bits}{group}{span}{'s' if self.symmetric else ''}"

    def layout(self, inputs: int, outputs: int) -> LinearFormat:
        """A matrix [outputs, inputs] in this format of less than 32 bits. A group or span is never longer than a row,
        and a group that does not divide its span is halved until it does; a scale has 64 inputs at least."""
        whole = -(-inputs // BLOCK) * BLOCK
        wanted = max(self.group, BLOCK) if self.bits == 8 and self.group else self.span
        span = min(wanted or whole, whole, MAX_SPAN)
        group = span if self.bits == 8 else math.gcd(self.group, span)
        return LinearFormat(inputs, outputs, self.bits, group, span, int(self.rotated and inputs % BLOCK == 0))


@dataclass(frozen=True)
class Calibration:
    """The text that an activation-aware method sees: `tokens` tokens in rows of `length`, from `text` (a file's path,
    or empty for the public-domain text that ships with the converters)."""

    text: str = ""
    tokens: int = 16384
    length: int = 512

    def __post_init__(self):
        if not 16 <= self.length <= 8192 or not self.length <= self.tokens <= 1 << 22:
            raise _refuse(
                f"calibration has {self.tokens} tokens in rows of {self.length}", "16 to 8192 a row, one row or more"
            )


@dataclass(frozen=True)
class Ladder:
    """The steps of a stacked matrix, of which a device has as many as it has memory for. The `first` are blocks of
    signs and factors, chosen together and always there. `rungs` are whole matrices, each in place of all before it (the
    first of them is always there where there are no first blocks). Of those that have no more bits than the first
    blocks one comes in their place where it has half the error; elsewhere they come after them, or are left out of a
    model that gains nothing by them. Then come `blocks` on top.
    The factors' `rank` is 1, 2 or 4 by error per byte where it is 0. `sort` orders the steps of all matrices: by
    `proxy` (calibrated errors), `average` and `greedy` (measured perplexities, thousands of them), or `random`."""

    first: int = 2
    rungs: tuple[Format, ...] = ()
    blocks: int = 6
    rank: int = 0
    sort: str = "proxy"

    @property
    def floor(self) -> int:
        """How many steps a matrix always has."""
        return self.first or 1

    @property
    def rivals(self) -> int:
        """How many rungs have no more bits than the first blocks, each of which is about one."""
        return sum(rung.bits <= self.first for rung in self.rungs)

    @property
    def levels(self) -> list[int]:
        """Numbers of steps for which inputs are looked at anew: the first, up to each rung, and without rungs the first
        with one more (measured: where inputs of the source are taken instead, Qwen with three blocks has a perplexity
        of 62, and 49 so) and all."""
        rungs = {self.first + at + 1 for at in range(len(self.rungs))}
        blocks = {self.first + 1, self.first + self.blocks} if self.blocks and not rungs else set()
        return sorted({self.first, *rungs, *blocks} - {0})

    def __post_init__(self):
        if any(rung.bits == 32 for rung in self.rungs) or len(self.rungs) > 8:
            raise _refuse("ladder has a rung of 32 bits, or more than 8 rungs", "rungs of 2 to 8 bits")
        if any((more.bits, -more.group) <= (less.bits, -less.group) for less, more in pairwise(self.rungs)):
            raise _refuse("ladder's rungs do not rise", "from few bits, or long groups, to many")
        if not 0 <= self.blocks <= 16:
            raise _refuse(f"ladder has {self.blocks} blocks", "0 to 16 of them")
        if not (0 if self.rungs else 1) <= self.first <= 4:
            raise _refuse(f"ladder's first is {self.first}", "1 to 4, or 0 with rungs")
        if not 0 <= self.rank <= 16:
            raise _refuse(f"ladder's rank is {self.rank}", "0 to 16")
        if self.sort not in SORTS:
            raise _refuse(f"ladder's sort is {self.sort!r}", "one of " + ", ".join(SORTS))


@dataclass(frozen=True)
class Static:
    """Prefill in chunks of fixed lengths by graphs for another processor, in `bits` 8 (weights and activations, with
    static scales) or 32. `shadow` is the share of the products, by what it costs to leave one out, whose outliers the
    CPU multiplies beside the device; with `rotate`, in place of that, the device spreads them over 64 channels."""

    backend: str = "npu"
    bits: int = 8
    chunks: tuple[int, ...] = (32, 128, 256)
    shadow: float = 1.0
    rotate: bool = False

    def __post_init__(self):
        if self.backend not in ("npu", "gpu", "cpu"):
            raise _refuse(f"static.backend is {self.backend!r:.40}", "npu, gpu or cpu")
        if self.bits not in (8, 32):
            raise _refuse(f"static.bits is {self.bits!r}", "8 or 32")
        chunks = self.chunks
        if not 0 < len(chunks) <= 8 or not all(type(chunk) is int and 1 <= chunk <= 4096 for chunk in chunks):
            raise _refuse(f"static.chunks are {chunks!r:.60}", "1 to 8 lengths of 1 to 4096 tokens")
        if list(chunks) != sorted(set(chunks)):
            raise _refuse(f"static.chunks are {chunks!r:.60}", "rising")
        if type(self.shadow) not in (int, float) or not 0 <= self.shadow <= 1:
            raise _refuse(f"static.shadow is {self.shadow!r:.40}", "a share from 0 to 1")
        if type(self.rotate) is not bool or (self.rotate and (self.bits != 8 or self.shadow)):
            raise _refuse(f"static.rotate is {self.rotate!r:.40}", "false, or true with 8 bits and shadow = 0")


@dataclass(frozen=True)
class Recipe:
    """`linear` is the format of the blocks' matrices, `embedding` and `head` have their own (one matrix that is both is
    in the head's, since every step reads it whole); the first of `rules` whose pattern matches a tensor's name outranks
    them. `method` rounds: `rtn` to nearest, `gptq` with second-order error feedback from calibration text (Frantar et
    al. 2022), and `bitstack` makes a `ladder` of the blocks' matrices (Wang et al. 2024) unless a rule names one.
    `smooth` first moves what makes channels unequal out of the activations into the weights (Xiao et al. 2023), by
    calibration text too. A mixture's `experts` are in the format of `linear` where they have none of their own, and
    with `low` in that one as well, for a device that is short of time or memory. `gathered` experts, of ReLU gates, lie
    so that the channels which these shut are not read. Routers are never rounded. `static` adds prefill in fixed
    chunks."""

    name: str = "fp32"
    version: int = 1
    linear: Format = Format()
    embedding: Format = Format()
    head: Format = Format()
    rules: tuple[tuple[str, Format], ...] = ()
    method: str = "rtn"
    smooth: bool = False
    experts: Format | None = None
    low: Format | None = None
    gathered: bool = False
    calibration: Calibration = field(default_factory=Calibration)
    ladder: Ladder | None = None
    static: Static | None = None

    def __post_init__(self):
        if self.static is not None and self.ladder is not None:
            raise _refuse("static is given beside a ladder", "given without one: its matrices change as memory does")
        if (self.method == "bitstack") != (self.ladder is not None) or (self.ladder and self.smooth):
            raise _refuse("method and ladder do not go together", "method bitstack with a ladder and without smooth")
        if self.version != 1:
            raise _refuse(f"version is {self.version!r}", "1")
        experts = self.experts or self.linear
        if self.low is not None and not self.low.bits < experts.bits < 32:
            raise _refuse(f"low is {self.low}", f"of fewer bits than the experts, which are {experts}")
        if self.method not in METHODS:
            raise _refuse(f"method is {self.method!r}", "one of " + ", ".join(METHODS))

    @property
    def calibrated(self) -> bool:
        """Whether its rounding of the weights takes calibration text."""
        return self.smooth or self.method != "rtn"

    @property
    def reads_text(self) -> bool:
        """Whether anything of it takes calibration text."""
        return self.calibrated or (self.static is not None and self.static.bits == 8)

    def stacks(self, tensor: str, role: str) -> bool:
        """Whether this tensor is stacked."""
        ruled = any(fnmatch.fnmatchcase(tensor, pattern) for pattern, _ in self.rules)
        return self.ladder is not None and role == "linear" and not ruled

    def format(self, tensor: str, role: str = "linear") -> Format:
        """The format of `tensor`; `role` is linear, embedding, head, experts or router."""
        if role == "router":
            return Format()
        for pattern, chosen in self.rules:
            if fnmatch.fnmatchcase(tensor, pattern):
                return chosen
        if role == "experts":
            return self.experts or self.linear
        return getattr(self, role)

    def to_json(self) -> bytes:
        return json.dumps(dataclasses.asdict(self), sort_keys=True, indent=1).encode()


# A scale for each 128 inputs, of weights and activations alike, halves what 8 bits lose with one a row (KL on Gemma 3
# 270M .0030 to .0016 nats); prefill is a fifth slower, decoding as fast
_INT8, _INT4, _TABLE = Format(8, 128), Format(4), Format(8)
NAMED = {
    "fp32": Recipe(),
    "int8": Recipe("int8", linear=_INT8, embedding=_INT8, head=_INT8, smooth=True),
    "npu": Recipe("npu", linear=_INT8, embedding=_INT8, head=_INT8, smooth=True, static=Static()),
    "int4": Recipe("int4", linear=_INT4, embedding=_TABLE, head=_INT4, smooth=True),
    "int4-gptq": Recipe("int4-gptq", linear=_INT4, embedding=_TABLE, head=_INT4, method="gptq"),
    "int3-gptq": Recipe("int3-gptq", linear=Format(3), embedding=_TABLE, head=_INT4, method="gptq"),
    "int2-gptq": Recipe("int2-gptq", linear=Format(2), embedding=_TABLE, head=_INT4, method="gptq"),
    "bitstack": Recipe(
        "bitstack", linear=_INT4, embedding=_TABLE, head=_INT4, method="bitstack", ladder=Ladder()
    ),
    "hybrid": Recipe(
        "hybrid", linear=_INT4, embedding=_TABLE, head=_INT4, method="bitstack",
        ladder=Ladder(rungs=(Format(2, 64), Format(2), Format(3), Format(4)), blocks=4),
    ),
}  # fmt: skip


def load(recipe: "str | Path | Recipe") -> Recipe:
    """A recipe from its name, from a TOML file, or itself. Raises UsageError with the field that is wrong."""
    if isinstance(recipe, Recipe):
        return recipe
    if str(recipe) in NAMED:
        return NAMED[str(recipe)]
    path = Path(recipe) if isinstance(recipe, str | Path) else Path()
    if path.suffix != ".toml":
        raise UsageError(
            f"There is no recipe {str(recipe)!r}.",
            f"The named ones are {', '.join(NAMED)}.",
            "Name one, or a .toml file.",
        )
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        raise UsageError(f"The recipe {path} cannot be read.", str(error), "Check the path.") from None
    try:
        raw = tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"The recipe {path} is not TOML.", str(error), "Mend the line that the message names."
        ) from None
    return _recipe({"name": path.stem, **raw})


def _recipe(raw: dict) -> Recipe:
    for key in ("linear", "embedding", "head", "experts", "low"):
        if key in raw:
            raw[key] = _table(Format, raw[key], key)
    if "calibration" in raw:
        raw["calibration"] = _table(Calibration, raw["calibration"], "calibration")
    if "static" in raw:
        static = raw["static"]
        if isinstance(static, dict) and isinstance(static.get("chunks"), list):
            static = {**static, "chunks": tuple(static["chunks"])}
        raw["static"] = _table(Static, static, "static")
    if "ladder" in raw:
        raw["ladder"] = _ladder(raw["ladder"])
    rules = raw.pop("rules", {})
    if not isinstance(rules, dict):
        raise _refuse("rules is not a table", 'lines such as "*.down_proj.weight" = { bits = 8 }')
    raw["rules"] = tuple((pattern, _table(Format, rule, pattern)) for pattern, rule in rules.items())
    return _table(Recipe, raw, "recipe")


def _ladder(raw) -> Ladder:
    rungs = raw.get("rungs", ()) if isinstance(raw, dict) else ()
    if not isinstance(rungs, list | tuple):
        raise _refuse("ladder.rungs is not a list", "a list of tables such as { bits = 2 }")
    if isinstance(raw, dict):
        raw = {**raw, "rungs": tuple(_table(Format, rung, "ladder.rungs") for rung in rungs)}
    return _table(Ladder, raw, "ladder")


def _table(cls, raw, where: str):
    if not isinstance(raw, dict):
        raise _refuse(f"{where} is not a table", "a table")
    known = {item.name: item for item in dataclasses.fields(cls)}
    for key, value in raw.items():
        if key not in known:
            raise _refuse(f"{where} has an unknown field {key!r}", ", ".join(known))
        wanted = known[key].type
        if wanted in (int, str, bool) and type(value) is not wanted:
            raise _refuse(f"{where}.{key} is {value!r}", f"of type {wanted.__name__}")
    return cls(**raw)


def _refuse(what: str, allowed: str) -> UsageError:
    return UsageError("The recipe cannot be used.", f"Its {what}.", f"It must be {allowed}.")
