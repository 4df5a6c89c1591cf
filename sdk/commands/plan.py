"""Show what a bundle will use, byte by byte, before anything is loaded; with --check load it and measure."""

import argparse

from .. import options

NAME = "plan"
HELP = "show the memory that a bundle will use"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_bundle(parser)
    options.add_loading(parser, answers=False)
    options.add_backend(parser, require=False)
    parser.add_argument("--check", action="store_true", help="load it, take a step and show what each row really holds")
    options.add_json(parser)


def run(arguments: argparse.Namespace, show) -> int:
    from shoal.runtime.model import load, plan

    keywords = options.loading(arguments) | options.backend(arguments)
    measured: dict[str, int | None] | None = None
    if arguments.check:
        with load(arguments.bundle, progress=show.progress, **keywords) as model:
            step(model)
            planned, measured = model.plan, model.measure()
    else:
        planned = plan(arguments.bundle, **keywords)
    columns = ["", "MiB", "where", "kind", "note"]
    rows = [[row.name, _mib(row.bytes), row.where, row.kind, row.note] for row in planned.rows]
    rows.append(["total", _mib(planned.total), "", "", ""])
    if measured is not None:
        columns.insert(2, "measured")
        for row in rows:
            row.insert(2, _mib(measured.get(row[0])))
    show.table(rows, columns)
    show.line(f"\ncontext {planned.context} tokens, {planned.slots} at a time, chunks of {planned.chunk}")
    show.json(planned.to_dict() | ({} if measured is None else {"measured": measured}))
    return 0


def step(model) -> None:
    """Makes a loaded model touch what it maps: the longest prefill step and a decode step."""
    if model.card.task == "embed":
        model.embed(["one"])
    else:
        longest = max(model.plan.chunk, model.scheduler.decoder.most(alone=True))
        model.generate([0] * min(longest, model.plan.context - 2), max_tokens=2).finish()


def _mib(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:.1f}"
