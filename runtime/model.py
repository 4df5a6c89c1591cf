"""`load` and `plan`: from a bundle's path to a model that keeps to its budget.

Loading is: open and verify the bundle, plan, refuse what cannot fit, prepare the weights for this device once, map
them, make the cache, and check that the file behind the mapping is still the one that was verified.
"""

import time
from pathlib import Path

from . import budget, measure, prepack, session
from .backends import choose
from .budget import Plan, Sizes
from .bundle import Bundle
from .bundle import Section as BundleSection
from .card import Card
from .embedding import EmbeddingModel
from .errors import BundleError, UsageError
from .events import Event, Progress, silent
from .language.cache import Cache
from .language.decoder import RELEASED, Decoder
from .language.model import LanguageModel
from .language.tokens import Tokenizer
from .loaded import Parts

_TOKENIZER = 3 << 19  # its code and the heap's slack, beside its tables
_ENGINE = 5 << 20  # what an ORT environment and session hold, and for each node of the graph:
_ENGINE_NODE = 8 << 10
_AROUND = 64 << 10  # what the kernel maps around a row of a table that is touched


def load(
    path: str | Path, memory: int | str | None = None, backend: str = "auto", *, context: int | None = None,
    slots: int = 1, kv: str = "fp32", chunk: int | None = None, threads: int = 0, queue: int = 256,
    prepare: bool = True, progress: Progress = silent,
) -> LanguageModel | EmbeddingModel:  # fmt: skip
    """Opens a bundle inside `memory` (bytes, "200MB", or None for no budget).

    `context` tokens and `slots` conversations at once decide the key-value cache, kept as `kv` (fp32 or int8); `chunk`
    is the most tokens of one prefill step; `threads` 0 takes every core; `queue` is how many requests may wait for a
    slot. `prepare` False skips the cache of repacked weights and pays for it in private memory.
    Raises BundleError, BudgetError, BackendError, UsageError, StorageError.
    """
    started = time.perf_counter()
    choose(backend)
    if type(threads) is not int or not 0 <= threads <= 1024:
        raise UsageError(f"threads is {threads!r}.", "It must be from 0 to 1024.", "Correct it.")
    bundle = Bundle.open(path)
    try:
        card = Card.from_json(bundle.bytes(bundle.section("card")))
        graph_bytes, places = bundle.bytes(_graph(bundle, card, kv)), _places(bundle)
        sizes = _sizes(card, graph_bytes, places, prepare)
        size = budget.parse_size(memory)

        def replan(memory: int | None = size, context: int | None = None) -> Plan:
            return budget.plan(card, sizes, memory=memory, context=context, slots=slots, kv=kv, chunk=chunk)

        plan = replan(context=context)
        parts = Parts(bundle, card, plan, mapped={"weights": str(bundle.path)})
        before = measure.anonymous_bytes()
        tokenizer = Tokenizer.from_json(bundle.view(bundle.section("tokenizer")))
        before = parts.grew("tokenizer", before)
        if prepare:
            prepared = prepack.prepare(graph_bytes, places, key=bundle.digest, progress=progress)
            graph_bytes, places = prepared.graph, prepared.places
            parts.mapped["repacked weights"] = str(prepared.path)
            parts.prepared = prepared
        progress(Event("load", detail=bundle.path.name))
        bundle.check_unchanged()
        graph = session.open_graph(graph_bytes, places, threads=threads)
        bundle.check_unchanged()
        parts.placement = graph.placement()
        parts.grew("private weights" if sizes.private else "engine", before)
        if card.task == "embed":
            parts.ready()
            parts.load_s = time.perf_counter() - started
            return EmbeddingModel(parts, tokenizer, graph)
        decoder = Decoder(graph, card, Cache(card, plan.context, slots, kv), plan.chunk)
        template = bundle.find("chat_template")
        chat = bundle.bytes(template).decode("utf-8", "replace") if template else ""
        parts.ready()
        parts.load_s = time.perf_counter() - started
        return LanguageModel(parts, tokenizer, chat, decoder, replan, queue)
    except BaseException:
        bundle.close()
        raise


def plan(
    path: str | Path, memory: int | str | None = None, *, context: int | None = None, slots: int = 1, kv: str = "fp32",
    chunk: int | None = None, prepare: bool = True,
) -> Plan:  # fmt: skip
    """What `load` with the same arguments would use, without loading anything."""
    with Bundle.open(path) as bundle:
        card = Card.from_json(bundle.bytes(bundle.section("card")))
        sizes = _sizes(card, bundle.bytes(_graph(bundle, card, kv)), _places(bundle), prepare)
        size = budget.parse_size(memory)
        return budget.plan(card, sizes, memory=size, context=context, slots=slots, kv=kv, chunk=chunk)


def _places(bundle: Bundle) -> dict[str, session.Place]:
    """The sections that graphs may point into."""
    found = (section for section in bundle.sections if section.kind == "weights")
    return {
        section.name: session.Place(str(bundle.path), section.offset, section.length, bundle.fileno())
        for section in found
    }


def _sizes(card: Card, graph: bytes, places: dict[str, session.Place], prepare: bool) -> Sizes:
    """The bytes that loading this graph brings, by its shapes alone."""
    model = session.read(graph, places)
    guess = prepack.estimate(graph, places)
    tables = {name for node in model.nodes if node.op.startswith("Gather") for name in node.inputs}
    gathered = sum(tensor.nbytes for tensor in model.tensors if tensor.external and tensor.name in tables)
    return Sizes(
        weights=guess.direct - gathered + min(gathered, RELEASED * _AROUND),
        repacked=guess.repacked if prepare else 0,
        private=0 if prepare else guess.repacked,
        tokenizer=card.tokenizer_bytes + _TOKENIZER,
        session=_ENGINE + _ENGINE_NODE * len(model.nodes),
    )


def _graph(bundle: Bundle, card: Card, kv: str) -> BundleSection:
    name = "embed" if card.task == "embed" else "decode" if kv != "int8" else "decode.int8"
    for graph in bundle.graphs:
        if graph.name == name:
            return bundle.section("graph", graph.section)
    raise BundleError(
        f"The bundle has no graph {name!r}.", f"It has {', '.join(graph.name for graph in bundle.graphs) or 'none'}.",
        "Convert the checkpoint again.",
    )  # fmt: skip
