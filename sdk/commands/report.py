"""Measure perplexity against the bytes that must be resident: of a stacked bundle a curve, of another one a point, and
which is best at each size. docs/bitstack.md says what each figure means."""

import argparse

from .. import options

NAME = "report"
HELP = "draw quality against size, of one bundle or several"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "bundles", metavar="BUNDLE", nargs="+", help="bundles of one model, or reports of earlier runs (.json)"
    )
    parser.add_argument("--text", metavar="FILE", help="text to predict, UTF-8 (default: shoal's held-out text)")
    parser.add_argument("--tokens", type=int, default=2048, metavar="N", help="of the text (default: 2048)")
    parser.add_argument("--step", type=int, default=32, metavar="N", help="tokens at once (32); 1 as in answers")
    parser.add_argument("--points", type=int, default=9, metavar="N", help="sizes to compare stacks at (default: 9)")
    parser.add_argument(
        "--sorts", type=_words, default=[], metavar="NAME,..",
        help="orders of one stacked bundle: average, greedy, random, proxy, as far as it has them",
    )  # fmt: skip
    parser.add_argument(
        "-o", "--out", action="append", default=[], metavar="FILE", help="also .html, .svg, .md or .json; repeatable"
    )
    options.add_threads(parser)
    options.add_json(parser)


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def run(arguments: argparse.Namespace, show) -> int:
    from pathlib import Path

    from shoal.device_agents.home import write_atomically

    from .. import report
    from ..report_forms import facts, form_of, render, table

    forms = [(Path(out), form_of(out)) for out in arguments.out]  # a wrong name is told now, not after minutes
    found = report.measure(
        arguments.bundles, text=arguments.text, tokens=arguments.tokens, points=arguments.points,
        sorts=arguments.sorts, step=arguments.step, threads=arguments.threads, progress=show.progress,
    )  # fmt: skip
    for path, form in forms:
        write_atomically(path, render(found, form).encode(), 0o644)
    heading, rows = table(found)
    show.table(rows, heading)
    show.line()
    for fact in facts(found):
        show.line(fact)
    show.json(found)
    return 0
