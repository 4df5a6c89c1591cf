"""Arguments that several verbs share, and the keywords that they become. Knows nothing about what a verb does."""

import argparse
from collections.abc import Callable
from typing import Any


def add_bundle(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", metavar="BUNDLE", help="a file that `shoal convert` wrote")


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON value on stdout and nothing else there")


def add_loading(parser: argparse.ArgumentParser, slots: bool = True, answers: bool = True) -> None:
    """What decides how much memory a loaded model uses, and how that changes while it `answers`."""
    group = parser.add_argument_group("memory")
    group.add_argument("--memory", metavar="SIZE", help="all the model may use, such as 200MB or 1.5GiB")
    group.add_argument("--context", type=int, metavar="N", help="tokens of prompt and answer (default: what fits)")
    if answers:
        group.add_argument(
            "--follow-memory", nargs="?", const=0, metavar="RESERVE", type=_size,
            help="grow and shrink with the memory that is free, up to --memory, and leave RESERVE to others (128MiB)",
        )  # fmt: skip
    if slots:
        group.add_argument("--slots", type=int, default=1, metavar="N", help="answers at the same time (default: 1)")
    group.add_argument("--kv", choices=("fp32", "fp16", "int8"), default="fp32", help="how keys and values are kept")
    group.add_argument(
        "--kernels", choices=("auto", "ort"), default="auto", help="ort: ONNX Runtime's operators, not shoal's own"
    )


def follow(model, arguments: argparse.Namespace, on_change: Callable[[Any], None] | None = None) -> None:
    """Where --follow-memory asks for it, makes `model` follow the free memory until it is closed; `on_change` is told
    of each change. Raises UsageError for a model whose size is fixed."""
    if arguments.follow_memory is None:
        return
    if model.card.task != "generate":
        from .runtime.errors import UsageError

        why = "A model that embeds has one size."
        raise UsageError(f"{model.card.name} cannot follow the memory.", why, "Leave --follow-memory out.")
    reserve = {"reserve": arguments.follow_memory} if arguments.follow_memory else {}
    model.follow_memory(most=arguments.memory, on_change=on_change, **reserve)


def loading(arguments: argparse.Namespace) -> dict[str, Any]:
    """The keywords of `load` and `plan`; the verbs that only load have `threads` too."""
    names = ("memory", "context", "slots", "kv", "kernels", "threads")
    return {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}


def add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="of the engine (default: every core)")


def add_backend(parser: argparse.ArgumentParser, require: bool = True) -> None:
    """Where the graph runs or, of a language model, its prompts; and how much of it must."""
    group = parser.add_argument_group("backend")
    group.add_argument(
        "--backend", default="auto", metavar="NAME", help="auto, cpu, gpu, npu or one provider: npu:qnn (default: auto)"
    )
    group.add_argument(
        "--prefill", choices=("auto", "static", "dynamic"), default="auto",
        help="prompts in fixed chunks: where they were made for the backend and are faster, always, or never (auto)",
    )  # fmt: skip
    if require:
        group.add_argument(
            "--compiled", choices=("auto", "bundle", "none"), default="auto",
            help="graphs compiled ahead: the bundle's, else the device compiles its own once (auto), the bundle's or "
                 "refuse, or none",
        )  # fmt: skip
        group.add_argument(
            "--require", action="append", default=[], metavar="NAME=SHARE",
            help="of the nodes this share must run there, as npu=0.9; what fell back is refused with its reasons",
        )  # fmt: skip


def backend(arguments: argparse.Namespace) -> dict[str, Any]:
    """The keywords of `load` from `add_backend`, and without --require those of `plan`. Raises UsageError."""
    found: dict[str, Any] = {}
    if arguments.prefill != "auto":
        found["prefill"] = arguments.prefill
    if getattr(arguments, "compiled", "auto") != "auto":
        found["compiled"] = arguments.compiled
    require = getattr(arguments, "require", [])
    if arguments.backend != "auto" or require:
        found["backend"] = arguments.backend
    if require:
        from .runtime.backends.placement import required

        found["require"] = required(require)
    return found


def nodes(model) -> str:
    """How many nodes of a model's graphs run where."""
    return ", ".join(f"{count} nodes on {name}" for name, count in model.backend_nodes.items())


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """How a token is chosen. The defaults are greedy: the same answer every time."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-tokens", type=_count, default=256, metavar="N", help="the longest answer (default: 256)")
    group.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest (default: 0)")
    group.add_argument("--top-k", type=int, default=0, metavar="K", help="only the K likeliest; 0 is all")
    group.add_argument("--top-p", type=float, default=1.0, metavar="P", help="only the likeliest that hold P together")
    group.add_argument(
        "--min-p", type=float, default=0.0, metavar="P", help="only those at least P times as likely as the best"
    )
    group.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R", help="above 1 repeats less")
    group.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same answer")
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before TEXT; may be repeated")
    group.add_argument(
        "--overflow", choices=("refuse", "slide"), default="refuse", help="at the context's end (default: refuse)"
    )


def sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    """The keywords of `generate`, checked before a model is loaded. Raises UsageError."""
    from .runtime.language.sampling import Sampling
    from .runtime.language.stop import StopStrings

    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    StopStrings(arguments.stop)
    return {
        "max_tokens": arguments.max_tokens,
        "sampling": Sampling(**{name: getattr(arguments, name) for name in names}),
        "stop": arguments.stop,
        "overflow": arguments.overflow,
    }


def _count(text: str) -> int:
    count = int(text) if text.isascii() and text.isdigit() else 0
    if not 1 <= count < 1 << 31:
        raise argparse.ArgumentTypeError(f"{text!r:.60} is not a whole number of at least 1")
    return count


def _size(text: str) -> int:
    from .runtime.budget import parse_size
    from .runtime.errors import UsageError

    try:
        return parse_size(text) or 0
    except UsageError:  # an option whose value may be left out takes the next word for it, whatever that is
        why = f"{text!r:.60} is not a size such as 100MB; without one, write the option last"
        raise argparse.ArgumentTypeError(why) from None


def speeds(stats) -> str:
    """One line about a finished answer."""
    reused = f" ({stats.reused_tokens} reused)" if stats.reused_tokens else ""
    return (
        f"{stats.prompt_tokens} prompt tokens{reused} at {stats.prefill_tokens_per_s:.0f} tokens/s, "
        f"{stats.generated_tokens} tokens at {stats.decode_tokens_per_s:.1f} tokens/s, "
        f"first after {stats.time_to_first_token_s:.2f} s, ended by {stats.finish}"
    )


def figures(stats) -> dict[str, Any]:
    """A finished answer's figures as JSON."""
    from dataclasses import asdict

    return asdict(stats) | {
        "prefill_tokens_per_s": stats.prefill_tokens_per_s,
        "decode_tokens_per_s": stats.decode_tokens_per_s,
    }
