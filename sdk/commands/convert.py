"""Turn a checkpoint (a GGUF file or a Hugging Face folder) into one bundle."""

import argparse

from .. import options

NAME = "convert"
HELP = "turn a checkpoint into a bundle"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="a .gguf file, or a folder with config.json and safetensors")
    parser.add_argument("-o", "--out", metavar="OUT", help="the bundle to write (default: SOURCE.RECIPE.shoal, here)")
    parser.add_argument(
        "--recipe", default="int4", metavar="NAME|FILE.toml",
        help="fp32, int8, int4 (the default), int4-gptq, int3-gptq, int2-gptq, bitstack (grows and shrinks as it "
             "runs), hybrid (the same with integers from 3 bits on), or auto (what is best at --memory)",
    )  # fmt: skip
    parser.add_argument("--memory", metavar="SIZE", help="with auto: what the model is for, such as 200MB")
    parser.add_argument("--blocks", metavar="FIRST:END", help="only these blocks: a part that runs with the others")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    parser.add_argument("--no-parity", dest="check_parity", action="store_false", help="do not compare with the source")
    parser.add_argument("--calibration-text", metavar="FILE", help="text that a calibrated recipe sees (UTF-8)")
    options.add_json(parser)


def run(arguments: argparse.Namespace, show) -> int:
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
        progress=show.progress,
        **({} if arguments.memory is None else {"memory": parse_size(arguments.memory)}),
    )
    show.table(report.rows)
    show.json(report.to_dict())
    return 0


def default_out(source: str, recipe: str, blocks: str | None = None) -> str:
    """In the current folder: the source's name without .gguf, the recipe's name, a part's blocks, .shoal."""
    from pathlib import Path

    name = Path(source).resolve().name
    stem = name[:-5] if name.lower().endswith(".gguf") else name
    part = f".{blocks.replace(':', '-')}" if blocks else ""
    return f"{stem}.{Path(recipe).stem}{part}.shoal"
