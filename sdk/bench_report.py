"""A bench report as text: Markdown for people, CSV for tables, JSON for programs. It measures nothing."""

import csv
import io
import json
from collections.abc import Iterable

from .show import size

FORMS = ("md", "csv", "json")
_QUIET = 0.1  # cores: with more, engines whose threads wait for each other lose far more than their share
_FACTS = (
    "model", "recipe", "digest", "shoal", "onnxruntime", "processor", "threads", "time_to_first_token_s",
    "peak_anonymous_bytes", "stream_read_gb_per_s", "cores_of_others",
)  # fmt: skip


def render(report: dict, form: str) -> str:
    """The report in one of FORMS."""
    if form == "json":
        return json.dumps(report, indent=1) + "\n"
    return _csv(report) if form == "csv" else _markdown(report)


def _csv(report: dict) -> str:
    """A row for each test and arm, and for each window of a sustained run; the run's own figures in every row."""
    facts = {key: report[key] for key in _FACTS}
    facts |= {f"load_{kind}_s": seconds for kind, seconds in report["load_s"].items()}
    found = [{key: value for key, value in row.items() if key != "speeds"} | facts for row in report["results"]]
    for window in report.get("sustained", ()):
        found.append({
            "arm": report["results"][0]["arm"], "test": "sustained", "kind": "tg", "tokens": window["tokens"],
            "mean": window["decode_tokens_per_s"], **facts,
            "at_s": window["at_s"], "celsius": window["celsius"], "joules": window["joules"],
        })  # fmt: skip
    columns = dict.fromkeys(key for row in found for key in row)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return text.getvalue()


def _markdown(report: dict) -> str:
    against = any(row["ratio"] is not None for row in report["results"])
    header = ["arm", "test", "tokens/s", "GB/s", "of stream read"] + ["ratio"] * against
    table = []
    for row in report["results"]:
        cells = [
            row["arm"], row["test"], f"{row['mean']:.1f} ± {row['deviation']:.1f}",
            "" if row["gb_per_s"] is None else f"{row['gb_per_s']:.1f}",
            "" if row["of_stream_read"] is None else f"{row['of_stream_read']:.0%}",
        ]  # fmt: skip
        table.append(cells + ["" if row["ratio"] is None else f"{row['ratio']:.2f}"] * against)
    lines = [_line(header), _line(["---", "---", *["---:"] * (len(header) - 2)]), *map(_line, table), ""]
    load, note = report["load_s"], report["load_note"]
    cold = "unavailable" if load["cold"] is None else f"{load['cold']:.2f} s"
    peaks = report["peak_anonymous_of"]
    stream = report["stream_read_gb_per_s"]
    facts = {
        "model": f"{report['model']}, {report['recipe']}, bundle {report['digest'][:12]}",
        "machine": f"{report['processor']}, {report['threads']} threads",
        "devices": "; ".join(report["devices"].values()),
        "other processes": _beside(report["cores_of_others"]),
        "software": f"shoal {report['shoal']}, onnxruntime {report['onnxruntime']}",
        "first token": f"{report['time_to_first_token_s']:.3f} s",
        "load": f"{cold} cold{f' ({note})' if note else ''}, {load['warm']:.2f} s warm",
        "peak anonymous": "unavailable" if None in peaks.values() else
                          f"{size(peaks['loading'])} while loading, {size(peaks['running'])} while running, "
                          f"planned {size(report['planned_anonymous_bytes'])}",
        "weights of a step": size(report["step_bytes"])
                             + (f", read alone at {stream:.1f} GB/s" if stream is not None else ""),
        "nodes": ", ".join(f"{name} {count}" for name, count in report["backend_nodes"].items()),
    }  # fmt: skip
    for name, held in report["memory"].items():
        if held and against:
            facts[f"process of {name}"] = ", ".join(
                f"{size(count)} {key.removesuffix('_bytes').replace('_', ' ')}" for key, count in held.items()
            )
    if report.get("sustained"):
        facts["sustained"] = _sustained(report["sustained"])
    return "\n".join([*lines, *(f"- {name}: {value}" for name, value in facts.items())]) + "\n"


def _beside(cores: float | None) -> str:
    if cores is None:
        return "unavailable"
    return f"{cores:.2f} cores busy" + (", so these figures are not to be trusted" if cores > _QUIET else "")


def _sustained(windows: list[dict]) -> str:
    speeds = [window["decode_tokens_per_s"] for window in windows]
    heat = [window["celsius"] for window in windows if window["celsius"] != "unavailable"]
    joules = windows[-1]["joules"]
    made = sum(window["tokens"] for window in windows)
    return "; ".join([
        f"{len(windows)} windows over {windows[-1]['at_s']:.0f} s",
        f"first {speeds[0]:.1f}, lowest {min(speeds):.1f}, last {speeds[-1]:.1f} tokens/s",
        f"temperature {f'{heat[0]:.0f} to {max(heat):.0f} °C' if heat else 'unavailable'}",
        f"energy {'unavailable' if joules == 'unavailable' else f'{joules:.0f} J, {joules / made:.2f} J a token'}",
    ])  # fmt: skip


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"
