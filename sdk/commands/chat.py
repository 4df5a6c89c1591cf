"""Talk with a model: one line, one answer. /reset forgets, /memory 300MB changes what the model may use, /exit ends;
Ctrl-C stops an answer, not the conversation."""

import argparse
import sys

from .. import options

NAME = "chat"
HELP = "talk with a model"
_HELP = (
    "/reset forgets the conversation, /memory SIZE changes what the model may use, /exit (or Ctrl-D) ends, Ctrl-C "
    "stops an answer."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_bundle(parser)
    parser.add_argument("--system", metavar="TEXT", help="what the model is told before the conversation")
    options.add_sampling(parser)
    options.add_loading(parser, slots=False)
    options.add_threads(parser)
    options.add_backend(parser)


def run(arguments: argparse.Namespace, show) -> int:
    from shoal.runtime.errors import UsageError
    from shoal.runtime.model import load

    keywords = options.sampling(arguments)
    where = options.backend(arguments)
    with load(arguments.bundle, progress=show.progress, **options.loading(arguments), **where) as model:
        if model.card.task != "generate":
            raise UsageError(f"{model.card.name} cannot chat.", "It embeds texts.", "Use: shoal run BUNDLE TEXT.")
        options.follow(model, arguments)
        if where:
            show.note(options.nodes(model))
        show.note(f"{model.card.name}, context {model.plan.context} tokens\n{_HELP}")
        _converse(model, arguments.system, keywords, show)
    return 0


def _converse(model, system: str | None, keywords: dict, show) -> None:
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  importing it gives input() line editing and history
    from shoal.runtime.errors import ShoalError

    opening = [] if system is None else [{"role": "system", "content": system}]
    messages = list(opening)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except KeyboardInterrupt:
            show.line()
            continue
        except EOFError:
            if sys.stdin.isatty():
                show.line()
            return
        except UnicodeDecodeError:
            show.note("That line is not UTF-8 text.")
            continue
        if line == "/exit":
            return
        if line == "/reset":
            messages = list(opening)
            show.note("The conversation is forgotten.")
        elif line.split()[:1] == ["/memory"]:
            try:
                show.note(_memory(model, line.removeprefix("/memory").strip()))
            except ShoalError as error:
                show.error(error)
        elif line.startswith("/"):
            show.note(_HELP)
        elif line:
            try:
                messages = _turn(model, [*messages, {"role": "user", "content": line}], keywords, show)
            except ShoalError as error:
                show.error(error)


def _memory(model, wanted: str) -> str:
    """What the model may and does use, after it was given `wanted` ("" leaves it). Raises UsageError, BudgetError."""
    from ..show import size

    plan = model.set_memory(wanted) if wanted else model.plan
    stack = model.stack
    budget = "without a budget" if plan.memory is None else f"of {size(plan.memory)}"
    entries = f", {stack.entries} of {len(stack.index.order)} entries of the stack" if stack else ""
    return f"(planned {size(plan.total)} {budget}: a context of {plan.context} tokens{entries})"


def _turn(model, messages: list[dict], keywords: dict, show) -> list[dict]:
    """Shows one answer and returns the conversation with it. An answer that was stopped stays, as far as it came."""
    prompt: str | list[dict] = messages if model.chat_template else messages[-1]["content"]
    with model.generate(prompt, **keywords) as answer:
        try:
            for token in answer:
                show.text(token.text)
        except KeyboardInterrupt:
            answer.cancel()
        show.line()
        if answer.stats.finish == "length":
            show.note(f"(cut after {answer.stats.generated_tokens} tokens)")
        return [*messages, {"role": "assistant", "content": answer.text}]
