"""Answer one prompt (or embed one text) and stop. The answer goes to stdout, speeds to stderr."""

import argparse
import sys

from .. import options

NAME = "run"
HELP = "answer one prompt"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_bundle(parser)
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help="the text (default: standard input)")
    parser.add_argument("--system", metavar="TEXT", help="what the model is told before the prompt")
    parser.add_argument("--raw", action="store_true", help="continue the text as it is, without the chat template")
    options.add_sampling(parser)
    options.add_loading(parser, slots=False)
    options.add_threads(parser)
    options.add_backend(parser)
    options.add_json(parser)


def run(arguments: argparse.Namespace, show) -> int:
    from shoal.runtime.errors import UsageError
    from shoal.runtime.model import load

    prompt = _read(show) if arguments.prompt is None else arguments.prompt
    if not prompt:
        raise UsageError("There is no prompt.", "The text is empty.", 'Write it last: shoal run BUNDLE "Hello".')
    if arguments.raw and arguments.system is not None:
        raise UsageError("--raw and --system were both given.", "Raw text has no system message.", "Give one of them.")
    keywords = options.sampling(arguments) | {"raw": arguments.raw}
    where = options.backend(arguments)
    with load(arguments.bundle, progress=show.progress, **options.loading(arguments), **where) as model:
        if where:
            show.note(options.nodes(model))
        options.follow(model, arguments)
        if model.card.task == "embed":
            return _embed(model, prompt, show)
        if arguments.system is None:
            return _answer(model, prompt, keywords, show)
        messages = [{"role": "system", "content": arguments.system}, {"role": "user", "content": prompt}]
        return _answer(model, messages, keywords, show)


def _read(show) -> str:
    """Standard input without the line break that ends it, as a shell's $(…) takes it."""
    from shoal.runtime.errors import UsageError

    if sys.stdin.isatty():
        show.note("Write the prompt; Ctrl-D on an empty line ends it.")
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UsageError("The prompt cannot be read.", f"It is not text: {error}.", "Give UTF-8.") from None


def _answer(model, prompt: str | list[dict], keywords: dict, show) -> int:
    ids = []
    with model.generate(prompt, **keywords) as answer:
        for token in answer:
            ids.append(token.id)
            show.text(token.text)
        show.line()
        if not show.as_json:
            show.note(options.speeds(answer.stats))
        show.json({"text": answer.text, "tokens": ids, "stats": options.figures(answer.stats)})
    return 0


def _embed(model, text: str, show) -> int:
    vector = model.embed([text])[0]
    show.line(" ".join(f"{value:.6f}" for value in vector))
    show.json({"embedding": [float(value) for value in vector]})
    return 0
