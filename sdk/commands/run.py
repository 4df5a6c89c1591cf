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
    parser.add_argument("--overflow", choices=("refuse", "slide"), default="refuse", help="at the context's end")
    options.add_sampling(parser)
    options.add_loading(parser, slots=False)
    options.add_threads(parser)
    options.add_json(parser)


def run(arguments: argparse.Namespace, show) -> int:
    from shoal.runtime.errors import UsageError
    from shoal.runtime.model import load

    prompt = sys.stdin.read() if arguments.prompt is None else arguments.prompt
    if not prompt:
        raise UsageError("There is no prompt.", "The text is empty.", 'Write it last: shoal run BUNDLE "Hello".')
    keywords = options.loading(arguments) | {"threads": arguments.threads}
    with load(arguments.bundle, progress=show.progress, **keywords) as model:
        if model.card.task == "embed":
            return _embed(model, prompt, show)
        return _answer(model, prompt, arguments, show)


def _answer(model, prompt: str, arguments: argparse.Namespace, show) -> int:
    content: str | list[dict] = prompt
    if arguments.system:
        content = [{"role": "system", "content": arguments.system}, {"role": "user", "content": prompt}]
    keywords = options.sampling(arguments) | {"overflow": arguments.overflow, "raw": arguments.raw}
    ids = []
    with model.generate(content, **keywords) as answer:
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
