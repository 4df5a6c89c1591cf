"""`shoal`: finds the verb, runs it, turns what it raises into three lines and an exit status.

A verb is a module of `shoal.commands`: NAME and HELP (strings), add_arguments(parser), run(arguments, show) -> int.
It is found by its file name and imported only when it is asked for; it imports libraries inside run().
The exit statuses are listed in docs/errors.md.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from . import __version__, commands

INTERRUPTED = 130  # 128 + SIGINT, as a shell counts
BROKEN_PIPE = 141  # 128 + SIGPIPE


def verbs() -> list[str]:
    """The names of all verbs, from the files beside `commands/__init__.py`."""
    import pkgutil

    return [module.name for module in pkgutil.iter_modules(commands.__path__)]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (sys.argv without the program) and returns the exit status. Never raises."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a model may write what a terminal cannot show
    try:
        return _run(argv)
    except SystemExit as stop:  # --help and --version
        return stop.code if isinstance(stop.code, int) else 2
    except KeyboardInterrupt:
        if debug:
            _traceback()
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of stdout has left (`shoal … | head`). Python would complain once more while flushing at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return BROKEN_PIPE
    except Exception as error:
        if debug:
            _traceback()
        return _explain(error)


class Parser(argparse.ArgumentParser):
    """Refuses a command line as everything else is refused. Options are written in full, so a new one breaks none."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        from .runtime.errors import UsageError

        why = f"{message[:1].upper()}{message[1:]}."
        raise UsageError("The command line is not understood.", why, f"See {self.prog} --help.")


def _run(argv: list[str]) -> int:
    parser = Parser(
        prog="shoal", description="On-device inference: one mapped, verified file runs inside a memory budget."
    )
    parser.add_argument("--version", action="version", version=f"shoal {__version__}")
    subparsers = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    wanted = next((word for word in argv if not word.startswith("-")), None)
    names = verbs()
    for name in [wanted] if wanted in names else names:
        _add(subparsers, _verb(name))
    arguments = parser.parse_args(argv)
    from .show import Show

    with Show(as_json=getattr(arguments, "json", False)) as show:
        return arguments.run(arguments, show)


def _verb(name: str) -> ModuleType:
    import importlib

    return importlib.import_module(f"{commands.__name__}.{name}")


def _add(subparsers, verb: ModuleType) -> None:
    parser = subparsers.add_parser(verb.NAME, help=verb.HELP, description=verb.__doc__)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=verb.run)
    verb.add_arguments(parser)


def _explain(error: Exception) -> int:
    from .runtime.errors import ShoalError

    if not isinstance(error, ShoalError):
        error = ShoalError(
            "shoal stopped at an error that it did not foresee.",
            f"{type(error).__name__}: {error}",
            "Run it again with --debug and report what it prints.",
        )
    print(error, file=sys.stderr)
    return error.code


def _traceback() -> None:
    import traceback

    traceback.print_exc()
