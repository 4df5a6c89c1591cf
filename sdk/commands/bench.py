"""Measure speed and memory, alone or against llama.cpp in the same run."""

import argparse
import os
import sys

from .. import options

NAME = "bench"
HELP = "measure speed and memory, alone or against llama.cpp"


def _numbers(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 128,512") from None
    if any(number < 0 for number in found):
        raise argparse.ArgumentTypeError(f"{text!r} has a negative number")
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_bundle(parser)
    parser.add_argument("-p", "--prompt", type=_numbers, default=[512], metavar="N,..", help="prompt lengths (512)")
    parser.add_argument("-n", "--generate", type=_numbers, default=[128], metavar="N,..", help="answer lengths (128)")
    parser.add_argument("-d", "--depth", type=_numbers, default=[0], metavar="N,..", help="tokens before them (0)")
    parser.add_argument("-r", "--repetitions", type=int, default=5, metavar="N", help="runs of each test (5)")
    parser.add_argument("-t", "--threads", type=int, default=0, metavar="N", help="threads (every core)")
    parser.add_argument("--kv", default="fp32", choices=("fp32", "int8"), help="format of the key-value cache (fp32)")
    parser.add_argument("--chunk", type=int, metavar="N", help="tokens of a prefill step")
    parser.add_argument("--memory", metavar="SIZE", help="budget")
    parser.add_argument("--against", action="append", default=[], metavar="llama.cpp=FILE.gguf[ -fa off]",
                        help="run this engine in turn with shoal; may be given again")  # fmt: skip
    parser.add_argument(
        "--against-python", default=sys.executable, metavar="PYTHON", help="a Python that has xllamacpp"
    )
    parser.add_argument(
        "--sustained", type=float, metavar="SECONDS", help="decode for so long and show how speed falls"
    )
    parser.add_argument("-o", "--output", default="md", choices=("md", "csv", "json"), help="form of the report (md)")
    options.add_json(parser)


def run(arguments: argparse.Namespace, show) -> int:
    from .. import bench
    from ..runtime.errors import UsageError

    if arguments.repetitions < 1:
        raise UsageError("repetitions is less than 1.", "Nothing would be measured.", "Ask for 1 or more.")
    tests = [bench.Test(kind, tokens, depth) for depth in arguments.depth
             for kind, lengths in (("pp", arguments.prompt), ("tg", arguments.generate)) for tokens in lengths if tokens]  # fmt: skip
    context = max([256, *(test.depth + test.tokens + 8 for test in tests)])
    threads = arguments.threads or len(os.sched_getaffinity(0))
    arms: list[bench.Arm] = []
    try:
        report = bench.measure_model(
            arguments.bundle, tests, arms, context=context, threads=threads, repetitions=arguments.repetitions,
            against=[_against(text, threads, context, arguments.against_python) for text in arguments.against],
            sustained_s=arguments.sustained, progress=show.progress,
            kv=arguments.kv, chunk=arguments.chunk, memory=arguments.memory,
        )  # fmt: skip
    finally:
        for arm in arms:
            arm.close()
    show.json(report)
    show.text(bench.render(report, arguments.output))
    return 0


def _against(text: str, threads: int, context: int, python: str):
    from .. import bench
    from ..runtime.errors import UsageError

    engine, _, rest = text.partition("=")
    path, _, extra = rest.partition(" ")
    if engine != "llama.cpp" or not os.path.isfile(path):
        raise UsageError(
            f"--against {text!r} cannot be run.", "It names an engine and a file that is there.",
            "Write --against llama.cpp=FILE.gguf.",
        )  # fmt: skip
    return lambda: bench.LlamaCppArm(path, threads, context, python, extra.strip())
