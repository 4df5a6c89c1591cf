"""The child in which graphs are compiled, and compiled graphs tried: a provider's library may die of either, and QNN's
knows one processor a process.

Each function answers one question of probe.py (`context.py` asks); what is big lies in files in a folder of the asking
side. It knows nothing about bundles or caches.
"""

import base64
import hashlib
from pathlib import Path

from .. import onnx_texts, onnx_wire, providers, session
from ..providers import Listed
from . import context
from .probe import product

SHARE, LAST = "ep.share_ep_contexts", "ep.stop_share_ep_contexts"
_ROOT = "session.model_external_initializers_file_folder_path"
CACHE = "ep_cache_context"


def compile_graphs(question: dict) -> dict:
    """Writes NUMBER.ctx (a model of one EPContext node) for each graph of [name, group, base64] to `folder`, and one
    binary for each group where they are `shared`, else for each graph; answers the name of each one's binary. Graphs of
    a group follow one another."""
    target = _target(question)
    places = {name: session.Place(**place) for name, place in question["places"].items()}
    folder, graphs = Path(question["folder"]), question["graphs"]
    binaries = []
    for number, (name, group, text) in enumerate(graphs):
        graph = base64.b64decode(text)
        entries = {_ROOT: _root(f"{question['key']} {name}")}
        if question["shared"]:
            entries |= {SHARE: "1", LAST: str(int(group not in [one[1] for one in graphs[number + 1 :]]))}
        wrapper = _compiled(graph, places, target, entries, folder, number, name)
        (folder / f"{number}.part").write_bytes(wrapper)
        (folder / f"{number}.part").rename(folder / f"{number}.ctx")  # whoever counts them sees whole ones
        model = onnx_wire.read(wrapper, {})
        binaries.append(onnx_texts.texts(model, model.nodes[0])[CACHE])
    return {"binaries": binaries}


def identify(question: dict) -> dict:
    """What the provider writes into a compiled model about itself and the device, here and now."""
    wrapper = _compiled(product(), {}, _target(question), {}, Path(question["folder"]), 0, "two matrices")
    sdk, information = context.information(wrapper, question["ep"])
    return {"sdk": sdk, "information": information}


def rehearse(question: dict) -> dict:
    """Opens every compiled graph once."""
    target = _target(question)
    place = session.Place
    binaries = [context.Binary(place(**one["place"]), one["sha256"]) for one in question["binaries"]]
    wrappers = {name: (base64.b64decode(text), number) for name, text, number in question["wrappers"]}
    with context.sessions(wrappers, binaries, target) as opened:
        return {"opened": [name for name, _ in opened]}


def _target(question: dict) -> session.Target:
    if question["library"]:
        providers.register(question["ep"], question["library"])
    return session.Target(Listed(**question["listed"]), question["settings"])


def _compiled(graph: bytes, places, target: session.Target, entries, folder: Path, number: int, name: str) -> bytes:
    with session.door(f"The graph {name!r:.80} cannot be compiled for {target.device.provider}."):
        options = session.options_for(places, target=session.Target(target.device, target.settings, entries=entries))
        providers.attach(options, target.device, target.settings)
        located = session.locate(session.read(graph, places), places)
        return providers.compiled(options, located, str(folder), f"{number}.onnx")


def _root(key: str) -> str:
    """The root folder, spelled in a way of its own for each key.

    QNN calls a compiled graph after the folder of its external data, and everything that is in one context, or open in
    one process, must have another name; the names of two chunk lengths differ in nothing else.
    """
    bits = f"{int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]):064b}"
    return "/" + "".join("./" if bit == "1" else "/" for bit in bits)
