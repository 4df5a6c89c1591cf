"""The execution providers of ONNX Runtime: which it has, which plugin libraries were registered, what devices they
list, and how a session is told to use one. Beside session.py the only file that asks the engine about them.

Registering a library loads its code into this process, so backends/probe.py does that in a child first. Nothing is
fetched: a library is a file that is there. This module knows nothing about backends, graphs or bundles.
"""

import contextlib
import platform
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnxruntime

from .errors import BackendError, UsageError

CPU = "CPUExecutionProvider"
_REGISTERED: dict[str, str] = {}  # name -> library, of this process
_LOCK = threading.Lock()


@dataclass(frozen=True)
class Listed:
    """A device as the engine lists it. `kind` is that of the hardware (cpu, gpu, npu), so a provider that emulates its
    device has a cpu; `virtual` ones can only compile."""

    provider: str
    kind: str
    vendor: str
    vendor_id: int
    device_id: int
    version: str  # of the provider
    virtual: bool = False


@dataclass(frozen=True)
class Assigned:
    """A node and the provider that took it; `name` is "" for one without."""

    provider: str
    op: str
    domain: str
    name: str


def offered() -> list[str]:
    """The names of all providers that a session could use now."""
    return list(onnxruntime.get_available_providers())


def register(provider: str, library: str) -> None:
    """Loads a plugin library under the provider's name; again is nothing. Raises BackendError where the engine refuses
    it, UsageError where the name has another library."""
    with _LOCK:
        if (known := _REGISTERED.get(provider)) is not None:
            if known != library:
                why = f"{provider} is {known} in this process."
                raise UsageError(f"{library} cannot be registered.", why, "Use one library a process.")
            return
        try:
            onnxruntime.register_execution_provider_library(provider, library)
        except Exception as error:
            why = " ".join(str(error).split())[:400]
            fix = "Reinstall its package in a version for this onnxruntime, or leave it out."
            raise BackendError(f"{library} cannot be registered as {provider}.", why, fix) from None
        _REGISTERED[provider] = library


def registered(provider: str) -> str:
    """The library that this process registered under the provider's name, "" where it registered none."""
    return _REGISTERED.get(provider, "")


def listed(provider: str) -> list[Listed]:
    """The devices of a provider; one that is built in without a list of its own has one, of unknown hardware."""
    found = [_listed(device) for device in _devices(provider)]
    if not found and provider in offered():
        found = [Listed(provider, "", platform.processor() or platform.machine(), 0, 0, onnxruntime.__version__)]
    return found


def attach(options: "onnxruntime.SessionOptions", device: Listed, settings: Mapping[str, str]) -> list:
    """Tells a session's options to use `device`; what is returned are the session's `providers`. Raises BackendError
    for a device that is no longer there."""
    if not device.kind:
        if device.provider in offered():
            return [(device.provider, dict(settings)), CPU]
    elif match := [one for one in _devices(device.provider) if _listed(one) == device]:
        options.add_provider_for_devices(match[:1], dict(settings))
        return []
    raise BackendError(
        f"The {device.kind or 'device'} of {device.provider} is gone.",
        f"ONNX Runtime lists {', '.join(sorted({one.ep_name for one in onnxruntime.get_ep_devices()}))}.",
        "Look at shoal devices; plug it in or wake it, or choose another backend.",
    )


def compiled(options: "onnxruntime.SessionOptions", graph: bytes, folder: str, name: str) -> bytes:
    """The graph as its provider compiled it: a model of EPContext nodes, whose binaries are files in `folder`, called
    after `name`. It is optimised as a session with these options would."""
    compiler = onnxruntime.ModelCompiler(
        options, graph, flags=onnxruntime.OrtCompileApiFlags.ERROR_IF_NO_NODES_COMPILED,
        graph_optimization_level=options.graph_optimization_level,
    )  # fmt: skip
    compiler.set_ep_context_binary_information(f"{folder}/", name)
    return compiler.compile_to_bytes()


def compatible(device: Listed, information: str) -> str:
    """What a provider says of a compiled graph with this compatibility information: optimal, prefer_recompilation,
    unsupported or not_applicable; unknown where it says nothing."""
    from onnxruntime.capi import onnxruntime_pybind11_state as engine

    match = [one for one in _devices(device.provider) if _listed(one) == device]
    try:
        found = engine.get_model_compatibility_for_ep_devices(match[:1], information)
    except Exception:  # QNN's on x86 raises
        return "unknown"
    return str(found).rsplit(".", 1)[-1].lower().removeprefix("ep_").removeprefix("supported_")


def assigned(session: "onnxruntime.InferenceSession") -> list[Assigned]:
    """Every node as the engine placed it, fused ones as they are now."""
    return [
        Assigned(part.ep_name.split(".")[0], node.op_type, node.domain, node.name)
        for part in session.get_provider_graph_assignment_info()
        for node in part.get_nodes()
    ]


@contextlib.contextmanager
def overheard(messages: list[str]) -> Iterator[None]:
    """While inside, what the engine would log goes to `messages`, every word of it: providers say there why they refuse
    a node. For a process of its own: the logger is everybody's."""
    onnxruntime.set_default_logger_callback(lambda *said: messages.append(said[4]), 0)
    try:
        yield
    finally:
        onnxruntime.set_default_logger_callback(None)


def _devices(provider: str) -> list:
    found = onnxruntime.get_ep_devices()
    return [device for device in found if device.ep_name.split(".")[0] == provider]


def _listed(device) -> Listed:
    hardware, kind = device.device, str(device.device.type).rsplit(".", 1)[-1].lower()
    return Listed(
        device.ep_name.split(".")[0], kind, hardware.vendor or device.ep_vendor, hardware.vendor_id,
        hardware.device_id, dict(device.ep_metadata).get("version", ""),
        dict(hardware.metadata).get("is_virtual") == "1",
    )  # fmt: skip
