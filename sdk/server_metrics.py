"""Counters in Prometheus' text format (exposition format 0.0.4). Knows nothing about what it counts.

Label values come from code, never from a client, so the number of series is bounded.
"""

from collections.abc import Iterable

BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)  # seconds

_HELP = {
    "shoal_requests_total": ("counter", "Requests answered, by endpoint and HTTP status (499: the client went away)."),
    "shoal_request_seconds": ("histogram", "From a request's arrival to its last byte, by endpoint."),
    "shoal_first_token_seconds": ("histogram", "From an answer's submission to its first token, by model."),
    "shoal_prompt_tokens_total": ("counter", "Prompt tokens, by model."),
    "shoal_cached_tokens_total": ("counter", "Prompt tokens that were not computed again, by model."),
    "shoal_generated_tokens_total": ("counter", "Generated tokens, by model."),
    "shoal_slots": ("gauge", "Requests that run at once, by model."),
    "shoal_slots_busy": ("gauge", "Requests that run now, by model."),
    "shoal_queue_depth": ("gauge", "Requests that wait for a slot, by model."),
    "shoal_queue_limit": ("gauge", "Requests that may wait, by model."),
    "shoal_stack_entries": ("gauge", "Entries of its stack that a model computes with, by model."),
    "shoal_stack_entries_limit": ("gauge", "Entries that the stack has, by model."),
    "shoal_stack_bytes": ("gauge", "Bytes of the stack that are resident, by model."),
}

Labels = tuple[tuple[str, str], ...]


class Metrics:
    """`count` adds, `observe` fills a histogram; both are used from the event loop's thread only."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, Labels], float] = {}
        self._histograms: dict[tuple[str, Labels], list[float]] = {}

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        key = (name, tuple(labels.items()))
        self._counts[key] = self._counts.get(key, 0) + amount

    def observe(self, name: str, seconds: float, **labels: str) -> None:
        row = self._histograms.setdefault((name, tuple(labels.items())), [0.0] * (len(BUCKETS) + 2))
        for index, edge in enumerate(BUCKETS):
            row[index] += seconds <= edge
        row[-2] += 1
        row[-1] += seconds

    def render(self, gauges: Iterable[tuple[str, dict[str, str], float]] = ()) -> str:
        """Everything, with `gauges` (name, labels, value) as they are now."""
        lines: dict[str, list[str]] = {}
        for (name, labels), value in self._counts.items():
            lines.setdefault(name, []).append(_line(name, labels, value))
        for name, named, value in gauges:
            lines.setdefault(name, []).append(_line(name, tuple(named.items()), value))
        for (name, labels), row in self._histograms.items():
            block = lines.setdefault(name, [])
            edges = [*(f"{edge:g}" for edge in BUCKETS), "+Inf"]
            block += [_line(f"{name}_bucket", (*labels, ("le", edge)), n) for edge, n in zip(edges, row, strict=False)]
            block += [_line(f"{name}_sum", labels, row[-1]), _line(f"{name}_count", labels, row[-2])]
        text = []
        for name, (kind, meaning) in _HELP.items():
            if name in lines:
                text += [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}", *lines[name]]
        return "\n".join(text) + "\n"


def _line(name: str, labels: Labels, value: float) -> str:
    inside = ",".join(f'{key}="{_escape(text)}"' for key, text in labels)
    return f"{name}{{{inside}}} {value:.10g}" if inside else f"{name} {value:.10g}"


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
