"""The values that backends speak in: a provider that reaches some hardware, a device it found or why it found none, and
what is known of an operator before a provider is asked. Pure: nothing here loads or looks for anything.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..providers import Listed

OURS = "shoal"  # the domain of the kernels' operators


@dataclass(frozen=True)
class Provider:
    """An execution provider as one backend uses it.

    `ep` is ONNX Runtime's name of it, and the one its plugin library is registered under. `module` is the import name
    of the wheel that brings the library, `package` what pip calls that; without a module it is built into some
    onnxruntime. `kinds` are the kinds of hardware that it may list for this backend, the best first. `needs` says in
    words what it takes to have one.
    """

    name: str
    ep: str
    kinds: tuple[str, ...]
    package: str = ""
    module: str = ""
    needs: str = ""


@dataclass(frozen=True)
class Device:
    """Where a graph can run. `simulated` says by what, where it is no such hardware: what it measures is no speed.
    `library` is the plugin's file, "" where the provider is built in."""

    backend: str
    provider: str
    listed: Listed
    settings: Mapping[str, str] = field(default_factory=dict)
    simulated: str = ""
    library: str = ""

    @property
    def name(self) -> str:
        """As a person names it: npu:qnn."""
        return f"{self.backend}:{self.provider}"

    @property
    def title(self) -> str:
        """One line about it."""
        version = f" {self.listed.version}" if self.listed.version else ""
        hardware = f"{self.listed.vendor} {self.listed.kind or self.backend}".strip()
        return f"{hardware} through {self.provider}{version}" + (
            f", simulated by {self.simulated}" if self.simulated else ""
        )


@dataclass(frozen=True)
class Absent:
    """Why a provider has no device here, and what would change that."""

    provider: str
    why: str
    fix: str


@dataclass(frozen=True)
class Operator:
    """A node, as far as rules look at it. `inputs` are their names, "" for one that is left out; `static`: every shape
    is known; `types` are those of its inputs, as numpy calls them, as far as they are known."""

    op: str
    domain: str = ""
    inputs: tuple[str, ...] = ()
    static: bool = True
    types: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """Whether an operator is taken: True, False with `why` and `fix`, or None where only the provider can tell. With
    `broken` the provider takes it and then fails, or computes something else."""

    takes: bool | None
    why: str = ""
    fix: str = ""
    broken: bool = False


UNKNOWN = Verdict(None)


def elsewhere(operator: Operator) -> Verdict | None:
    """What no provider but the CPU's takes: operators of our own library."""
    if operator.domain != OURS:
        return None
    why = f"{operator.op} is an operator of shoal's own kernels, which run on the cpu"
    return Verdict(False, why, "Load with kernels='ort', which says it in ONNX Runtime's operators")
