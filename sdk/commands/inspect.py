"""Show what is in a bundle: its card, its recipe, its stack, its static graphs, its sections and how close it is to its
source, or, of a network of tensors, its name, modes, inputs and outputs. Loads no engine."""

import argparse
import json
from dataclasses import asdict

from .. import options

NAME = "inspect"
HELP = "show what is in a bundle"
_CARD = ("name", "source", "model_type", "task", "blocks", "hidden", "heads", "kv_heads", "head_dim", "ffn", "vocab",
         "max_context")  # fmt: skip
_NETWORK = ("name", "encoder", "tables")
_MODE = ("id", "encoder", "codec", "bits", "bytes", "device_ms", "accuracy", "tail_ms")
_MEASURED = ("id", "bits", "bytes", "device_ms", "accuracy")  # shown where a bundle does not say them too
_CODEC = ("name", "bits", "channels", "tables")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_bundle(parser)
    parser.add_argument("--verify", action="store_true", help="read every byte and check every digest")
    options.add_json(parser)


def run(arguments: argparse.Namespace, show) -> int:
    from shoal.runtime.bundle import Bundle

    from ..show import size

    with Bundle.open(arguments.bundle) as bundle:
        if arguments.verify:
            bundle.verify(progress=show.progress)
        found = describe(bundle)
    found["verified"] = arguments.verify
    show.json(found)
    show.table([("bundle", found["path"]), ("size", size(found["bytes"])), ("format", found["format"]),
                ("digest", found["digest"])])  # fmt: skip
    card, network = found["card"] or {}, found["modes"] or {}
    for title, rows in (
        ("card", [(field, str(card[field])) for field in _CARD if field in card]),
        ("network", [(field, _plain(network[field])) for field in _NETWORK if network.get(field)]),
        ("recipe", recipe_rows(found["recipe"] or {})),
        ("stack", stack_rows(found["stack"] or {})),
        ("prefill in fixed chunks", static_rows(found["static"] or {})),
        ("parity", parity_rows(found["parity"] or {})),
    ):
        if rows:
            show.line(f"\n{title}")
            show.table([(f"  {label}", text) for label, text in rows])
    show.line()
    show.table(
        [(s["kind"], s["name"], s["offset"], s["bytes"], s["alignment"], "yes" if s["required"] else "no",
          s["sha256"][:16]) for s in found["sections"] if not _is_static(s)],
        heading=("section", "name", "offset", "bytes", "aligned", "required", "sha256"),
    )  # fmt: skip
    if found["graphs"]:
        show.line()
        show.table(
            [(g["name"], g["role"], g["backend"], g["chunk"] or "any",
              f"{g['first_block']} to {g['last_block'] - 1}" if g["first_block"] < g["last_block"] else "none")
             for g in found["graphs"] if not _is_static(g)],
            heading=("graph", "role", "backend", "chunk", "blocks"),
        )  # fmt: skip
    if ports := port_rows(found["graphs"]):
        show.line()
        show.table(ports, heading=("graph", "", "name", "type", "shape"))
    if modes := network.get("modes"):
        show.line()
        keys = [key for key in _MODE if key in _MEASURED or any(key in mode for mode in modes)]
        show.table([[mode.get(key, "") for key in keys] for mode in modes], heading=("mode", *keys[1:]))
    if found["codecs"]:
        show.line()
        show.table([list(codec.values()) for codec in found["codecs"]], heading=("codec", *_CODEC[1:]))
    if arguments.verify:
        show.line(f"\nverified: {len(found['sections'])} sections, every digest is right")
    return 0


def describe(bundle) -> dict:
    """An open bundle as one JSON value. Raises BundleError for a card, a recipe, a stack, figures, modes, codecs
    or a network's graph that are none."""
    from shoal.converters.report import parity_from_json
    from shoal.runtime import onnx_ports, onnx_wire
    from shoal.runtime.card import Card
    from shoal.runtime.errors import BundleError

    def content(kind: str, read):
        section = bundle.find(kind, "index" if kind == "static" else "")
        return read(bundle.bytes(section)) if section else None

    def figures(data: bytes) -> dict:
        return {name: found and found.to_dict() for name, found in parity_from_json(data).items()}

    def checked(kind: str, check, fix: str):
        def read(data: bytes) -> dict:
            try:
                found = json.loads(data)
                check(found)
                return found
            except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
                what = f"The bundle's {kind} cannot be shown."
                raise BundleError(what, f"What it has is no {kind}.", fix) from None

        return content(kind, read)

    def ports(graph) -> dict:
        section = bundle.section("graph", graph.section)
        weights = {s.name: s.length for s in bundle.sections if s.kind == "weights"}
        model = onnx_wire.read(bundle.bytes(section, onnx_wire.MAX_MODEL), weights)
        return {side: [{"name": port.name, "dtype": port.dtype, "shape": port.dims} for port in found]
                for side, found in zip(("inputs", "outputs"), onnx_ports.ports(model), strict=True)}  # fmt: skip

    card = content("card", lambda data: asdict(Card.from_json(data)))
    return {
        "path": str(bundle.path),
        "bytes": bundle.path.stat().st_size,
        "format": ".".join(map(str, bundle.version)),
        "digest": bundle.digest,
        "card": card,
        "modes": content("modes", modes),
        "codecs": codecs(bundle),
        "recipe": checked("recipe", recipe_rows, "Convert the checkpoint again."),
        "stack": stack(bundle) if bundle.find("stack", "index") else None,
        "static": content("static", static),
        "parity": content("parity", figures),
        "sections": [
            {"kind": s.kind, "name": s.name, "offset": s.offset, "bytes": s.length, "alignment": s.alignment,
             "required": s.required, "sha256": s.sha256.hex()} for s in bundle.sections
        ],
        "graphs": [
            {"name": g.name, "role": g.role, "backend": g.backend, "chunk": g.chunk, "first_block": g.first_block,
             "last_block": g.last_block} | ({} if card else ports(g)) for g in bundle.graphs
        ],
    }  # fmt: skip


def stack(bundle) -> dict:
    """What a bundle's stack holds; bytes are resident ones, `curve` is (entries, bytes, perplexity) as the converter
    measured it. Raises BundleError."""
    from shoal.runtime.bitstack.layout import StackFormat
    from shoal.runtime.bitstack.stack import read_index

    index = read_index(bundle)
    sizes, steps = index.sizes(), [step for one in index.matrices for step in one.steps]
    return {
        "matrices": len(index.matrices), "entries": len(index.order), "floor": index.floor,
        "floor_bytes": sizes[index.floor], "bytes": sizes[-1], "sort": index.sort, "orders": list(index.orders),
        "blocks": sum(isinstance(step, StackFormat) for step in steps),
        "ranks": sorted({step.rank for step in steps if isinstance(step, StackFormat)}),
        "rungs": sorted({step.bits for step in steps if not isinstance(step, StackFormat)}),
        "curve": [(entries, sizes[entries], perplexity) for entries, perplexity in index.curve],
    }  # fmt: skip


def stack_rows(stack: dict) -> list[tuple[str, str]]:
    """A stack for a person."""
    if not stack:
        return []

    from ..show import size

    made = [f"{stack['blocks']:,} blocks of rank {', '.join(map(str, stack['ranks']))}"] if stack["blocks"] else []
    if stack["rungs"]:
        made.append(f"whole matrices in {', '.join(map(str, stack['rungs']))} bits")
    rows = [
        ("matrices", f"{stack['matrices']:,}"),
        ("entries", f"{stack['entries']:,}: {', '.join(made)}"),
        ("floor", f"{stack['floor']:,} entries, {size(stack['floor_bytes'])}"),
        ("all of it", size(stack["bytes"])),
        ("order", ", ".join([stack["sort"] or "not named", *(f"also {name}" for name in stack["orders"])])),
    ]
    return rows + [
        ("perplexity", f"{value:.2f} with {entries:,} entries, {size(held)}") for entries, held, value in stack["curve"]
    ]


def static(data: bytes) -> dict:
    """What the index of static graphs says. Raises BundleError."""
    from shoal.runtime.static.layout import Shadow, Static

    index = Static.from_json(data)
    shadows = [step for step in index.steps if isinstance(step, Shadow)]
    return {
        "backend": index.backend, "chunks": list(index.chunks), "graphs": len(index.names), "steps": len(index.steps),
        "shadows": len(shadows), "hot": sum(len(step.hot) for step in shadows),
        "channels": sum(step.inputs for step in shadows),
    }  # fmt: skip


def static_rows(static: dict) -> list[tuple[str, str]]:
    """Static graphs for a person."""
    if not static:
        return []
    chunks, hot = static["chunks"], static["hot"] / max(static["channels"], 1)
    return [
        ("made for", f"{static['backend']}, chunks of {', '.join(map(str, chunks))} tokens"),
        ("graphs", f"{static['graphs']:,} for each length, {static['graphs'] * len(chunks):,} (not listed below)"),
        ("shadows", f"{static['shadows']:,}, {static['hot']:,} hot channels ({hot:.2%})"),
    ]


def _is_static(entry: dict) -> bool:
    return entry["name"].startswith("static.") and entry.get("kind", "graph") == "graph"


def modes(data: bytes) -> dict:
    """A section of modes as it stands, once a device could read it. Raises BundleError."""
    from shoal.runtime.split.modes import parse

    parse(data)
    return json.loads(data)


def codecs(bundle) -> list[dict]:
    """What latents each codec is for. Raises BundleError for one that is damaged."""
    from shoal.runtime.split.modes import MAX_CODEC
    from shoal.runtime.split.tables import Tables

    found = []
    for section in bundle.sections:
        if section.kind == "codec":
            made = Tables.from_bytes(bundle.bytes(section, most=MAX_CODEC))
            found.append(
                dict(zip(_CODEC, (section.name, made.bits, made.channels, len(made.frequencies)), strict=True))
            )
    return found


def port_rows(graphs: list[dict]) -> list[tuple[str, ...]]:
    """What each graph takes and gives, for a person; nothing of a language model's."""

    def shape(dims) -> str:
        return " x ".join("?" if dim is None else _plain(str(dim)) for dim in dims)

    return [
        (graph["name"], label, _plain(port["name"]), port["dtype"], shape(port["shape"]))
        for graph in graphs
        for label, side in (("takes", "inputs"), ("gives", "outputs"))
        for port in graph.get(side, ())
    ]


def recipe_rows(recipe: dict) -> list[tuple[str, str]]:
    """A recipe's JSON for a person."""

    def format_of(value: dict) -> str:
        if value.get("bits") == 32:
            return "fp32"
        parts = [f"{value.get('bits')} bits", f"in groups of {value.get('group')}" if value.get("group") else "by rows"]
        if value.get("span"):
            parts.append(f"a scale for {value.get('span')}")
        parts.append("symmetric" if value.get("symmetric") else "with zero points")
        return ", ".join(parts + (["rotated"] if value.get("rotated") else []))

    rows = [(key, format_of(recipe[key])) for key in ("linear", "embedding", "head") if key in recipe]
    if ladder := recipe.get("ladder"):
        rungs = [f"{rung['bits']} bits" for rung in ladder["rungs"]]
        ranks = f"rank {ladder['rank']}" if ladder["rank"] else "a rank of its own for each matrix"
        rows.append(("stacked", ", ".join([*rungs, f"{ladder['blocks']} blocks of {ranks}", f"sort {ladder['sort']}"])))
    if static := recipe.get("static"):
        kept = f", {static['shadow']:.0%} of shadows" if static["bits"] == 8 else ""
        rows.append(("static", f"{static['backend']}, {static['bits']} bits{kept}"))
    rows += [(pattern, format_of(rule)) for pattern, rule in recipe.get("rules", ())]
    return [(key, str(recipe[key])) for key in ("name", "method") if key in recipe] + rows


def parity_rows(parity: dict) -> list[tuple[str, str]]:
    """The figures of a parity run for a person, one line each for this recipe and for plain rounding."""
    from shoal.converters.report import describe_parity

    labels = {"parity": "with the source", "baseline": "rounded to nearest"}
    return [(label, describe_parity(parity[key])) for key, label in labels.items() if parity.get(key)]


def _plain(text: str) -> str:
    """As it may reach a terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)
