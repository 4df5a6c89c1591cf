"""Experts on flash: where each expert of a mixture lies in a bundle, and how it is stored.

Sections of kind `experts`: `index` (this, as JSON), `records` and, where a lower precision is kept too, `low`. A record
is one expert of one layer, all of it in one piece, so that one read brings it:

  gate and up   their panels in turn, as of one gated product (runtime/kernels/linear.h), hidden -> 2 ffn
  down          ffn -> hidden
  zeros         up to a multiple of 4,096 bytes, which is what a read past the page cache wants

Experts whose gates shut channels (ReLU) may be gathered: then an up's weights lie together output by output and a
down's input by input (runtime/kernels/gathered.h), so that a token reads those of open channels alone.

Record r = layer * experts + expert begins at byte r * record; layers are counted among those that have experts. Each
has a CRC-32 in the index. `predictor`, optional, is fp32 [layers - 1, experts, hidden]: matrix l times the normed
input of layer l's experts resembles the router's logits at layer l + 1. It knows nothing about files or caches.
"""

import dataclasses
import json
from dataclasses import dataclass

from ..errors import BundleError
from ..kernels.layout import GATHERED_BITS, LinearFormat, gathered_bytes

ALIGNMENT = 4096
MAX_LAYERS, MAX_EXPERTS = 1024, 1024
_SECTIONS = ("records", "low")


@dataclass(frozen=True)
class Precision:
    """One way in which every expert is stored, in the section `section`, `gathered` or in panels throughout."""

    section: str
    gate_up: LinearFormat
    down: LinearFormat
    gathered: bool = False

    @property
    def down_at(self) -> int:
        """Where `down` begins in a record."""
        return -(-self.gate_up.bytes // 64) * 64

    @property
    def down_bytes(self) -> int:
        return gathered_bytes(self.down) if self.gathered else self.down.bytes

    @property
    def record(self) -> int:
        """Bytes from one record to the next."""
        return -(-(self.down_at + self.down_bytes) // ALIGNMENT) * ALIGNMENT

    def to_dict(self) -> dict:
        """As the index has it: a down that is gathered goes by another name, so that nobody takes it for panels."""
        down = "gathered_down" if self.gathered else "down"
        formats = {"gate_up": dataclasses.asdict(self.gate_up), down: dataclasses.asdict(self.down)}
        return {"section": self.section, **formats}

    @classmethod
    def from_dict(cls, raw: dict) -> "Precision":
        """Raises BundleError, or whatever else such values make go wrong."""
        gathered = "gathered_down" in raw
        if gathered and "down" in raw:
            raise _refuse("has two downs")
        down = raw["gathered_down" if gathered else "down"]
        return cls(raw["section"], LinearFormat(**raw["gate_up"]).check(), LinearFormat(**down).check(), gathered)


@dataclass(frozen=True)
class Index:
    """`blocks` are those that have experts, ascending, `experts` of each. `checksums` has for each of `precisions` (the
    best first) the CRC-32 of every record, padding included."""

    blocks: tuple[int, ...]
    experts: int
    precisions: tuple[Precision, ...]
    checksums: tuple[tuple[int, ...], ...]

    @property
    def layers(self) -> int:
        return len(self.blocks)

    def offset(self, precision: int, layer: int, expert: int) -> int:
        """Of a record in its section."""
        return (layer * self.experts + expert) * self.precisions[precision].record

    def to_json(self) -> bytes:
        precisions = [one.to_dict() for one in self.precisions]
        return json.dumps(dataclasses.asdict(self) | {"precisions": precisions}, sort_keys=True).encode()

    @classmethod
    def from_json(cls, data: bytes) -> "Index":
        """Reads untrusted bytes. Raises BundleError that says what is wrong."""
        try:
            raw = json.loads(data)
            precisions = tuple(map(Precision.from_dict, raw["precisions"]))
            found = cls(tuple(raw["blocks"]), raw["experts"], precisions, tuple(tuple(one) for one in raw["checksums"]))
            found._check()
        except BundleError:
            raise
        except Exception as error:  # whatever a hostile JSON makes go wrong
            raise _refuse(f"is not what a converter writes ({type(error).__name__}: {error!s:.80})") from None
        return found

    def _check(self) -> None:
        if not 1 <= len(self.blocks) <= MAX_LAYERS or any(type(block) is not int for block in self.blocks):
            raise _refuse("has no layers, too many, or none that are numbers")
        if list(self.blocks) != sorted(set(self.blocks)) or self.blocks[0] < 0:
            raise _refuse("has layers out of order")
        if type(self.experts) is not int or not 1 <= self.experts <= MAX_EXPERTS:
            raise _refuse(f"has {self.experts!r:.20} experts a layer")
        if not 1 <= len(self.precisions) == len(self.checksums) <= len(_SECTIONS):
            raise _refuse("has no precision, too many, or other checksums than precisions")
        for one, section, checksums in zip(self.precisions, _SECTIONS, self.checksums, strict=False):
            if one.section != section:
                raise _refuse(f"names a section {one.section!r:.20}, not {section!r}")
            if one.gate_up.outputs != 2 * one.down.inputs or one.gate_up.inputs != one.down.outputs:
                raise _refuse("has matrices that do not follow each other")
            if one.down.inputs % 16:
                raise _refuse(f"has experts of {one.down.inputs} channels, not whole panels of 16")
            if one.gathered and (not {one.gate_up.bits, one.down.bits} <= set(GATHERED_BITS) or one.down.rotated):
                raise _refuse("gathers what is rotated, or of 3 bits")
            if (one.gate_up.inputs, one.down.inputs) != (self.precisions[0].gate_up.inputs,
                                                         self.precisions[0].down.inputs):  # fmt: skip
                raise _refuse("has precisions of other shapes")
            if len(checksums) != self.layers * self.experts:
                raise _refuse(f"has {len(checksums)} checksums for {self.layers * self.experts} experts")
            if any(type(value) is not int or not 0 <= value < 1 << 32 for value in checksums):
                raise _refuse("has checksums that are no CRC-32")


def _refuse(problem: str) -> BundleError:
    return BundleError(
        "The bundle's experts cannot be used.", f"Their index {problem}.", "Convert the checkpoint again."
    )
