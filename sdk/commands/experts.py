"""Mixtures of experts on flash: record a model's routing, and see what it says before anything is believed.

  shoal experts trace BUNDLE -o TRACE     run texts or prompts, and keep which experts each token went to
  shoal experts analyze TRACE             what every policy, predictor and number of slots would read, and a verdict
  shoal experts predictor TRACE -o FILE   fit next-layer guesses to a trace (fp32, as in a bundle's `predictor`)
  shoal experts thresholds BUNDLE         which misses to read in low precision or skip, for a budget, and at what cost

docs/experts.md says what each figure means.
"""

import argparse

from .. import options

NAME = "experts"
HELP = "record and analyze which experts a model uses"


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text) < 1 << 24):
        raise argparse.ArgumentTypeError(f"{text!r:.40} is not a number from 1")
    return int(text)


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _costs(text: str):
    from shoal.runtime.errors import UsageError
    from shoal.runtime.experts.split import Costs

    try:
        given = dict(word.split("=") for word in text.split(","))
        cpu, accelerator, link = (float(given.pop(name)) / 1e6 for name in ("cpu", "accelerator", "link"))
        if not given:
            return Costs(cpu, accelerator, link)
    except (KeyError, ValueError, UsageError):
        pass
    raise argparse.ArgumentTypeError(f"{text!r:.60} is not like cpu=900,accelerator=100,link=400, in microseconds")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    trace = verbs.add_parser("trace")
    options.add_bundle(trace)
    trace.add_argument("-o", "--out", required=True, metavar="TRACE", help="the file to write")
    trace.add_argument("--text", metavar="FILE", help="text to read, UTF-8 (default: shoal's held-out text)")
    trace.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="instead: answer this; repeatable")
    trace.add_argument("--tokens", type=_count, default=4096, metavar="N", help="of the text at most (4096)")
    trace.add_argument("--length", type=_count, default=256, metavar="N", help="tokens of a sequence (256)")
    trace.add_argument("--max-tokens", type=_count, default=256, metavar="N", help="of an answer at most (256)")
    trace.add_argument("--inputs", action="store_true", help="keep the experts' inputs too, for predictors")
    options.add_loading(trace, slots=False, answers=False)
    options.add_threads(trace)
    analyze = verbs.add_parser("analyze")
    analyze.add_argument("trace", metavar="TRACE", help="a file that `shoal experts trace` wrote")
    analyze.add_argument("--bundle", metavar="BUNDLE", help="the traced model: tries its predictor, knows its bytes")
    analyze.add_argument("--bandwidth", metavar="SIZE", help="that experts can be read at, such as 300MB/s or 2GB/s")
    analyze.add_argument("--speed", type=float, metavar="N", help="tokens/s with every expert resident, as benched")
    analyze.add_argument("--guesses", type=_count, metavar="N", help="about each layer (default: what a token uses)")
    analyze.add_argument("--policies", type=_words, metavar="NAME,..", help="only these")
    analyze.add_argument("--predictors", type=_words, metavar="NAME,..", help="only these; `none` is always tried")
    analyze.add_argument("--all", action="store_true", help="show every run, not the best of each size alone")
    analyze.add_argument("--second", type=_costs, metavar="COSTS", help="what an accelerator would give, from stated "
                         "costs of an expert in microseconds: cpu=US,accelerator=US,link=US")  # fmt: skip
    predictor = verbs.add_parser("predictor")
    predictor.add_argument("trace", metavar="TRACE", help="a trace that was recorded with --inputs")
    predictor.add_argument("-o", "--out", required=True, metavar="FILE", help="the matrices to write, as .npy")
    thresholds = verbs.add_parser("thresholds")
    options.add_bundle(thresholds)
    thresholds.add_argument("--budget", required=True, metavar="SIZE", help="of experts to read for a token at most")
    thresholds.add_argument("--tokens", type=_count, default=1024, metavar="N", help="of each text (1024)")
    thresholds.add_argument("--text", metavar="FILE", help="to calibrate on, UTF-8 (default: shoal's calibration text)")
    thresholds.add_argument("--direct", action="store_true", help="read past the page cache")
    options.add_loading(thresholds, slots=False, answers=False)
    thresholds.add_argument("--slots", type=_count, metavar="N", help="instead of --memory: for so many experts")
    options.add_threads(thresholds)
    for command in (trace, analyze, predictor, thresholds):
        options.add_json(command)


def run(arguments: argparse.Namespace, show) -> int:
    verbs = {"trace": _trace, "analyze": _analyze, "predictor": _predictor, "thresholds": _thresholds}
    return verbs[arguments.verb](arguments, show)


def _trace(arguments: argparse.Namespace, show) -> int:
    from shoal.runtime.errors import UsageError
    from shoal.runtime.events import Event
    from shoal.runtime.experts.trace import Trace
    from shoal.runtime.model import load

    if arguments.prompt and arguments.text is not None:
        raise UsageError("--text and --prompt were both given.", "One trace is of one kind.", "Give one of them.")
    text = None if arguments.prompt else _text(arguments.text)
    with load(arguments.bundle, progress=show.progress, **options.loading(arguments)) as model:
        if model.card.task != "generate" or not model.card.experts:
            raise UsageError(f"{arguments.bundle} has no routing to record.", "It has no experts.", "Name a mixture.")
        if text is None:
            most, prompts = arguments.max_tokens, arguments.prompt
        else:
            length, ids = min(arguments.length, model.plan.context - 1), model.tokenizer.encode(text)
            ids = ids[: arguments.tokens]
            most, prompts = 1, [ids[at : at + length] for at in range(0, len(ids), length)]
        with model.trace_experts(arguments.out, inputs=arguments.inputs):
            for done, prompt in enumerate(prompts):
                show.progress(Event("tracing", done, len(prompts), "", "sequences"))
                model.generate(prompt, max_tokens=most).finish()
            show.progress(Event("tracing", len(prompts), len(prompts), "", "sequences"))
    found = Trace.load(arguments.out)
    facts = {"trace": arguments.out, "tokens": found.tokens, "sequences": len(found.starts), "layers": found.layers,
             "experts": found.experts, "top_k": found.top_k}  # fmt: skip
    show.table([[name, value] for name, value in facts.items()])
    show.json(facts)
    return 0


def _analyze(arguments: argparse.Namespace, show) -> int:
    from shoal.runtime.budget import parse_size
    from shoal.runtime.errors import UsageError
    from shoal.runtime.experts.analyze import Hardware, analyze, second_backend
    from shoal.runtime.experts.policies import POLICIES
    from shoal.runtime.experts.trace import Trace

    rate = arguments.bandwidth
    bandwidth = 0 if rate is None else parse_size(rate.removesuffix("/s")) or 0
    if arguments.speed is not None and not 0 < arguments.speed < 1e6:
        raise UsageError(f"--speed is {arguments.speed}.", "It must be more than 0 tokens/s.", "Correct it.")
    trace = Trace.load(arguments.trace)
    record, matrices = (0, None) if arguments.bundle is None else _of_bundle(arguments.bundle, trace)
    found = analyze(
        trace, Hardware(bandwidth, record, 1 / arguments.speed if arguments.speed else 0.0), matrices,
        width=arguments.guesses or 0, policies=arguments.policies or POLICIES, predictors=arguments.predictors,
        progress=show.progress,
    )  # fmt: skip
    if arguments.second is not None:
        found["second"] = second_backend(trace, arguments.second)
    _show(found, show, arguments.all)
    show.json(found)
    return 0


def _predictor(arguments: argparse.Namespace, show) -> int:
    import io
    from pathlib import Path

    import numpy as np

    from shoal.device_agents.home import write_atomically
    from shoal.runtime.experts.predictors import train_predictor
    from shoal.runtime.experts.trace import Trace

    matrices = train_predictor(Trace.load(arguments.trace))
    data = io.BytesIO()
    np.save(data, matrices, allow_pickle=False)
    write_atomically(Path(arguments.out), data.getvalue(), 0o644)
    show.line(f"{arguments.out}: {matrices.shape[0]} matrices of {matrices.shape[1]} x {matrices.shape[2]}")
    show.json({"out": arguments.out, "shape": matrices.shape})
    return 0


def _thresholds(arguments: argparse.Namespace, show) -> int:
    from shoal.runtime.budget import parse_size
    from shoal.runtime.experts.store import Options

    from ..expert_thresholds import calibrate

    found = calibrate(
        arguments.bundle, parse_size(arguments.budget) or 0, tokens=arguments.tokens, progress=show.progress,
        text=None if arguments.text is None else _text(arguments.text), options=Options(direct=arguments.direct),
        **options.loading(arguments),
    )  # fmt: skip
    _show_thresholds(found, show)
    show.json(found)
    return 0


def _of_bundle(path: str, trace):
    """The bytes of an expert in this bundle, and its predictor or None. Raises where it is not the trace's model."""
    import numpy as np

    from shoal.runtime.bundle import Bundle
    from shoal.runtime.errors import BundleError, UsageError
    from shoal.runtime.experts.store import read_index

    with Bundle.open(path) as bundle:
        index = read_index(bundle)
        if (index.layers, index.experts) != (trace.layers, trace.experts):
            why = f"It has {index.layers} layers of {index.experts} experts, not {trace.layers} of {trace.experts}."
            raise UsageError(f"{path} is not the model that was traced.", why, "Name the bundle that was.")
        section, hidden = bundle.find("experts", "predictor"), index.precisions[0].gate_up.inputs
        if section is None:
            return index.precisions[0].record, None
        if section.length != 4 * (index.layers - 1) * index.experts * hidden:
            why = f"It has {section.length} bytes."
            raise BundleError(f"{path}'s predictor cannot be used.", why, "Convert the checkpoint again.")
        matrices = np.frombuffer(bundle.bytes(section), "<f4").reshape(index.layers - 1, index.experts, hidden)
        return index.precisions[0].record, matrices


def _text(path: str | None) -> str:
    from pathlib import Path

    from shoal.runtime.errors import UsageError

    if path is None:
        from shoal.converters.text import HELDOUT

        return HELDOUT
    try:
        return Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"The text {path} cannot be read.", f"{error}.", "Give a file of UTF-8.") from None


def _show(found: dict, show, everything: bool) -> None:
    show.line("routing: segment best performance (srp) and what it takes, in units of a token's experts")
    rows = [
        [one["window"], _figure(one["value"]), _range(one), _figure(one["slots"])]
        for one in found["srp"] if one["value"] is not None
    ]  # fmt: skip
    show.table(rows, ["window", "srp", "95 %", "slots"])
    show.line("\nbest hit rate of a cache that sees a window ahead (sch), first uses left out and counted")
    top_k, experts = found["top_k"], found["experts"]
    slots = sorted({times * top_k for times in (1, 2, 4) if times * top_k <= experts} | {experts})
    rows = [
        [one["window"], *(f"{one['value'][n - 1]:.3f} {one['counted'][n - 1]:.3f}" for n in slots)]
        for one in found["sch"]
    ]
    show.table(rows, ["window", *(f"{n} a layer" for n in slots)])
    if found["predictors"]:
        show.line("\nuses that were guessed, resident or not")
        show.table([[one["name"], f"{one['recall']:.1%}"] for one in found["predictors"]])
    for name in found["left_out"]:
        needs = "the bundle's predictor and a trace with inputs" if name == "gate" else "a trace with inputs"
        show.line(f"{name}: not tried, it needs {needs}")
    show.line("\nper token, in " + ("KiB" if found["record_bytes"] else "experts"))
    chosen = found["runs"] if everything else _best(found["runs"])
    show.table([_run(run) for run in chosen], [
        "slots", "size", "policy", "guesses", "hit rate", "95 %", "cold recall", "read", "missed", "late", "wasted",
        "tokens/s at most", "expected",
    ])  # fmt: skip
    if "second" in found:
        show.line("\nµs a layer of one token, by the costs that were stated, not measured; the most used are resident")
        rows = [
            [one["slots"], one["size"], f"{one['hit_rate']:.1%}",
             *(f"{one[f'{way}_seconds'] * 1e6:.1f}" for way in ("cpu", "accelerator", "split"))]
            for one in found["second"]
        ]  # fmt: skip
        show.table(rows, ["slots", "size", "resident", "all on the CPU", "all on the accelerator", "split"])
    show.line()
    for sentence in found["verdict"]["sentences"]:
        show.line(sentence)


def _show_thresholds(found: dict, show) -> None:
    from ..show import size

    show.line(f"slots for {found['slots']} of {found['experts']} experts; a token of the calibration text reads")
    show.table([[f"{run['low']:g}", f"{run['skip']:g}", size(run["read_bytes"])] for run in found["runs"]],
               ["low", "skip", "read"])  # fmt: skip
    if found["found"] is None:
        show.line(f"\nNo thresholds are needed: without any a token reads at most {size(found['budget'])}.")
        return
    both, chosen = (found["exact"], found["found"]), f"low={found['low']:g}, skip={found['skip']:g}"
    show.line("\nheld-out text")
    show.table([
        ["read a token", *(size(one["read_bytes"]) for one in both)],
        ["perplexity", *(f"{one['perplexity']:.3f}" for one in both)],
        ["KL divergence, nats", *(f"{one['kl']:.4f}" for one in both)],
        ["same likeliest token", *(f"{one['top1_agreement']:.1%}" for one in both)],
        ["experts in low precision", *(f"{one['low_share']:.1%}" for one in both)],
        ["experts left out", *(f"{one['skipped_share']:.1%}" for one in both)],
    ], ["", "exact", chosen])  # fmt: skip
    show.line(f"\nshoal.load({found['bundle']!r}, experts=Options({chosen}))")


def _best(runs: list[dict]) -> list[dict]:
    """Of each size and predictor the policy that reads least, beside lru; and the bound."""
    kept = []
    for run in runs:
        alike = [one for one in runs if (one["slots"], one["predictor"]) == (run["slots"], run["predictor"])]
        able = [one for one in alike if one["policy"] != "belady"]
        if run["policy"] in ("lru", "belady") or (able and run is min(able, key=lambda one: one["reads"])):
            kept.append(run)
    return sorted(kept, key=lambda run: run["slots"])


def _run(run: dict) -> list[object]:
    amounts = [
        f"{run[f'{name}_bytes'] / 1024:.1f}" if f"{name}_bytes" in run else f"{run[name]:.2f}"
        for name in ("reads", "misses", "late", "wasted")
    ]
    recall = "" if run["cold_recall"] is None or run["predictor"] == "none" else f"{run['cold_recall']:.1%}"
    speeds = ["" if run[name] is None else f"{run[name]:.1f}" for name in ("most_tokens_per_s", "tokens_per_s")]
    return [run["slots"], run["size"], run["policy"], run["predictor"], f"{run['hit_rate']:.1%}", _range(run), recall,
            *amounts, *speeds]  # fmt: skip


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _range(one: dict) -> str:
    return "" if one["low"] is None else f"{one['low']:.3f} to {one['high']:.3f}"
