"""What a conversion did, as values: sizes, times, memory, and how far the result is from its source.

It knows nothing about how they are measured, so that whoever shows them loads no engine.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from shoal.runtime.errors import BundleError


@dataclass(frozen=True)
class Parity:
    """Converted against source in fp32, over `tokens` tokens of `texts` texts.

    Differences are of logits, of an encoder's embeddings, or of the stream where a part ends early. `block_errors[b]`
    is |converted - source| / |source| of the stream after block b (in a part, its b-th), the mean over tokens, each
    model fed by its own blocks (but a part's first by the source's); `first_divergent_block` is the first where it is
    so large that something is wrong there. Language models: `kl` is KL(source || converted) in nats
    a token, `top1_agreement` the share of tokens after which both find the same most likely, perplexities are of the
    held-out text. Encoders: `cosine` is the smallest.
    """

    texts: int
    tokens: int
    max_abs_difference: float
    mean_abs_difference: float
    block_errors: tuple[float, ...]
    first_divergent_block: int | None = None
    kl: float | None = None
    top1_agreement: float | None = None
    perplexity: float | None = None
    source_perplexity: float | None = None
    cosine: float | None = None

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, raw) -> "Parity":
        """Reads untrusted values; unknown keys are ignored. Raises BundleError naming the field that is wrong."""
        values: dict[str, Any] = {}
        for item in dataclasses.fields(cls):
            value = raw.get(item.name, item.default) if isinstance(raw, dict) else dataclasses.MISSING
            if item.name == "block_errors" and isinstance(value, list | tuple) and all(map(_number, value)):
                values[item.name] = tuple(map(float, value))
            elif item.name != "block_errors" and (_number(value) or (value is None and item.default is None)):
                values[item.name] = value
            else:
                raise BundleError(
                    "The bundle's parity figures cannot be read.", f"Field {item.name!r} is missing or wrong.",
                    "Convert the checkpoint again.",
                )  # fmt: skip
        return cls(**values)


def parity_to_json(figures: Mapping[str, Parity | None]) -> bytes:
    """The bundle's section: figures by name."""
    raw = {name: found.to_dict() if found else None for name, found in figures.items()}
    return json.dumps(raw, sort_keys=True, indent=1, allow_nan=False).encode()


def parity_from_json(data: bytes) -> dict[str, Parity | None]:
    """Reads the section, untrusted. Raises BundleError."""
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError):
        raw = None
    if not isinstance(raw, dict):
        raise BundleError("The bundle's parity figures cannot be read.", "They are not JSON.", "Convert again.")
    return {name: None if value is None else Parity.from_dict(value) for name, value in raw.items()}


@dataclass(frozen=True)
class Report:
    """`seconds` by stage; bytes of the source and the bundle; `peak_bytes` is the most private memory that the process
    held (0 where the system does not tell); `parity` and `baseline` compare with the source, the second rounded to
    nearest where the recipe is cleverer; `tried` has the perplexities by which auto chose."""

    bundle: str
    source: str
    model_type: str
    recipe: str
    source_bytes: int
    bundle_bytes: int
    bits_per_weight: float
    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: int = 0
    parity: dict | None = None
    baseline: dict | None = None
    tried: dict[str, float] | None = None

    def to_dict(self) -> dict:
        return dict(vars(self))

    @property
    def rows(self) -> list[tuple[str, str]]:
        """(label, value) pairs for a person."""
        mib = 1 << 20
        found = [
            ("bundle", self.bundle),
            ("model", f"{self.source} ({self.model_type})"),
            ("recipe", f"{self.recipe}, {self.bits_per_weight:.2f} bits a weight"),
            ("size", f"{self.source_bytes / mib:.1f} MiB -> {self.bundle_bytes / mib:.1f} MiB"),
            ("time", ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in self.seconds.items())),
        ]
        if self.tried:
            figures = ", ".join(f"{name} {value:.2f}" for name, value in self.tried.items())
            found.append(("chosen among", f"{figures} (perplexity at this size)"))
        if self.peak_bytes:
            found.append(("peak memory", f"{self.peak_bytes / mib:.0f} MiB private"))
        for label, values in (("parity", self.parity), ("rounded to nearest", self.baseline)):
            if values:
                found.append((label, describe_parity(values)))
        return found


def describe_parity(values: dict) -> str:
    """One line of the figures that a parity run gives."""
    wanted = (
        ("top1_agreement", "top-1 agreement {:.1%}"), ("kl", "KL {:.5f} nats"), ("perplexity", "perplexity {:.3f}"),
        ("source_perplexity", "source {:.3f}"), ("cosine", "cosine {:.6f}"),
        ("max_abs_difference", "max difference {:.2e}"), ("first_divergent_block", "first divergent block {}"),
    )  # fmt: skip
    found = [text.format(values[key]) for key, text in wanted if values.get(key) is not None]
    errors = values.get("block_errors")
    if errors and values.get("top1_agreement") is None and values.get("cosine") is None:  # a part that ends early
        found.insert(0, f"relative error {errors[-1]:.2%} after its last block")
    return ", ".join(found)


def _number(value) -> bool:
    return type(value) in (int, float) and -1e300 < value < 1e300
