"""Measure speed and memory, alone or against other engines in one run. docs/bench.md says what each figure means."""

import argparse

from .. import options

NAME = "bench"
HELP = "measure speed and memory, alone or against other engines"


def _numbers(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 128,512") from None
    if any(not 0 <= number < 1 << 24 for number in found):
        raise argparse.ArgumentTypeError(f"{text!r} has a number that is negative or too large")
    return found


def _shares(text: str) -> list[float]:
    try:
        found = [float(part) / 100 for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of percentages such as 50,25") from None
    if any(not 0 < share <= 1 for share in found):
        raise argparse.ArgumentTypeError(f"{text!r} has what is not above 0 and up to 100")
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
    parser.add_argument(
        "--profile", action="store_true", help="instead: each operator's time and bytes, against this machine's limits"
    )
    parser.add_argument(
        "--sizes", type=int, metavar="N", help="instead: the tests at N sizes of a stacked bundle, floor to all of it"
    )
    parser.add_argument("--beside", metavar="BUNDLE", help="with --sizes: another bundle, in turn with each size")
    parser.add_argument(
        "--experts", type=_shares, metavar="PERCENT,..", help="instead: a mixture with so much of its experts in memory"
    )
    parser.add_argument("--rate", metavar="SIZE", help="with --experts: read at most so many bytes a second")
    parser.add_argument("--direct", action="store_true", help="with --experts: read past the page cache")
    parser.add_argument("--policy", default="hobbit", metavar="NAME", help="with --experts: who leaves a slot (hobbit)")
    parser.add_argument("--predictor", default="", metavar="FILE", help="with --experts: guesses by these matrices")
    parser.add_argument(
        "--trace", metavar="FILE", help="instead: a prompt of -p tokens in static chunks, who ran what when to FILE"
    )
    options.add_json(parser)
    options.add_backend(parser, require=False)
    against = parser.add_argument_group("comparison")
    against.add_argument("--against", action="append", default=[], metavar="ENGINE=MODEL",
                         help="run this engine in turn with shoal; may be repeated. It is llama.cpp, llama-cpp-python, "
                              "openvino-genai or onnxruntime-genai. In quotes, options of llama.cpp may follow the "
                              "file: 'llama.cpp=FILE.gguf -fa off'")  # fmt: skip
    against.add_argument("--against-python", action="append", default=[], metavar="[ENGINE=]PYTHON",
                         help="a Python that has the package of the engine, or of all (default: this one)")  # fmt: skip
    loading = parser.add_argument_group("loading")
    loading.add_argument("-t", "--threads", type=int, default=0, metavar="N", help="of every engine (every core)")
    loading.add_argument("--memory", metavar="SIZE", help="all the model may use, such as 200MB or 1.5GiB")
    loading.add_argument("--kv", choices=("fp32", "fp16", "int8"), default="fp32", help="keys and values (fp32)")
    loading.add_argument("--kernels", choices=("auto", "ort"), default="auto", help="ort: ONNX Runtime's (auto)")
    loading.add_argument("--chunk", type=int, metavar="N", help="tokens of a prefill step")


def run(arguments: argparse.Namespace, show) -> int:
    from shoal.runtime.errors import UsageError

    from .. import bench
    from ..bench_arms import ENGINES
    from ..bench_report import render

    if not 0 <= arguments.threads <= 1024:
        raise UsageError(f"threads is {arguments.threads}.", "It must be from 0 to 1024.", "Correct it.")
    if arguments.beside is not None and arguments.sizes is None:
        raise UsageError("--beside was given without --sizes.", "It is compared size by size.", "Give both.")
    if arguments.experts is not None:
        return _experts(arguments, show)
    if arguments.trace is not None:
        return _trace(arguments, show)
    if arguments.profile:
        return _profile(arguments, show)
    tests = []
    for depth in arguments.depth:
        tests += [bench.Test("pp", tokens, depth) for tokens in arguments.prompt if tokens]
        tests += [bench.Test("tg", tokens, depth) for tokens in arguments.generate if tokens]
    if arguments.sizes is not None:
        return _sizes(arguments, list(dict.fromkeys(tests)), show)
    pythons: dict[str, str] = {}
    for text in arguments.against_python:
        engine, _, python = text.partition("=")
        pythons |= {engine: python} if engine in ENGINES else {"": text}
    report = bench.measure_model(
        arguments.bundle, list(dict.fromkeys(tests)), repetitions=arguments.repetitions, threads=arguments.threads,
        against=[bench.rival(text, pythons) for text in arguments.against], sustained_s=arguments.sustained,
        progress=show.progress, kv=arguments.kv, chunk=arguments.chunk, memory=arguments.memory,
        kernels=arguments.kernels, **options.backend(arguments),
    )  # fmt: skip
    show.json(report)
    show.text(render(report, arguments.output))
    return 0


def _sizes(arguments: argparse.Namespace, tests: list, show) -> int:
    from .. import bench_stack

    found = bench_stack.measure(
        arguments.bundle, tests, sizes=arguments.sizes, beside=arguments.beside, repetitions=arguments.repetitions,
        threads=arguments.threads, progress=show.progress, kv=arguments.kv, memory=arguments.memory,
    )  # fmt: skip
    show.json(found)
    show.text(bench_stack.render(found))
    return 0


def _experts(arguments: argparse.Namespace, show) -> int:
    from shoal.runtime.budget import parse_size
    from shoal.runtime.experts.store import Options

    from .. import bench_experts

    found = bench_experts.measure(
        arguments.bundle, shares=arguments.experts, tokens=max(arguments.generate[0], 2), threads=arguments.threads,
        repetitions=arguments.repetitions, progress=show.progress, kv=arguments.kv,
        options=Options(arguments.policy, rate=parse_size(arguments.rate) or 0, direct=arguments.direct,
                        predictor=arguments.predictor),
    )  # fmt: skip
    show.json(found)
    show.text(bench_experts.render(found))
    return 0


def _profile(arguments: argparse.Namespace, show) -> int:
    from .. import bench_profile

    found = bench_profile.profile(
        arguments.bundle, prompt=max(arguments.prompt[0], 1), depth=arguments.depth[0], threads=arguments.threads,
        kv=arguments.kv, memory=arguments.memory, kernels=arguments.kernels, progress=show.progress,
    )  # fmt: skip
    show.json(found)
    show.text(bench_profile.render(found))
    return 0


def _trace(arguments: argparse.Namespace, show) -> int:
    from .. import bench_trace

    found = bench_trace.trace(
        arguments.bundle, arguments.trace, prompt=max(arguments.prompt[0], 1), backend=arguments.backend,
        threads=arguments.threads, kv=arguments.kv, memory=arguments.memory, kernels=arguments.kernels,
        progress=show.progress,
    )  # fmt: skip
    show.json(found)
    show.text(bench_trace.render(found))
    return 0
