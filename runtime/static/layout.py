"""What a bundle holds for prefill in fixed chunks on another processor: static graphs, and the steps through them.

A prompt's chunk goes through a list of `steps`. Each takes named values, fp32 [chunk, width] rows of one token each,
and gives others. Of three kinds:

- a `Call` of a graph: on the device a static one, made for each chunk length (llm.npu's chunk-sharing graphs, Xu et
  al., ASPLOS 2025); on the CPU one for any number of rows;
- an `Attend`: rotary positions, the cache of one block, attention. Only here rows meet, and only the real ones;
- a `Shadow`: the outlier path. A product on the device multiplies q = clip(round(x / scale), -128, 127); what clipping
  took away, r = round(x / scale) - q, is zero but in few channels, and the CPU multiplies it beside the device. Who
  takes the product's value takes the shadow's as well and adds them, so that clipping loses nothing.

Values are named for their part in a block, not for the block: a name is written again in the next one. A chunk runs its
steps in their order, or in any order that keeps who writes a value behind who wrote or read it before.

The index is JSON, section (`static`, `index`). Static graphs are sections of kind `graph` with role `static`, the
device's backend and their chunk; those of the CPU have role `prefill`. Their weights are in the section (`weights`,
`static`). This module knows nothing about engines, devices or tokens.
"""

import json
from dataclasses import dataclass

from ..errors import BundleError

KIND, SECTION = "static", "static"  # of the index; of the weights
STATIC, PREFILL = "static", "prefill"  # roles of graphs
VERSION = 1
MAX_INDEX = 64 << 20  # bytes
MAX_STEPS, MAX_VALUES, MAX_WIDTH, MAX_CHUNK = 1 << 16, 64, 1 << 20, 1 << 16
TOKENS = "tokens"  # what the first call takes: int64 [1, chunk], and no value


@dataclass(frozen=True)
class Call:
    """A run of the graph `name` for `block`: values in by their names, out by theirs. With `device` there is one graph
    for each chunk length, called `graph_name(name, chunk)`; otherwise it is `name`, for the CPU."""

    name: str
    block: int
    takes: tuple[str, ...]
    gives: tuple[str, ...]
    device: bool = True


@dataclass(frozen=True)
class Attend:
    """Attention of `block`: Q, K and V side by side are the sum of `takes`. Its graph, for the CPU, is called `name`,
    with `.fp16` and `.int8` behind it for such caches, and has the inputs of a decode graph's CachedAttention: `qkv`
    [1, rows, width], `past_key`, `past_value`, `last`, `total`, `cos`, `sin`; outputs `y`, `present_key`,
    `present_value`."""

    name: str
    block: int
    takes: tuple[str, ...]
    gives: str


@dataclass(frozen=True)
class Shadow:
    """gives = scale * sum over channels j of r[:, j] * weights[j] * scales, r = round(x / scale) clipped away, x the
    value that it takes.

    `weights` int8 [inputs, outputs] and `scales` fp32 [outputs] lie at these offsets of the section. `hot` are the
    channels that calibration found beyond the clip, whose rows are worth keeping in memory; others are read when one
    comes. `importance` is what leaving this shadow out costs, as the converter measured it."""

    block: int
    takes: str
    gives: str
    scale: float
    inputs: int
    outputs: int
    weights: int
    scales: int
    hot: tuple[int, ...]
    importance: float


Step = Call | Attend | Shadow


@dataclass(frozen=True)
class Static:
    """`widths` has every value's; `chunks` the lengths, ascending; `stream` is the value that the last block gives, of
    which the graph `head` (for the CPU: `x` [rows, width] -> `logits`) makes logits. `backend` is what the static
    graphs were made for."""

    backend: str
    chunks: tuple[int, ...]
    widths: dict[str, int]
    steps: tuple[Step, ...]
    stream: str
    head: str

    @property
    def names(self) -> list[str]:
        """Of all device graphs, without their chunk."""
        return list(dict.fromkeys(step.name for step in self.steps if isinstance(step, Call) and step.device))

    def to_json(self) -> bytes:
        raw = {
            "version": VERSION, "backend": self.backend, "chunks": self.chunks, "widths": self.widths,
            "steps": [{"kind": type(step).__name__.lower(), **vars(step)} for step in self.steps],
            "stream": self.stream, "head": self.head,
        }  # fmt: skip
        return json.dumps(raw, sort_keys=True).encode()

    @classmethod
    def from_json(cls, data: bytes) -> "Static":
        """Reads untrusted bytes; unknown keys are ignored. Raises BundleError naming the field that is wrong."""
        try:
            raw = json.loads(data)
        except (ValueError, RecursionError):
            raw = None
        if not isinstance(raw, dict) or raw.get("version") != VERSION:
            raise _refuse(f"index is not JSON of version {VERSION}")
        widths, chunks, listed = raw.get("widths"), raw.get("chunks"), raw.get("steps")
        if not isinstance(widths, dict) or not 0 < len(widths) <= MAX_VALUES:
            raise _refuse(f"widths are not 1 to {MAX_VALUES} by name")
        for name, width in widths.items():
            if not _is_name(name) or not _whole(width, 1, MAX_WIDTH):
                raise _refuse(f"widths.{name!r:.40} is {width!r:.40}")
        if not isinstance(chunks, list) or not chunks or not all(_whole(chunk, 1, MAX_CHUNK) for chunk in chunks):
            raise _refuse(f"chunks are not lengths of 1 to {MAX_CHUNK}")
        if sorted(set(chunks)) != chunks:
            raise _refuse("chunks do not rise")
        if not isinstance(listed, list) or not 0 < len(listed) <= MAX_STEPS:
            raise _refuse(f"steps are not a list of 1 to {MAX_STEPS}")
        steps = tuple(_step(entry, widths, f"steps[{at}]") for at, entry in enumerate(listed))
        words = [raw.get(key) for key in ("backend", "stream", "head")]
        if not all(map(_is_name, words)):
            raise _refuse("backend, stream or head is not a name")
        found = cls(words[0], tuple(chunks), dict(widths), steps, words[1], words[2])  # type: ignore[arg-type]
        written = {TOKENS}
        for at, step in enumerate(steps):
            if missing := [name for name in takes(step) if name not in written]:
                raise _refuse(f"steps[{at}] takes {missing[0]!r:.40}, which nothing before it gives")
            written.update(gives(step))
        if found.stream not in written - {TOKENS}:
            raise _refuse(f"stream {found.stream!r:.40} is given by no step")
        return found


def takes(step: Step) -> tuple[str, ...]:
    """The values that a step reads."""
    return (step.takes,) if isinstance(step, Shadow) else step.takes


def gives(step: Step) -> tuple[str, ...]:
    """The values that a step writes."""
    return step.gives if isinstance(step, Call) else (step.gives,)


def graph_name(name: str, chunk: int) -> str:
    """Of the static graph `name` for chunks of this length."""
    return f"static.{chunk}.{name}"


def _step(raw: object, widths: dict[str, int], where: str) -> Step:
    if not isinstance(raw, dict) or raw.get("kind") not in ("call", "attend", "shadow"):
        raise _refuse(f"{where} is not a call, attend or shadow")
    block = raw.get("block")
    if not _whole(block, 0, MAX_STEPS):
        raise _refuse(f"{where}.block is {block!r:.40}")

    def values(key: str, more: tuple[str, ...] = ()) -> tuple[str, ...]:
        found = raw.get(key)
        if not isinstance(found, list) or not found or not all(map(_is_name, found)):
            raise _refuse(f"{where}.{key} is not a list of values")
        if unknown := [name for name in found if name not in widths and name not in more]:
            raise _refuse(f"{where}.{key} names {unknown[0]!r:.40}, which has no width")
        return tuple(found)

    def value(key: str) -> str:
        if not _is_name(raw.get(key)) or raw[key] not in widths:
            raise _refuse(f"{where}.{key} is {raw.get(key)!r:.40}, which has no width")
        return raw[key]

    if raw["kind"] == "shadow":
        fields = {key: raw.get(key) for key in ("inputs", "outputs", "weights", "scales")}
        if not all(_whole(size, 0, 1 << 48) for size in fields.values()):
            raise _refuse(f"{where} has a size or offset that is not a whole number")
        scale, importance, hot = raw.get("scale"), raw.get("importance"), raw.get("hot")
        if not _number(scale) or not 0 < scale < 1e30 or not _number(importance):  # type: ignore[operator]
            raise _refuse(f"{where}.scale is {scale!r:.40}, importance {importance!r:.40}")
        source, target = value("takes"), value("gives")
        if (widths[source], widths[target]) != (fields["inputs"], fields["outputs"]):
            raise _refuse(
                f"{where} multiplies {fields['inputs']} x {fields['outputs']}, its values are of other widths"
            )
        if not isinstance(hot, list) or not all(_whole(channel, 0, widths[source] - 1) for channel in hot):
            raise _refuse(f"{where}.hot are not channels")
        return Shadow(block, source, target, float(scale), hot=tuple(hot), importance=float(importance), **fields)  # type: ignore[arg-type]
    if not _is_name(raw.get("name")):
        raise _refuse(f"{where}.name is {raw.get('name')!r:.40}")
    if raw["kind"] == "attend":
        return Attend(raw["name"], block, values("takes"), value("gives"))  # type: ignore[arg-type]
    device = raw.get("device", True)
    if type(device) is not bool:
        raise _refuse(f"{where}.device is {device!r:.40}")
    return Call(raw["name"], block, values("takes", (TOKENS,)), values("gives"), device)  # type: ignore[arg-type]


def _is_name(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 120 and value.isprintable()


def _whole(value: object, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300  # type: ignore[arg-type]


def _refuse(why: str) -> BundleError:
    return BundleError("The bundle's static graphs cannot be used.", f"Its {why}.", "Convert the checkpoint again.")
