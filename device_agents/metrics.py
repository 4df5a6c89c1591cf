"""An edge's snapshot in Prometheus' text format (exposition format 0.0.4).

A pure function of the snapshot. One series a device or a model at most, told apart by the device's id and the model's
digest: names are for people, may repeat, and are escaped. No secret of a snapshot (a pairing code) comes out here.
"""

import math
from collections.abc import Iterator

from .snapshot import BUCKETS, Latency, Requests, Snapshot

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_HELP = {
    "shoal_edge_info": ("gauge", "1; which edge, and its version."),
    "shoal_edge_start_time_seconds": ("gauge", "When the edge started, in Unix seconds."),
    "shoal_edge_memory_bytes": ("gauge", "Memory that tails and models take."),
    "shoal_edge_memory_limit_bytes": ("gauge", "Memory that they may take."),
    "shoal_edge_devices": ("gauge", "Paired devices, by whether they are connected."),
    "shoal_edge_requests_total": ("counter", "Requests, by what became of them."),
    "shoal_edge_requests_running": ("gauge", "Requests that run or wait now."),
    "shoal_edge_latency_seconds": ("histogram", "From a request's last byte in to its answer's first byte out."),
    "shoal_device_connected": ("gauge", "Whether the device's link stands."),
    "shoal_device_requests_total": ("counter", "Requests of a device, by what became of them."),
    "shoal_device_latency_seconds": ("histogram", "As shoal_edge_latency_seconds, of a device."),
    "shoal_device_sent_bytes_total": ("counter", "Bytes to the device, on the wire."),
    "shoal_device_received_bytes_total": ("counter", "Bytes from the device, on the wire."),
    "shoal_device_link_bytes_per_second": ("gauge", "What the device's link carries."),
    "shoal_device_rtt_seconds": ("gauge", "Round trip on the device's link."),
    "shoal_device_mode": ("gauge", "The mode that was chosen for the device."),
    "shoal_device_battery_percent": ("gauge", "The device's battery, where it has one."),
    "shoal_device_temperature_celsius": ("gauge", "The device's temperature, where it has a sensor."),
    "shoal_device_memory_available_bytes": ("gauge", "The device's available memory."),
    "shoal_model_bytes": ("gauge", "Size of a stored model."),
    "shoal_model_resident_bytes": ("gauge", "Memory that a loaded model takes."),
    "shoal_model_requests_total": ("counter", "Requests that a model answered."),
    "shoal_model_batches_total": ("counter", "Runs of a model's graph; requests divided by it is the mean batch."),
    "shoal_model_queue": ("gauge", "Requests that wait for a model."),
    "shoal_rounds": ("gauge", "Federated rounds in the edge's memory, by state."),
    "shoal_pairing_open": ("gauge", "Whether a pairing window is open."),
}

Sample = tuple[str, dict[str, str], float | None]


def render(snapshot: Snapshot) -> str:
    """Every sample that is known; what is None is left out."""
    blocks: dict[str, list[str]] = {}
    for name, labels, value in _samples(snapshot):
        if value is not None:
            family = name if name in _HELP else name.rpartition("_")[0]  # a histogram's _bucket, _sum, _count
            blocks.setdefault(family, []).append(_line(name, labels, value))
    text = []
    for family, (kind, meaning) in _HELP.items():
        if family in blocks:
            text += [f"# HELP {family} {meaning}", f"# TYPE {family} {kind}", *blocks[family]]
    return "\n".join(text) + "\n"


def _samples(snapshot: Snapshot) -> Iterator[Sample]:
    devices, memory = snapshot["devices"], snapshot["memory"]
    yield "shoal_edge_info", {"edge": snapshot["name"], "id": snapshot["id"], "version": snapshot["version"]}, 1
    yield "shoal_edge_start_time_seconds", {}, snapshot["started_at"]
    yield "shoal_edge_memory_bytes", {}, memory["used"]
    yield "shoal_edge_memory_limit_bytes", {}, memory["limit"]
    connected = sum(device["link"] is not None for device in devices)
    yield "shoal_edge_devices", {"connected": "true"}, connected
    yield "shoal_edge_devices", {"connected": "false"}, len(devices) - connected
    yield from _requests("shoal_edge", {}, snapshot["requests"])
    yield "shoal_edge_requests_running", {}, snapshot["requests"]["running"]
    yield from _histogram("shoal_edge_latency_seconds", {}, snapshot["latency"])
    for device in devices:
        labels = {"device": device["name"], "id": device["id"]}
        link, health, chosen = device["link"], device["health"], device["chosen"]
        yield "shoal_device_connected", labels, link is not None
        yield from _requests("shoal_device", labels, device["requests"])
        yield from _histogram("shoal_device_latency_seconds", labels, device["latency"])
        yield "shoal_device_sent_bytes_total", labels, device["sent"]
        yield "shoal_device_received_bytes_total", labels, device["received"]
        if link is not None:
            yield "shoal_device_link_bytes_per_second", labels, link["rate"]
            yield "shoal_device_rtt_seconds", labels, link["rtt"]
        if chosen is not None:
            yield "shoal_device_mode", labels | {"model": chosen["model"]}, chosen["mode"]
        if health is not None:
            yield "shoal_device_battery_percent", labels, health["battery_percent"]
            yield "shoal_device_temperature_celsius", labels, health["temperature_c"]
            yield "shoal_device_memory_available_bytes", labels, health["memory_available"]
    for model in snapshot["models"]:
        labels = {"model": model["name"], "digest": model["digest"][:16]}
        yield "shoal_model_bytes", labels, model["bytes"]
        yield "shoal_model_resident_bytes", labels, model["resident"]
        yield "shoal_model_requests_total", labels, model["served"]
        yield "shoal_model_batches_total", labels, model["batches"]
        yield "shoal_model_queue", labels, model["queued"]
    states = [round["state"] for round in snapshot["rounds"]]
    for state in ("waiting", "training", "aggregating", "done", "failed"):
        yield "shoal_rounds", {"state": state}, states.count(state)
    pairing = snapshot["pairing"]
    yield "shoal_pairing_open", {}, pairing is not None and pairing["state"] == "open"


def _requests(prefix: str, labels: dict[str, str], requests: Requests) -> Iterator[Sample]:
    for result in ("done", "busy", "late", "failed"):
        yield f"{prefix}_requests_total", labels | {"result": result}, requests[result]


def _histogram(name: str, labels: dict[str, str], latency: Latency) -> Iterator[Sample]:
    edges = [*(f"{edge:g}" for edge in BUCKETS), "+Inf"]
    for edge, count in zip(edges, [*latency["buckets"], latency["count"]], strict=True):
        yield f"{name}_bucket", labels | {"le": edge}, count
    yield f"{name}_sum", labels, latency["sum"]
    yield f"{name}_count", labels, latency["count"]


def _line(name: str, labels: dict[str, str], value: float) -> str:
    inside = ",".join(f'{key}="{_escape(text)}"' for key, text in labels.items())
    number = (
        f"{value:.15g}" if math.isfinite(value) else "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"
    )
    return f"{name}{{{inside}}} {number}" if inside else f"{name} {number}"


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
