"""A report on quality at a size as a table, a picture, Markdown, a page or JSON. It measures nothing; the names in a
report are taken as hostile."""

import json
from collections.abc import Iterable
from html import escape
from pathlib import Path

from shoal.runtime.errors import UsageError

from .chart import Line, draw

FORMS = ("html", "svg", "md", "json")
_MIB = 1 << 20
_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
svg {{ width: 100%; height: auto }}
table {{ border-collapse: collapse; width: 100% }}
th, td {{ padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #8886 }}
</style>
<h1>Quality at a size</h1>
{chart}
<table>
<caption>Perplexity of the largest part that fits a size; the best of each is bold</caption>
<thead><tr>{heading}</tr></thead>
<tbody>
{rows}
</tbody>
</table>
<ul>
{facts}
</ul>
</html>
"""


def form_of(path: str) -> str:
    """The form that a file's name asks for. Raises UsageError for any other."""
    form = Path(path).suffix[1:].lower()
    if form not in FORMS:
        ends = ", ".join(f".{form}" for form in FORMS)
        raise UsageError(f"{path} has no form.", f"Its name ends in none of {ends}.", "Name it so.")
    return form


def render(report: dict, form: str) -> str:
    """The report in one of FORMS."""
    if form == "json":
        return json.dumps(report, indent=1, allow_nan=False) + "\n"
    return {"svg": chart, "md": _markdown, "html": _html}[form](report)


def chart(report: dict) -> str:
    """Bytes against perplexity, an SVG."""
    curves = report["curves"]
    lines = [
        Line(curve["label"], tuple((point["bytes"] / _MIB, point["perplexity"]) for point in curve["points"]))
        for curve in curves
    ]
    said = []
    for curve in curves:
        ends = {curve["points"][at]["bytes"]: curve["points"][at]["perplexity"] for at in (0, -1)}
        reach = " to ".join(f"{_figure(value)} at {_mib(count)} MiB" for count, value in ends.items())
        said.append(f"{curve['label']}: {reach}")
    return draw(
        lines,
        title=_title(report),
        description=f"Perplexity on {report['text']['name']} against size. {'; '.join(said)}.",
        x_label="weights that must be resident, MiB",
        y_label="perplexity, lower is better",
    )


def table(report: dict) -> tuple[list[str], list[list[str]]]:
    """Heading and rows for a person: at each size the perplexity of each curve, and which is best."""
    labels = [_plain(curve["label"]) for curve in report["curves"]]
    rows = []
    for row in report["sizes"]:
        values = ["" if value is None else _figure(value) for value in row["perplexities"]]
        bits = "" if row["bits"] is None else f"{row['bits']:.2f}"
        best = "" if row["best"] is None else labels[row["best"]]
        rows.append([_mib(row["bytes"]), bits, *values, best])
    return ["MiB", "bits a weight", *labels, "best"], rows


def facts(report: dict) -> list[str]:
    """What was measured, a line each."""
    text = report["text"]
    found = [f"perplexity on about {text['tokens']:,} tokens of {_plain(text['name'])}"]
    if report["source_perplexity"] is not None:
        found.append(f"the source in fp32 has {_figure(report['source_perplexity'])}")
    for curve in report["curves"]:
        low, high = curve["points"][0], curve["points"][-1]
        size = f"{_mib(low['bytes'])} MiB"
        if low is not high:
            size += f" to {_mib(high['bytes'])} MiB in {high['entries']:,} entries, {len(curve['points'])} measured"
        named = f"{curve['model']}, {curve['recipe']}, bundle {curve['digest'][:12]}"
        found.append(_plain(f"{curve['label']}: {named}, {size}"))
    return found


def _markdown(report: dict) -> str:
    heading, rows = table(report)
    lines = [_line(map(_cell, heading[:-1])), _line(["---:"] * (len(heading) - 1))]
    for row, found in zip(rows, report["sizes"], strict=True):
        cells = row[:-1]
        if found["best"] is not None:
            cells[2 + found["best"]] = f"**{cells[2 + found['best']]}**"
        lines.append(_line(cells))
    return "\n".join([*lines, "", *(f"- {_cell(fact)}" for fact in facts(report))]) + "\n"


def _html(report: dict) -> str:
    heading, rows = table(report)
    body = []
    for row, found in zip(rows, report["sizes"], strict=True):
        cells = [escape(cell) for cell in row[:-1]]
        if found["best"] is not None:
            cells[2 + found["best"]] = f"<strong>{cells[2 + found['best']]}</strong>"
        body.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return _PAGE.format(
        title=escape(_title(report)), chart=chart(report), rows="\n".join(body),
        heading="".join(f'<th scope="col">{escape(cell)}</th>' for cell in heading[:-1]),
        facts="\n".join(f"<li>{escape(fact)}</li>" for fact in facts(report)),
    )  # fmt: skip


def _title(report: dict) -> str:
    return _plain(f"{', '.join(dict.fromkeys(curve['model'] for curve in report['curves']))}: quality at a size")


def _mib(count: int) -> str:
    return f"{count / _MIB:.1f}" if count >= 10 * _MIB else f"{count / _MIB:.3g}"


def _figure(value: float) -> str:
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}" if value < 1e9 else f"{value:.1e}"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(text: str) -> str:
    """As it may stand in Markdown."""
    return "".join(f"\\{character}" if character in "\\`*_|<>[]" else character for character in text)


def _plain(text: str) -> str:
    """As it may reach a terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)
