"""Asking a backend's library in a process of its own, because it may die or hang: which devices it lists and whether
they compute, which nodes of a graph it takes, and what compiler.py does.

`devices`, `survey` and `ask` are the asking side; every question has a deadline, after which the child is killed.
`main` is the child: one question on standard input, one answer (JSON) on what standard output was, which libraries
write to as they like and get standard error instead.
"""

import base64
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from tempfile import TemporaryFile

import numpy as np

from ..errors import BackendError, ShoalError
from ..onnx_wire import node_bytes
from ..providers import Assigned, Listed

SECONDS = 60.0  # for a library to load, list its devices and multiply once
SURVEY_SECONDS = 300.0  # for a graph to be compiled
_CHILD = f"import sys, json; sys.path[:] = json.loads(sys.argv[1]); from {__name__} import main; main()"
_LIMIT = 64 << 20  # bytes of an answer
_TICK = 0.5  # seconds


def devices(
    ep: str, module: str = "", library: str = "", settings: Mapping[str, Mapping[str, str]] | None = None,
    kinds: tuple[str, ...] = (), seconds: float = SECONDS,
) -> tuple[list[tuple[Listed, str]], str]:  # fmt: skip
    """The devices of a provider with what is wrong with each ("" where it multiplied two matrices rightly), and the
    path of its library.

    The library is `library`, or the one that the wheel `module` names, or neither where the provider is built in. Only
    `kinds` are tried; `settings` are for each kind. Raises BackendError where the library does not load, dies or hangs.
    """
    answer = ask(
        {"do": "devices", "ep": ep, "module": module, "library": library, "kinds": kinds, "settings": settings or {}},
        seconds, f"{ep}'s library",
    )  # fmt: skip
    try:
        found = [(Listed(**one["listed"]), str(one["fault"])) for one in answer["devices"]]
        return found, str(answer["library"])
    except (KeyError, TypeError) as error:
        raise _died(f"{ep}'s library", f"answers what is no list of devices ({error})") from None


def survey(
    graphs: Sequence[bytes], places: Mapping, listed: Listed, library: str, settings: Mapping[str, str],
    dims: Mapping[str, int] | None = None, seconds: float = SURVEY_SECONDS,
) -> list[tuple[list[Assigned], list[str]]]:  # fmt: skip
    """session.survey of each graph, all in one child: where each node would run, and what the provider said of those it
    refused.

    Raises BackendError where the provider refuses a graph, dies of it or does not come back within `seconds`.
    """
    question = {
        "do": "survey", "ep": listed.provider, "module": "", "library": library, "listed": dataclasses.asdict(listed),
        "graphs": [base64.b64encode(graph).decode() for graph in graphs], "settings": dict(settings),
        "dims": dict(dims or {}), "places": by_path(places),
    }  # fmt: skip
    answer = ask(question, seconds, listed.provider)
    try:
        found = [([Assigned(*one) for one in nodes], list(map(str, said))) for nodes, said in answer["surveys"]]
        if len(found) != len(graphs):
            raise TypeError(f"{len(found)} of {len(graphs)} graphs")
        return found
    except (KeyError, TypeError, ValueError) as error:
        raise _died(listed.provider, f"answers what is no placement ({error})") from None


def by_path(places: Mapping) -> dict[str, dict]:
    """Places as a question has them: a descriptor is this process's own, the child opens the path."""
    return {name: dataclasses.asdict(dataclasses.replace(place, fd=-1)) for name, place in places.items()}


def ask(question: dict, seconds: float, who: str, tick: Callable[[], None] = lambda: None) -> dict:
    """The child's answer to `question`; `tick` is called now and then meanwhile. Raises BackendError where it refuses,
    dies, or does not come back within `seconds`."""
    if not sys.executable:
        raise _died(who, "cannot be tried: this program has no Python interpreter beside it")
    command = [sys.executable, "-P", "-c", _CHILD, json.dumps(sys.path)]
    deadline = time.monotonic() + seconds
    try:
        with TemporaryFile() as said:  # not a pipe: what waits for an answer in turns cannot write as well
            said.write(json.dumps(question).encode())
            said.seek(0)
            child = subprocess.Popen(command, stdin=said, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        with child:
            try:
                while True:
                    try:
                        out, err = child.communicate(timeout=max(0.0, min(_TICK, deadline - time.monotonic())))
                        break
                    except subprocess.TimeoutExpired:
                        if time.monotonic() >= deadline:
                            raise _died(who, f"does not come back within {seconds:g} s") from None
                    tick()
            finally:
                child.kill()
    except OSError as error:
        raise _died(who, f"cannot be tried: {error.strerror}") from None
    if child.returncode < 0:
        with_signal = signal.Signals(-child.returncode).name
        raise _died(who, f"dies of {with_signal}")
    try:
        if len(out) > _LIMIT:
            raise ValueError
        answer = json.loads(out)
        refused = answer.get("refused")
    except (ValueError, AttributeError):
        words = err.decode(errors="replace").strip().splitlines()
        raise _died(who, f"ends with status {child.returncode}: {words[-1][:200] if words else 'no word'}") from None
    if refused:
        raise BackendError(*map(str, refused))
    return answer


def _died(who: str, why: str) -> BackendError:
    fix = "Update or reinstall its package and its driver, or choose another backend."
    return BackendError(f"{who} cannot be used.", f"It {why}.", fix)


def main() -> None:
    """The child."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    question = json.load(sys.stdin)
    try:
        answer = (_ANSWERS.get(question["do"]) or _compiler(question["do"]))(question)
    except ShoalError as error:
        answer = {"refused": [error.what, error.why, error.fix]}
    except Exception as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}."
        answer = {"refused": [f"{question['ep']} cannot be used.", why, "Reinstall its package."]}
    json.dump(answer, out)
    out.flush()
    os._exit(0)  # what was asked is answered: a library that dies while it is unloaded does no harm


def _devices(question: dict) -> dict:
    from .. import providers

    library = question["library"]
    if question["module"] and not library:
        import importlib

        library = str(importlib.import_module(question["module"]).get_library_path())
    if library:
        providers.register(question["ep"], library)
    found = []
    for listed in providers.listed(question["ep"]):
        fault = ""
        if listed.virtual:
            fault = "it is virtual: it compiles and does not run"
        elif listed.kind in question["kinds"]:
            fault = _fault(listed, question["settings"].get(listed.kind, {}))
        found.append({"listed": dataclasses.asdict(listed), "fault": fault})
    return {"devices": found, "library": library}


def _fault(listed: Listed, settings: Mapping[str, str]) -> str:
    """Why a device cannot multiply two matrices, or ""."""
    from ..session import Target, open_graph

    x = np.linspace(-1, 1, 8 * 16, dtype=np.float32).reshape(8, 16)
    w = np.ascontiguousarray(x.T)
    try:
        with open_graph(product(), {}, target=Target(listed, settings)) as graph:
            error = float(np.abs(graph.run({"x": x, "w": w})["y"] - x @ w).max())
    except ShoalError as refused:
        return f"{refused.what} {refused.why}".rstrip(".")
    return "" if error < 0.05 else f"its product of two matrices is off by {error:.2g}"  # float16 and tf32 are near


def _survey(question: dict) -> dict:
    from .. import providers, session

    if question["library"]:
        providers.register(question["ep"], question["library"])
    target = session.Target(Listed(**question["listed"]), question["settings"], whole=False)
    places = {name: session.Place(**place) for name, place in question["places"].items()}
    found = []
    for graph in question["graphs"]:
        assigned, messages = session.survey(base64.b64decode(graph), places, target, question["dims"])
        # Of thousands of words those that say no
        kept = list(dict.fromkeys(one for one in messages if "FAILED" in one or "not found in registries" in one))
        found.append(([dataclasses.astuple(one) for one in assigned], kept))
    return {"surveys": found}


def _compiler(name: str) -> Callable[[dict], dict]:
    from . import compiler

    return {"compile": compiler.compile_graphs, "identify": compiler.identify, "rehearse": compiler.rehearse}[name]


_ANSWERS = {"devices": _devices, "survey": _survey}


def product() -> bytes:
    """x [8, 16] times w [16, 8] in fp32, as a ModelProto."""

    def message(number: int, payload: bytes) -> bytes:
        return bytes([number << 3 | 2, len(payload)]) + payload

    def value(name: str, *dims: int) -> bytes:
        shape = b"".join(message(1, bytes([8, dim])) for dim in dims)
        return message(1, name.encode()) + message(2, message(1, b"\x08\x01" + message(2, shape)))

    graph = message(1, node_bytes("MatMul", ["x", "w"], ["y"], name="product")) + message(2, b"probe")
    graph += message(11, value("x", 8, 16)) + message(11, value("w", 16, 8)) + message(12, value("y", 8, 8))
    return b"\x08\x0a" + message(7, graph) + message(8, b"\x0a\x00\x10\x15")
