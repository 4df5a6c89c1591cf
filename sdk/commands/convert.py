"""Turn a checkpoint (a GGUF file or a Hugging Face folder) into one bundle, or an ONNX network into a split one."""

import argparse

from .. import options

NAME = "convert"
HELP = "turn a checkpoint into a bundle"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a .gguf file, a folder with config.json and safetensors, or to split one, a .onnx file",
    )
    parser.add_argument("-o", "--out", metavar="OUT", help="the bundle to write (default: SOURCE.RECIPE.shoal, here)")
    parser.add_argument(
        "--recipe", default="int4", metavar="NAME|FILE.toml",
        help="fp32, int8, int4 (the default), int4-gptq, int3-gptq, int2-gptq, npu, bitstack (grows and shrinks as it "
             "runs), hybrid (the same with integers from 3 bits on), auto (what is best at --memory), or split (cut "
             "between a device and an edge; a .toml file with a table [split] says how)",
    )  # fmt: skip
    parser.add_argument(
        "--data", metavar="FOLDER|FILE.npz",
        help="with split: pictures, in a folder for each class or without labels; or images (uint8 [n, h, w, 3]) and "
             "their labels",
    )  # fmt: skip
    parser.add_argument("--cut", metavar="NAME", help="with split: the value of the network to cut at")
    parser.add_argument("--memory", metavar="SIZE", help="with auto: what the model is for, such as 200MB")
    parser.add_argument("--blocks", metavar="FIRST:END", help="only these blocks: a part that runs with the others")
    parser.add_argument(
        "--npu", metavar="PROVIDER:SOC", action="append", default=[],
        help="with the recipe npu: compile its graphs ahead for this processor, such as qnn:sm8650; several times for "
             "several",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    parser.add_argument("--no-parity", dest="check_parity", action="store_false", help="do not compare with the source")
    parser.add_argument("--calibration-text", metavar="FILE", help="text that a calibrated recipe sees (UTF-8)")
    options.add_json(parser)


def run(arguments: argparse.Namespace, show) -> int:
    if arguments.data is not None or arguments.cut is not None or arguments.recipe == "split":
        return run_split(arguments, show)
    from shoal.converters.convert import convert
    from shoal.runtime.budget import parse_size

    report = convert(
        arguments.source,
        arguments.out or default_out(arguments.source, arguments.recipe, arguments.blocks),
        recipe=arguments.recipe,
        overwrite=arguments.overwrite,
        check_parity=arguments.check_parity,
        calibration_text=arguments.calibration_text,
        blocks=arguments.blocks,
        npu=arguments.npu,
        progress=show.progress,
        **({} if arguments.memory is None else {"memory": parse_size(arguments.memory)}),
    )
    show.table(report.rows)
    show.json(report.to_dict())
    return 0


def run_split(arguments: argparse.Namespace, show) -> int:
    """Writes NAME.device.shoal and NAME.edge.shoal to the folder --out."""
    from pathlib import Path

    from shoal.converters.sources.onnx import network
    from shoal.converters.split import recipe as recipes
    from shoal.converters.split.train import read, train
    from shoal.runtime.errors import UsageError

    if arguments.data is None:
        why = "The encoder learns from pictures, and the modes are measured on some of them."
        raise UsageError("There is no data to split with.", why, "Give a folder of them, or an .npz file, with --data.")
    changes = {} if arguments.cut is None else {"cut": arguments.cut}
    named = arguments.recipe in ("split", "int4")  # int4 is what convert has where nobody says
    recipe = recipes.load(recipes.SplitRecipe() if named else arguments.recipe, **changes)
    whole = network(Path(arguments.source))
    images, labels = read(arguments.data, whole, recipe, show.progress)
    folder = Path(arguments.out or ".")
    folder.mkdir(parents=True, exist_ok=True)
    report = train(whole, images, labels, recipe, folder, name=Path(arguments.source).stem,
                   overwrite=arguments.overwrite, progress=show.progress)  # fmt: skip
    heading = ("mode", "encoder", "bits", "bytes", "device_ms", "accuracy")
    rows = [(one.id, one.encoder, one.bits, round(one.bytes, 1), round(one.device_ms, 2), round(one.accuracy, 4))
            for one in report.modes]  # fmt: skip
    show.table(rows, heading)
    gate = report.gate and {key: getattr(report.gate, key) for key in ("threshold", "recall", "saved")}
    if gate:
        show.table([tuple(round(value, 4) for value in gate.values())], tuple(gate))
    show.json({"device": str(report.device), "edge": str(report.edge), "encoder": report.encoder, "filter": gate,
               "uncut": report.whole, "modes": [dict(zip(heading, row, strict=True)) for row in rows]})  # fmt: skip
    return 0


def default_out(source: str, recipe: str, blocks: str | None = None) -> str:
    """In the current folder: the source's name without .gguf, the recipe's name, a part's blocks, .shoal."""
    from pathlib import Path

    name = Path(source).resolve().name
    stem = name[:-5] if name.lower().endswith(".gguf") else name
    part = f".{blocks.replace(':', '-')}" if blocks else ""
    return f"{stem}.{Path(recipe).stem}{part}.shoal"
