"""Measure speed and memory, alone or against llama.cpp in the same run. docs/bench.md says what each figure means."""

import argparse
import sys

from .. import options

NAME = "bench"
HELP = "measure speed and memory, alone or against llama.cpp"


def _numbers(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 128,512") from None
    if any(not 0 <= number < 1 << 24 for number in found):
        raise argparse.ArgumentTypeError(f"{text!r} has a number that is negative or too large")
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_bundle(parser)
    parser.add_argument("-p", "--prompt", type=_numbers, default=[512], metavar="N,..", help="prompt lengths (512)")
    parser.add_argument("-n", "--generate", type=_numbers, default=[128], metavar="N,..", help="answer lengths (128)")
    parser.add_argument("-d", "--depth", type=_numbers, default=[0], metavar="N,..", help="tokens before them (0)")
    parser.add_argument("-r", "--repetitions", type=int, default=5, metavar="N", help="runs of each test (5)")
    parser.add_argument(
        "--sustained", type=float, metavar="SECONDS", help="then decode for so long: does it slow down?"
    )
    parser.add_argument("-o", "--output", default="md", choices=("md", "csv", "json"), help="form of the report (md)")
    options.add_json(parser)
    against = parser.add_argument_group("comparison")
    against.add_argument("--against", action="append", default=[], metavar="llama.cpp=FILE.gguf",
                         help="run this engine in turn with shoal; may be repeated. In quotes, options of llama.cpp "
                              "may follow the file: 'llama.cpp=FILE.gguf -fa off'")  # fmt: skip
    against.add_argument("--against-python", default=sys.executable, metavar="PYTHON",
                         help="a Python that has xllamacpp (default: this one)")  # fmt: skip
    loading = parser.add_argument_group("loading")
    loading.add_argument("-t", "--threads", type=int, default=0, metavar="N", help="of every engine (every core)")
    loading.add_argument("--memory", metavar="SIZE", help="all the model may use, such as 200MB or 1.5GiB")
    loading.add_argument("--kv", choices=("fp32", "int8"), default="fp32", help="how keys and values are kept (fp32)")
    loading.add_argument("--chunk", type=int, metavar="N", help="tokens of a prefill step")


def run(arguments: argparse.Namespace, show) -> int:
    from shoal.runtime.errors import UsageError

    from .. import bench
    from ..bench_report import render

    if not 0 <= arguments.threads <= 1024:
        raise UsageError(f"threads is {arguments.threads}.", "It must be from 0 to 1024.", "Correct it.")
    tests = []
    for depth in arguments.depth:
        tests += [bench.Test("pp", tokens, depth) for tokens in arguments.prompt if tokens]
        tests += [bench.Test("tg", tokens, depth) for tokens in arguments.generate if tokens]
    against = []
    for text in arguments.against:
        engine, _, rest = text.partition("=")
        if engine != "llama.cpp":
            raise UsageError(f"There is no engine {engine!r:.60}.", "It is llama.cpp.", "Write llama.cpp=FILE.gguf.")
        against.append(bench.llama_cpp(rest, arguments.against_python))
    report = bench.measure_model(
        arguments.bundle, list(dict.fromkeys(tests)), repetitions=arguments.repetitions, threads=arguments.threads,
        against=against, sustained_s=arguments.sustained, progress=show.progress,
        kv=arguments.kv, chunk=arguments.chunk, memory=arguments.memory,
    )  # fmt: skip
    show.json(report)
    show.text(render(report, arguments.output))
    return 0
