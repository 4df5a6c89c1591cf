"""What a conversion did, as a value: sizes, times, memory, and how far the result is from its source."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Report:
    """`seconds` by stage; bytes of the source and the bundle; `peak_bytes` is the most private memory that the process
    held (0 where the system does not tell); `parity` and `baseline` compare with the source, the second rounded to
    nearest where the recipe is cleverer."""

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
        ("source_perplexity", "source {:.3f}"), ("cosine", "cosine {:.6f}"), ("max_abs_difference", "max difference {:.2e}"),
        ("first_divergent_block", "first divergent block {}"),
    )  # fmt: skip
    return ", ".join(text.format(values[key]) for key, text in wanted if values.get(key) is not None)
