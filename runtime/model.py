"""`load` and `plan`: from a bundle's path to a model that keeps to its budget.

Loading is: open and verify the bundle, plan, refuse what cannot fit, prepare the weights for this device once, map
them, make the cache, and check that the file behind the mapping is still the one that was verified.
"""

import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from . import backends, budget, measure, onnx_wire, prepack, session
from .backends.placement import check_required
from .bitstack.layout import Index, StackFormat
from .bitstack.stack import Stack, read_index
from .budget import Plan, Sizes
from .bundle import Bundle
from .bundle import Section as BundleSection
from .card import Card
from .embedding import EmbeddingModel
from .errors import BackendError, BudgetError, BundleError, StorageError, UsageError
from .events import Event, Progress, silent
from .experts.layout import Index as Experts
from .experts.store import Options as ExpertOptions
from .experts.store import Store
from .experts.store import read_index as read_experts
from .kernels import DOMAIN, available, lower, missing
from .language.cache import Cache
from .language.decoder import Decoder
from .language.model import LanguageModel
from .language.part import Part
from .language.tokens import Tokenizer
from .loaded import Parts
from .mapped import ALWAYS
from .portable import portable
from .static.load import COMPILED, chosen, open_prefill, tune
from .static.memory import Beside, beside

_TOKENIZER = 1 << 19  # its code and the heap's slack, beside its tables
_ENGINE = 16 << 18  # what an ORT environment and session hold, and for each node of the graph:
_ENGINE_NODE = 4 << 10
_CODE = 48 << 18  # of the engine and the kernels, where these do the work
_STACKED, _EXPERTS = ("StackedLinear", "StackedRows"), ("Experts", "RouteExperts")
_PIECE = 1 << 10  # what whole pages add to a node's weights


def load(
    path: str | Path, memory: int | str | None = None, backend: str = "auto", *, context: int | None = None,
    slots: int = 1, kv: str = "fp32", chunk: int | None = None, threads: int = 0, queue: int = 256,
    prepare: bool = True, kernels: str = "auto", profile: str | None = None, part: bool = False,
    experts: ExpertOptions | None = None, require: Mapping[str, float] | None = None, prefill: str = "auto",
    compiled: str = "auto", progress: Progress = silent,
) -> LanguageModel | EmbeddingModel | Part:  # fmt: skip
    """Opens a bundle inside `memory` (bytes, "200MB", or None for no budget).

    `backend` is where its graph runs: auto and cpu, gpu, npu, or one provider of these (npu:qnn). All of its nodes must
    run there unless `require` asks for less, {"npu": 0.9}, which by itself chooses the npu. Other devices' own memory
    is in no plan. A language model's prompts run there, through static graphs where the bundle has some for it, and
    answers on the CPU; `prefill` "dynamic" does without these graphs, "static" insists on them, on the CPU too, where
    auto takes only those that were made for it. Where a device takes graphs that were compiled ahead, the bundle's are
    used if they are for it and its version; else it compiles them itself, once, which an event reports. `compiled`
    "bundle" refuses then, and "none" opens them as they are.
    `context` tokens and `slots` conversations at once decide the key-value cache, kept as `kv` (fp32, fp16 or int8);
    `chunk` is the most tokens of one prefill step; `threads` 0 takes every core; `queue` is how many requests may wait
    for a slot. `prepare` False skips the cache of repacked weights and pays for it in private memory; so does a cache
    folder that is full or cannot be used, which an event reports. `kernels` "ort" uses ONNX Runtime's own operators
    even where ours are there; it needs the cache. `profile` is the prefix of a file of the engine's timings, written by
    close(). With `part` the bundle may be a part of a language model (`shoal convert --blocks`), which is refused
    otherwise; a whole one is then the part that has all blocks. Of a stack as much is resident as fits, and of a
    mixture's experts; `experts` says how the others are read.
    Raises BundleError, BudgetError, BackendError, UsageError, and StorageError where the budget has no room for that.
    """
    started = time.perf_counter()
    backend, share = _required(backend, require or {})
    if type(threads) is not int or not 0 <= threads <= 1024:
        raise UsageError(f"threads is {threads!r}.", "It must be from 0 to 1024.", "Correct it.")
    if compiled not in COMPILED:
        raise UsageError(f"compiled is {compiled!r:.40}.", f"It is one of {', '.join(COMPILED)}.", "Name one.")
    with contextlib.ExitStack() as undo:
        bundle = undo.enter_context(Bundle.open(path))
        card = Card.from_json(bundle.bytes(bundle.section("card")))
        if card.is_part and not part:
            raise UsageError(
                f"{path} is a part of a model and cannot run alone.",
                f"It has blocks {card.span.start}:{card.span.stop} of 0:{card.blocks}.",
                "Convert the checkpoint without --blocks, or let a device and an edge server run its parts together.",
            )
        if part and card.task != "generate":
            raise UsageError(f"{path} is no part of a language model.", "It embeds text.", "Load it as it is.")
        static = chosen(bundle, card, backend, prefill, part)
        try:
            device = backends.choose(backend)
        except BackendError as error:
            if static is None or share > 0 or prefill == "static":
                raise
            progress(Event("load", detail=f"prompts stay on the cpu: {error.what} {error.why}"))
            device = static = None
        # Where the model's own graph runs: with static graphs for its prompts it stays on the CPU
        whole = device if static is None else None
        prepare, kernels = (prepare, kernels) if whole is None else (False, "ort")
        graph_bytes, places = bundle.bytes(_graph(bundle, card, kv)), _places(bundle)
        ours, index = _ours(kernels, graph_bytes, places), _pool(bundle, graph_bytes, places)
        more = beside(bundle, static, places, kv, device is None) if static else Beside()
        sizes = _sizes(card, graph_bytes, places, prepare, ours, index, more)
        size, sections = budget.parse_size(memory), places

        def replan(memory: int | None = size, context: int | None = context, **given) -> Plan:
            given = {"chunk": chunk} | given
            return budget.plan(card, sizes, memory=memory, context=context, slots=slots, kv=kv, **given)

        parts = Parts(bundle, card, replan(), replan, mapped={"weights": str(bundle.path)})
        before = measure.anonymous_bytes()
        takes_text = card.span.start == 0
        tokenizer = Tokenizer.from_json(bundle.bytes(bundle.section("tokenizer"))) if takes_text else None
        session.release_freed_memory()  # of the section's bytes
        parts.grew("tokenizer", before)
        if not ours:
            transcoded = portable(graph_bytes, places, key=bundle.digest, progress=progress)
            undo.callback(transcoded.close)
            graph_bytes, places = transcoded.graph, transcoded.places
            parts.kept.append(transcoded)
        if prepare and sizes.repacked:
            try:
                parts.prepared = prepack.prepare(graph_bytes, places, key=bundle.digest, progress=progress)
            except StorageError as error:  # no cache to be had: as many bytes of private memory, and the plan says so
                sizes = _sizes(card, graph_bytes, places, False, True, index, more)
                try:
                    parts.plan = replan()
                except BudgetError as refused:
                    why = f"{error.why} Without it: {refused.what} {refused.why}"
                    raise StorageError(error.what, why, error.fix) from None
                progress(Event("prepare", detail=f"not done, weights will be private: {error.what} {error.why}"))
            else:
                undo.callback(parts.prepared.close)
                graph_bytes, places = parts.prepared.graph, parts.prepared.places
                parts.mapped["repacked weights"] = str(parts.prepared.path)
        progress(Event("load", detail=bundle.path.name))
        bundle.check_unchanged()
        graph, parts.placed = backends.open_graph(
            whole, graph_bytes, places, share=share, threads=threads, profile=profile
        )
        undo.enter_context(graph)
        bundle.check_unchanged()
        parts.placement = graph.placement()
        opened = session.read(graph_bytes, places)
        parts.products = session.products(opened, places)
        parts.nodes = opened.nodes if profile is not None else ()
        parts.grew("private weights" if sizes.private else "engine", before)
        chunks = None
        if static is not None:
            chunks = open_prefill(
                bundle, static, sections, device, kv, share=share, threads=threads, ours=ours, way=prefill,
                compiled=compiled, progress=progress,
            )  # fmt: skip
            session.release_freed_memory()
            parts.grew("static graphs", before)
            if chunks is None:
                sizes = dataclasses.replace(sizes, more=(), arena=0)
                parts.plan = replan()
        if chunks is not None:
            undo.callback(chunks.close)
            parts.placed = chunks.graphs.placement
            parts.placement = dict(Counter(parts.placement) + Counter(chunks.graphs.nodes()))
        handles = {}
        if isinstance(index, Index):
            parts.stack = undo.enter_context(Stack(bundle))
            parts.stack.set_entries(parts.plan.entries)
            handles["stack"] = parts.stack.handle
        elif index is not None:
            parts.experts = undo.enter_context(Store(bundle, parts.plan.entries, experts or ExpertOptions()))
            handles["experts"] = parts.experts.handle
        made: LanguageModel | EmbeddingModel | Part
        if whole is not None and card.task != "embed":
            raise BackendError(
                f"{card.name} cannot run on the {whole.backend} yet.",
                f"{share:.0%} of its nodes and more can, but attention writes keys and values where they lie, in the "
                f"cpu's memory, and prompts need static graphs for the {whole.backend}.",
                "Convert the checkpoint with such graphs, or load it with backend='cpu'.",
            )  # fmt: skip
        if tokenizer and card.task == "embed":
            made = EmbeddingModel(parts, tokenizer, graph)
        else:
            decoder = Decoder(graph, card, Cache(card, parts.plan.context, slots, kv), parts.plan.chunk, handles)
            decoder.prefill = chunks
            template = bundle.find("chat_template")
            chat = bundle.bytes(template).decode("utf-8", "replace") if template else ""
            if part or tokenizer is None:
                made = Part(parts, tokenizer, chat, decoder)
            else:
                made = LanguageModel(parts, tokenizer, chat, decoder, queue)
        parts.ready()
        if chunks is not None:
            tune(chunks, decoder, bundle, device, prefill, threads, progress)
        parts.load_s = time.perf_counter() - started
        undo.pop_all()
        return made


def plan(
    path: str | Path, memory: int | str | None = None, *, context: int | None = None, slots: int = 1, kv: str = "fp32",
    chunk: int | None = None, prepare: bool = True, kernels: str = "auto", backend: str = "auto",
    prefill: str = "auto",
) -> Plan:  # fmt: skip
    """What `load` with the same arguments would use, without loading anything or looking for devices."""
    with Bundle.open(path) as bundle:
        card = Card.from_json(bundle.bytes(bundle.section("card")))
        static = chosen(bundle, card, backend, prefill)
        graph, places = bundle.bytes(_graph(bundle, card, kv)), _places(bundle)
        ours, index = _ours(kernels, graph, places), _pool(bundle, graph, places)
        on_cpu = backend.partition(":")[0] in ("auto", "cpu")
        more = beside(bundle, static, places, kv, on_cpu) if static else Beside()
        sizes = _sizes(card, graph, places, prepare, ours, index, more)
        size = budget.parse_size(memory)
        return budget.plan(card, sizes, memory=size, context=context, slots=slots, kv=kv, chunk=chunk)


def _required(backend: str, require: Mapping[str, float]) -> tuple[str, float]:
    """The backend that is meant, and the share of the nodes that must run there. Raises UsageError."""
    check_required(require)
    backends.check(backend)
    named, *more = [*require, ""]
    if require and (len(more) > 1 or (backend != "auto" and backend.partition(":")[0] != named)):
        raise UsageError(
            f"{' and '.join(require)} cannot be required of {backend}.", "A graph runs on one device beside the CPU.",
            "Require one, of the backend that is chosen.",
        )  # fmt: skip
    return named if require and backend == "auto" else backend, require.get(named, 1.0)


def sizes(card: Card, graph: bytes, places: dict[str, session.Place]) -> Sizes:
    """What loading this graph would bring on this device, but for a stack, by its shapes alone."""
    return _sizes(card, graph, places, True, _ours("auto", graph, places), None, Beside())


def _places(bundle: Bundle) -> dict[str, session.Place]:
    """The sections that graphs may point into."""
    found = (section for section in bundle.sections if section.kind == "weights")
    return {
        section.name: session.Place(str(bundle.path), section.offset, section.length, bundle.fileno())
        for section in found
    }


def _ours(kernels: str, graph: bytes, places: dict[str, session.Place]) -> bool:
    """Whether this graph runs as it is: by our kernels, or because it has no operator of theirs. Raises UsageError, and
    BackendError for a stack without them."""
    if kernels not in ("auto", "ort"):
        raise UsageError(f"There are no kernels {kernels!r}.", "They are auto or ort.", "Name one.")
    if kernels == "auto" and available():
        return True
    model = session.read(graph, places)
    what = "a stack" if _named(model, *_STACKED) else "experts on flash" if _named(model, *_EXPERTS) else ""
    if what:
        raise BackendError(
            f"ONNX Runtime's own operators cannot run {what}.",
            "Only shoal's kernels can: " + ("kernels='ort' excludes them." if available() else f"{missing()}."),
            "Leave kernels at auto." if available() else "Install a C++ compiler and shoal again, or convert to int4.",
        )  # fmt: skip
    return not lower.is_ours(model)


def _named(model: onnx_wire.Model, *operators: str) -> list[onnx_wire.Node]:
    return [node for node in model.nodes if node.domain == DOMAIN and node.op in operators]


def _pool(bundle: Bundle, graph: bytes, places: dict[str, session.Place]) -> Index | Experts | None:
    """What the stack or the experts of this graph are, checked against the graph; None where it has neither. Raises
    BundleError."""
    model = session.read(graph, places)
    if nodes := _named(model, *_EXPERTS):
        return _experts(bundle, nodes)
    nodes = _named(model, *_STACKED)
    if not nodes:
        return None
    index = read_index(bundle)
    for node in nodes:
        at = node.integers.get("matrix", -1)
        found = index.matrices[at] if 0 <= at < len(index.matrices) else None
        said = (found.inputs, found.outputs, found.rotated) if found else None
        ranks = {step.rank for step in found.steps if isinstance(step, StackFormat)} if found else set()
        here = tuple(node.integers.get(key, 0) for key in ("inputs", "outputs", "rotated"))
        if here != said or ranks - {node.integers.get("rank", 0)}:
            why = f"Of the matrix {at} its graph and its stack say different things."
            raise BundleError("The bundle's stack cannot be used.", why, "Convert the checkpoint again.")
    return index


def _experts(bundle: Bundle, nodes: list[onnx_wire.Node]) -> Experts:
    index = read_experts(bundle)
    shape = {"hidden": index.precisions[0].gate_up.inputs, "ffn": index.precisions[0].down.inputs}
    for node in nodes:
        said = {"experts": index.experts, **(shape if node.op == "Experts" else {})}
        here = {key: node.integers.get(key, 0) for key in said}
        if here != said or not 0 <= node.integers.get("layer", -1) < index.layers:
            why = f"Of the layer {node.integers.get('layer', -1)} its graph and its records say different things."
            raise BundleError("The bundle's experts cannot be used.", why, "Convert the checkpoint again.")
    return index


def _sizes(
    card: Card, graph: bytes, places: dict[str, session.Place], prepare: bool, ours: bool,
    index: Index | Experts | None, more: Beside,
) -> Sizes:  # fmt: skip
    """The bytes that loading this graph brings, by its shapes alone; unless it is `ours`, lowered."""
    model = session.read(graph, places)
    if not ours:
        lowered = lower.lower(model)
        # Where it will be does not matter: nothing of it is read
        places = places | {lower.LOCATION: session.Place(lower.LOCATION, 0, lowered.length)}
        model = onnx_wire.read(lowered.graph, {name: place.length for name, place in places.items()})
    guess = prepack.estimate(model)
    tables = session.tables(model, places)
    fused = any(node.op in ("QuantizedLinear", "StackedLinear") for node in model.nodes)
    repacked = guess.repacked and guess.repacked + _PIECE * len(model.nodes)
    vectors = sum(table.row_bytes for table in tables.pop(ALWAYS))
    stack: Sequence[int] = (0,)
    if isinstance(index, Experts):
        record, count = max(one.record for one in index.precisions), index.layers * index.experts
        stack = range(0, record * count + 1, record)
    elif index is not None:
        stack = tuple(index.sizes())
    gathered = [table for found in tables.values() for table in found]
    return Sizes(
        weights=guess.direct - sum(table.stride * table.rows for table in gathered),
        row=sum(table.row_bytes for table in gathered),
        repacked=repacked if prepare else 0,
        private=0 if prepare else repacked,
        tokenizer=card.tokenizer_bytes + _TOKENIZER if card.span.start == 0 else 0,
        session=_ENGINE + _ENGINE_NODE * len(model.nodes) + vectors,
        # The engine compares what is prepared with what it repacks of the originals
        cold=max(guess.cold + repacked, 3 * guess.largest) if prepare else guess.cold,
        graph="lowered" if not ours else "fused" if fused else "plain",
        code=_CODE if fused else Sizes.code,
        stack=stack,
        floor=index.floor if isinstance(index, Index) else min(card.top_k, len(stack) - 1),
        pool="experts" if isinstance(index, Experts) else "stack",
        more=more.rows,
        arena=more.arena,
    )


def _graph(bundle: Bundle, card: Card, kv: str) -> BundleSection:
    name = "embed" if card.task == "embed" else "part" if card.is_part else "decode"
    name = name if kv == "fp32" or name == "embed" else f"{name}.{kv}"
    for graph in bundle.graphs:
        if graph.name == name and (graph.first_block, graph.last_block) == (card.span.start, card.span.stop):
            return bundle.section("graph", graph.section)
    raise BundleError(
        f"The bundle has no graph {name!r}.", f"It has {', '.join(graph.name for graph in bundle.graphs) or 'none'}.",
        "Convert the checkpoint again.",
    )  # fmt: skip
