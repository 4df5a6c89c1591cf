"""The Qualcomm processors that context binaries can be compiled for ahead, by their part numbers.

The numbers are QNN's: `model` is its SoC model, `arch` the version of the Hexagon in it (Qualcomm's QNN SDK, "Supported
Snapdragon Devices"; the same table is in ExecuTorch's qc_schema.py). Pure.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..errors import UsageError


@dataclass(frozen=True)
class Soc:
    """A processor: `name` is its part number, small; `arch` and `model` as QNN numbers them."""

    name: str
    title: str
    arch: int
    model: int

    @property
    def settings(self) -> dict[str, str]:
        """What QNN's provider is told."""
        return {"htp_arch": str(self.arch), "soc_model": str(self.model)}


KNOWN = {
    soc.name: soc
    for soc in (
        Soc("sm8450", "Snapdragon 8 Gen 1", 69, 36),
        Soc("sm8475", "Snapdragon 8+ Gen 1", 69, 42),
        Soc("sm8550", "Snapdragon 8 Gen 2", 73, 43),
        Soc("sm8650", "Snapdragon 8 Gen 3", 75, 57),
        Soc("sm8750", "Snapdragon 8 Elite", 79, 69),
        Soc("sm8850", "Snapdragon 8 Elite Gen 5", 81, 87),
    )
}


def parse(words: Iterable[str]) -> list[Soc]:
    """The processors of ["qnn:sm8650", ...], each once. Raises UsageError, which lists the known ones."""
    found = {}
    for word in words:
        provider, _, name = word.lower().partition(":") if isinstance(word, str) else ("", "", "")
        if provider != "qnn" or name not in KNOWN:
            known = ", ".join(f"qnn:{soc.name} ({soc.title})" for soc in KNOWN.values())
            raise UsageError(
                f"Nothing can be compiled for {word!r:.60}.", f"Known are {known}.",
                "Name one of these; any other device compiles for itself, when the model is first loaded.",
            )  # fmt: skip
        found[name] = KNOWN[name]
    return list(found.values())


def named(settings: Mapping[str, str]) -> str:
    """The name of the processor that a device's settings say, "" where they say none that is known."""
    model = settings.get("soc_model", "")
    return next((soc.name for soc in KNOWN.values() if str(soc.model) == model), "")
