"""A split network's operating points: what a bundle's section `modes` says, checked, and the codecs that it names.

A mode is a width of the encoder times a codec: an integer for the head's input, and tables for what comes out. The
section is JSON that somebody else wrote, so every field is looked at before it is believed, and what is unknown is
ignored. It knows nothing about links or which mode is to be chosen.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from ..bundle import Bundle
from ..errors import BundleError
from .tables import Tables

ENCODER = "encoder"  # the head's input, int64 [], where it has several
SCORE = "score"  # the head's output, fp32 [n], where it has a filter: the chance that there is something
MAX_MODES = 256
MAX_SECTION = 1 << 20  # bytes of the section `modes`
MAX_CODEC = 4 << 20  # bytes of a section `codec`; the largest tables take 1.1 MiB
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_DIGEST = re.compile(r"(?:[0-9a-f]{64})?")
_COUNT = 1 << 31


@dataclass(frozen=True)
class Mode:
    """One operating point. `encoder` goes into the head's input of that name, 0 where it has none; `codec` names the
    tables, "" where a bundle carries none. `bytes` of a message of one image; `device_ms` of the head and `tail_ms` of
    the tail for one image, `accuracy` from 0 to 1: NaN where nobody measured."""

    id: int
    encoder: int = 0
    codec: str = ""
    bits: int = 0
    bytes: int = 0
    device_ms: float = math.nan
    accuracy: float = math.nan
    tail_ms: float = math.nan


@dataclass(frozen=True)
class ModeTable:
    """The section. `encoder` and `tables` are digests or "". `local` has `device_ms` and `accuracy` of the answer that
    the device can compute alone, and the id 0. `threshold` is the least score, from 0 to 1, with which the head's
    filter lets a message go; NaN where there is no filter."""

    name: str = ""
    encoder: str = ""
    tables: str = ""
    modes: tuple[Mode, ...] = ()
    local: Mode = field(default_factory=lambda: Mode(0))
    threshold: float = math.nan

    def mode(self, number: int) -> Mode | None:
        """The mode of that id, or None."""
        return next((mode for mode in self.modes if mode.id == number), None)


def parse(data: bytes) -> ModeTable:
    """A section's bytes. Raises BundleError that names the field."""
    try:
        said = json.loads(data)
    except (ValueError, RecursionError):
        raise _refuse("they are no JSON") from None
    if not isinstance(said, dict):
        raise _refuse("they are no JSON object")
    texts = {key: said.get(key, "") for key in ("name", "encoder", "tables")}
    for key, text in texts.items():
        if not isinstance(text, str) or (key != "name" and not _DIGEST.fullmatch(text)):
            raise _refuse(f"{key} is {text!r:.80}, not {'a text' if key == 'name' else 'a digest'}")
    entries = said.get("modes")
    if not isinstance(entries, list) or len(entries) > MAX_MODES:
        raise _refuse(f"modes is no list of at most {MAX_MODES}")
    modes = tuple(_mode(entry, f"modes[{place}]") for place, entry in enumerate(entries))
    seen: set[int] = set()
    for place, mode in enumerate(modes):
        if mode.id in seen:
            raise _refuse(f"modes[{place}].id is {mode.id} again")
        seen.add(mode.id)
    local = _mode({"id": 1, "bits": 0, "bytes": 0} | _entry(said.get("local", {}), "local"), "local")
    threshold = said.get("threshold", math.nan)
    if "threshold" in said and (type(threshold) not in (int, float) or not 0 <= threshold <= 1):
        raise _refuse(f"threshold is {threshold!r:.80}, not a number from 0 to 1")
    return ModeTable(**texts, modes=modes, local=replace(local, id=0), threshold=float(threshold))


def read(bundle: Bundle) -> ModeTable:
    """The table of an open bundle. Raises BundleError, also for one that has none."""
    return parse(bundle.bytes(bundle.section("modes"), most=MAX_SECTION))


def codecs(bundle: Bundle, table: ModeTable) -> dict[str, Tables]:
    """The tables that the modes of `table` name, by id. Raises BundleError for one that is missing or damaged, and
    where a mode says other bits than its tables have."""
    found: dict[str, Tables] = {}
    for place, mode in enumerate(table.modes):
        if not mode.codec:
            continue
        if mode.codec not in found:
            section = bundle.find("codec", mode.codec)
            if section is None:
                raise _refuse(f"modes[{place}].codec is {mode.codec!r}, which is no section of the bundle")
            found[mode.codec] = Tables.from_bytes(bundle.bytes(section, most=MAX_CODEC))
        if mode.bits and mode.bits != found[mode.codec].bits:
            raise _refuse(f"modes[{place}].bits is {mode.bits}, and its tables have {found[mode.codec].bits}")
    return found


def scored(outputs: Mapping, table: ModeTable) -> dict:
    """A head's outputs without its filter's score. Raises BundleError unless there is a score where the table has a
    threshold and none where it has not, fp32 [n]."""
    value, wanted = outputs.get(SCORE), not math.isnan(table.threshold)
    if (value is not None) != wanted:
        raise _refuse("there is a threshold for a head without a score" if wanted else "no threshold is for the score")
    if value is not None and (value.dtype != np.float32 or len(value.dims) != 1):
        raise _refuse(f"the threshold is for a score {value.dtype} {list(value.dims)}, not float32 [n]")
    return {name: other for name, other in outputs.items() if name != SCORE}


def dump(table: Mapping) -> bytes:
    """A table as a section's bytes, once they have been read back. Raises BundleError as `parse`."""
    try:
        data = json.dumps(table, sort_keys=True).encode()
    except (TypeError, ValueError) as error:
        raise _refuse(f"they are no JSON ({error})") from None
    parse(data)
    return data


def _mode(entry: object, where: str) -> Mode:
    said = _entry(entry, where)
    numbers = {key: said.get(key, 0) for key in ("id", "encoder", "bits", "bytes")}
    for key, number in numbers.items():
        if type(number) is not int or not (key == "id") <= number < _COUNT:
            raise _refuse(f"{where}.{key} is {number!r:.80}, not a count")
    codec = said.get("codec", "")
    if not isinstance(codec, str) or (codec and not _ID.fullmatch(codec)):
        raise _refuse(f"{where}.codec is {codec!r:.80}, not an id of letters, digits, '_', '.' and '-'")
    figures = {key: said.get(key, math.nan) for key in ("device_ms", "accuracy", "tail_ms")}
    for key, figure in figures.items():
        most = 1 if key == "accuracy" else 1e9
        if key in said and (type(figure) not in (int, float) or not 0 <= figure <= most):
            raise _refuse(f"{where}.{key} is {figure!r:.80}, not a number from 0 to {most:g}")
    device_ms, accuracy, tail_ms = (float(figure) for figure in figures.values())
    return Mode(**numbers, codec=codec, device_ms=device_ms, accuracy=accuracy, tail_ms=tail_ms)


def _entry(entry: object, where: str) -> dict:
    if not isinstance(entry, dict):
        raise _refuse(f"{where} is no JSON object")
    return entry


def _refuse(problem: str) -> BundleError:
    return BundleError("The bundle's modes cannot be used.", f"In its table {problem}.", "Pack the network again.")
