"""Where each node of a graph runs, why some do not run where they were meant to, and whether that is enough.

Pure: from what the engine assigned and what providers logged to values, a table and a refusal.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import BackendError, UsageError
from ..providers import Assigned
from .provider import Verdict

_SHOWN = 12  # lines of a refusal; the rest is counted
_NAMES = 3  # of nodes on a line
_SILENT = "ONNX Runtime left it to the cpu and the provider does not say why"
# As QNN's provider and WebGPU's say it in their logs
_QNN = re.compile(r"Operator type: (\S+) Node name: (.*?) Node index: \d+\s+(?:.*?\n)*?\s*REASON : (.+)")
_WEBGPU = re.compile(r"kernel not found in registries for Op type: (\S+) node name: (.*)")
_SENTENCE = re.compile(r"(?<=[.!])\s*(?=[A-Z])|\n")


@dataclass(frozen=True)
class Node:
    """A node and who took it; `why` and `fix` are said where that is not who was meant to, or `broken`: where it was
    taken, and is known to fail or to compute something else."""

    name: str
    op: str
    domain: str
    provider: str
    why: str = ""
    fix: str = ""
    broken: bool = False


@dataclass(frozen=True)
class Placement:
    """All nodes of a graph that was meant for `backend` (npu, gpu, cpu), whose provider is `provider`."""

    backend: str
    provider: str
    nodes: tuple[Node, ...]

    @property
    def fallen(self) -> list[Node]:
        """The nodes that the backend did not take, or should not have."""
        return [node for node in self.nodes if node.provider != self.provider or node.broken]

    @property
    def share(self) -> float:
        """The share of the nodes that run on the backend; 1 of a graph without nodes."""
        return 1 - len(self.fallen) / len(self.nodes) if self.nodes else 1.0

    def rows(self) -> list[tuple[int, str, str, str, str]]:
        """(how many, of which operators, some of their names, why, fix) of the nodes that fell back, one row a reason;
        the most first."""
        groups: dict[tuple[str, str], list[Node]] = {}
        for node in self.fallen:
            groups.setdefault((node.why, node.fix), []).append(node)
        found = []
        for (why, fix), nodes in sorted(groups.items(), key=lambda one: (-len(one[1]), one[0])):
            ops = Counter(f"{node.domain}.{node.op}".lstrip(".") for node in nodes).most_common()
            names = [node.name for node in nodes if node.name]
            more = f" and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
            said = ", ".join(f"{count} {op}" for op, count in ops)
            found.append((len(nodes), said, ", ".join(names[:_NAMES]) + more, why, fix))
        return found

    def check(self, share: float = 1.0) -> None:
        """Raises BackendError, with `placement`, where less than `share` of the nodes run on the backend, or one is
        there that is known to fail."""
        broken = any(node.broken for node in self.nodes)
        if self.share >= share and not broken:
            return
        rows = self.rows()
        lines = [f"- {ops} ({names}): {why}. {fix}." for _, ops, names, why, fix in rows[:_SHOWN]]
        if len(rows) > _SHOWN:
            left = sum(row[0] for row in rows[_SHOWN:])
            lines.append(f"- {left} more for {len(rows) - _SHOWN} other reasons")
        at_most = int(self.share * 1000) / 1000
        less = f"ask for at most {self.backend}={at_most:g}, " if at_most and not broken else ""
        what = f"{self.share:.1%} of the nodes run on the {self.backend}, {share:.1%} must."
        said = "fell back to the cpu, or are known to fail:" if broken else "fell back to the cpu:"
        error = BackendError(
            what if self.share < share else f"The {self.backend} takes nodes that fail there.",
            "\n".join([f"Of {len(self.nodes)} nodes {len(self.fallen)} {said}", *lines]),
            f"Do what stands behind each, {less}or choose the backend cpu.",
        )
        error.placement = self
        raise error


def place(
    backend: str, provider: str, assigned: Iterable[Assigned], messages: Sequence[str],
    judge: Callable[[Assigned], Verdict],
) -> Placement:  # fmt: skip
    """The placement: of each node that fell back the reason is the provider's own word in its log, `judge`'s where it
    said none, and the fix is `judge`'s."""
    said = reasons(messages)
    nodes = []
    for one in assigned:
        why = fix = ""
        verdict, taken = judge(one), one.provider == provider
        if taken and verdict.broken:
            why, fix = verdict.why, verdict.fix
        elif not taken:
            why = said.get((one.op, one.name)) or verdict.why or _SILENT
            if "shape" in why.lower() and "static" in verdict.why:
                why = verdict.why  # QNN's "Cannot get shape"
            fix = verdict.fix or f"Run it on the cpu, or cut the graph so that {backend} is not asked for it"
        nodes.append(Node(one.name, one.op, one.domain, one.provider, why, fix, taken and verdict.broken))
    return Placement(backend, provider, tuple(nodes))


def reasons(messages: Iterable[str]) -> dict[tuple[str, str], str]:
    """(operator, node's name) -> why a provider refused it, from the log of the engine."""
    found: dict[tuple[str, str], str] = {}
    for message in messages:
        for op, name, why in _QNN.findall(message):
            found[op, name] = _SENTENCE.split(why.strip())[0].rstrip(".")
        for op, name in _WEBGPU.findall(message):
            found[op, name.strip()] = f"WebGPU has no kernel for {op} of these types"
    return found


def required(words: Iterable[str]) -> dict[str, float]:
    """{"npu": 0.9} from ["npu=0.9"]. Raises UsageError."""
    found = {}
    for word in words:
        backend, _, number = word.partition("=")
        try:
            share = float(number)
        except ValueError:
            share = -1.0
        found[backend] = share
    check_required(found)
    return found


def check_required(require: Mapping[str, float]) -> None:
    """Raises UsageError for what is no share of a backend that can be required."""
    for backend, share in require.items():
        if backend not in ("npu", "gpu") or not 0 <= share <= 1:
            raise UsageError(
                f"{backend}={share:g} cannot be required.", "It is a backend (npu or gpu) and a share from 0 to 1.",
                "Write --require npu=0.9.",
            )  # fmt: skip
