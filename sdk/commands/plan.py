"""Show what a bundle will use, byte by byte, before anything is loaded; with --check load it and measure."""

import argparse

from .. import options

NAME = "plan"
HELP = "show the memory that a bundle will use"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_bundle(parser)
    options.add_loading(parser)
    parser.add_argument("--check", action="store_true", help="load it and show the measured bytes beside the planned")
    options.add_json(parser)


def run(arguments: argparse.Namespace, show) -> int:
    from shoal.runtime.model import load, plan

    keywords = options.loading(arguments)
    if not arguments.check:
        planned = plan(arguments.bundle, **keywords)
        show.text(planned.table() + "\n")
        show.line(f"context {planned.context} tokens, {planned.slots} at a time")
        show.json(planned.to_dict())
        return 0
    with load(arguments.bundle, progress=show.progress, **keywords) as model:
        rows = model.measure()
        show.table([])
        show.json(model.plan.to_dict() | {"measured": [vars(row) for row in rows]})
    return 0
