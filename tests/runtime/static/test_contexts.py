"""Which compiled graphs a bundle's prompts go through: its own, the device's own, or a refusal. The device is made up:
what compiles and opens is replaced, what decides is not."""

import dataclasses
import hashlib
import os

import pytest

from shoal.runtime.backends import context, soc
from shoal.runtime.backends.context import Binary, Contexts, Made
from shoal.runtime.backends.provider import Device
from shoal.runtime.bundle import Bundle, Graph, create
from shoal.runtime.errors import BackendError, BundleError
from shoal.runtime.providers import Listed
from shoal.runtime.session import Place
from shoal.runtime.static import contexts

SDK, INFORMATION = "v2.51.0", "v2:6:2.51.0:5.51.0:75:57:0:0"
DEVICE = Device(
    "npu", "qnn", Listed("QNNExecutionProvider", "npu", "Qualcomm", 1, 2, "0.1.0"), soc.KNOWN["sm8650"].settings, "x"
)
GRAPHS = [
    Graph(name, "static", "npu", int(name.split(".")[1]), 0, 1, name) for name in ("static.4.ffn", "static.8.ffn")
]
BINARY = b"binary"


def bundle(path, *mades):
    """A bundle of static graphs, with what was compiled of them."""
    with create(path, overwrite=True) as writer:
        writer.add("weights", "static", b"weights", required=True)
        for graph in GRAPHS:
            writer.add("graph", graph.section, graph.name.encode())
            writer.graph(graph)
        source = contexts.source(writer.sections, GRAPHS)
        for made in mades:
            made = dataclasses.replace(made, source=made.source or source)
            writer.add(contexts.KIND, contexts.index_name(made.provider, made.soc), made.to_json())
            writer.add(
                contexts.KIND, contexts.binaries_name(made.provider, made.soc), BINARY + bytes(4096 - 6) + BINARY, 4096
            )
        writer.commit()
    return path


def made(**changes):
    graphs = {graph.name: (graph.name.encode(), number) for number, graph in enumerate(GRAPHS)}
    binaries = ((6, hashlib.sha256(BINARY).hexdigest()),) * 2
    given = Made("qnn", "sm8650", "0.1.0", SDK, INFORMATION, (4, 8), "", graphs, binaries)
    return dataclasses.replace(given, **changes)


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """Counts compilations; each gives binaries that say which one they are of."""
    monkeypatch.setattr(context, "identity", lambda device: (SDK, INFORMATION))
    monkeypatch.setattr(context, "rehearse", lambda device, found, **_: None)
    calls = []

    def compile_contexts(device, graphs, places, target, folder, *, source, chunks, groups, seconds, progress):
        assert groups == dict.fromkeys(graphs, 0) and chunks == [4, 8]
        calls.append(sorted(graphs))
        binaries = []
        for name in graphs:
            (folder / name).write_bytes(f"{name} {len(calls)}".encode())
            digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
            binaries.append(Binary(Place(str(folder / name), 0, (folder / name).stat().st_size), digest))
        sizes = tuple((binary.place.length, binary.sha256) for binary in binaries)
        return Contexts(made(source=source, binaries=sizes), tuple(binaries))

    monkeypatch.setattr(context, "compile_contexts", compile_contexts)
    return calls


def find(path, folder, events=None, device=DEVICE, **options):
    """(what was found, its binaries' bytes)."""
    with Bundle.open(path) as opened:
        say = (lambda event: None) if events is None else (lambda event: events.append(event.detail))
        found = contexts.find(opened, device, GRAPHS, {}, folder=folder, progress=say, **options)
        if found is None:
            return None, []
        data = []
        for binary in found.contexts.binaries:
            with context._held(binary) as where, open(f"/{where}", "rb") as file:
                data.append(file.read())
        found.close()
        return found, data


def test_the_bundles_own_are_taken_where_they_fit(tmp_path, compiler):
    other = made(soc="sm8550", information=INFORMATION.replace("75:57", "73:43"))
    path = bundle(tmp_path / "a.shoal", other, made())
    for strict in (False, True):
        found, data = find(path, tmp_path / "cache", strict=strict)
        assert found.contexts.made.soc == "sm8650" and not found.rehearsed and data == [BINARY, BINARY]
    assert not compiler and not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"sdk": "v2.40.0"}, "compiled by v2.40.0, v2.51.0 is here"),
        ({"soc": "sm8550", "information": INFORMATION.replace("57", "43")}, "for sm8550, this is sm8650"),
        ({"source": "beef"}, "of other graphs"),
        ({"graphs": {"static.4.ffn": (b"", 0), "static.9.ffn": (b"", 1)}}, "not of all graphs"),
    ],
)
def test_others_are_refused_or_the_device_compiles_its_own_and_says_so(tmp_path, compiler, changes, why):
    path, events = bundle(tmp_path / "a.shoal", made(**changes)), []
    with pytest.raises(BackendError, match=why):
        find(path, tmp_path / "cache", strict=True)
    assert not compiler
    found, data = find(path, tmp_path / "cache", events)
    assert data == [b"static.4.ffn 1", b"static.8.ffn 1"] and found.rehearsed and len(compiler) == 1
    assert sum("compiles its own" in said and why in said for said in events) == 1
    events.clear()
    assert find(path, tmp_path / "cache", events)[1] == data and len(compiler) == 1 and not events


def test_the_cache_is_of_one_bundle_version_and_device_and_mends_itself(tmp_path, compiler, monkeypatch):
    path, cache = bundle(tmp_path / "a.shoal"), tmp_path / "cache"
    assert find(path, cache)[1] == find(path, cache)[1] and len(compiler) == 1
    find(bundle(tmp_path / "b.shoal", made(soc="sm8550", sdk="x")), cache)
    assert len(compiler) == 2
    find(path, cache, device=dataclasses.replace(DEVICE, settings=soc.KNOWN["sm8550"].settings))
    assert len(compiler) == 3
    monkeypatch.setattr(context, "identity", lambda device: ("v3", "v3:6"))
    find(path, cache)
    assert len(compiler) == 4
    for file in cache.glob("*.cache"):
        data, times = bytearray(file.read_bytes()), file.stat()
        if (at := data.find(b"static.4.ffn 4")) >= 0:
            data[at] ^= 1
            file.write_bytes(data)
            os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # as a disk damages it, which nobody sees
    assert find(path, cache)[1] == [b"static.4.ffn 5", b"static.8.ffn 5"]


def test_what_the_device_cannot_compile_is_opened_as_it_is_which_is_said(tmp_path, compiler, monkeypatch):
    def refuse(*arguments, **options):
        raise BackendError("The graph cannot be compiled.", "It has a loop.", "Cut it.")

    monkeypatch.setattr(context, "compile_contexts", refuse)
    path, events = bundle(tmp_path / "a.shoal"), []
    assert find(path, tmp_path / "cache", events) == (None, [])
    assert "opened as they are" in events[-1] and "It has a loop" in events[-1]
    assert not list((tmp_path / "cache").glob("*.cache"))


def test_who_compiles_nothing_ahead_is_left_alone(tmp_path, compiler):
    path = bundle(tmp_path / "a.shoal", made())
    openvino = dataclasses.replace(DEVICE, provider="openvino")
    assert find(path, tmp_path, device=None)[0] is None and find(path, tmp_path, device=openvino)[0] is None
    assert not compiler


def test_hardware_is_asked_by_its_providers_own_check(tmp_path, compiler, monkeypatch):
    path = bundle(tmp_path / "a.shoal", made(information="anything"))
    hexagon = dataclasses.replace(DEVICE, simulated="")
    for verdict, taken in (("optimal", True), ("prefer_recompilation", False), ("unknown", False)):
        monkeypatch.setattr(contexts.providers, "compatible", lambda listed, said, verdict=verdict: verdict)
        found, _ = find(path, tmp_path / verdict, device=hexagon)
        assert found.rehearsed is not taken and bool(compiler) is not taken


def test_wrong_sections_are_refused(tmp_path, compiler):
    path = bundle(tmp_path / "a.shoal", made())
    with Bundle.open(path) as opened:
        names = [section.name for section in opened.sections if section.kind == contexts.KIND]
    assert names == ["qnn:sm8650", "qnn:sm8650/binaries"]
    with create(tmp_path / "b.shoal") as writer:
        writer.add(contexts.KIND, "qnn:sm8550", made().to_json())
        writer.commit()
    with Bundle.open(tmp_path / "b.shoal") as opened, pytest.raises(BundleError, match="called 'qnn:sm8550'"):
        contexts.held(opened)
    with create(tmp_path / "c.shoal") as writer:
        writer.add(contexts.KIND, "qnn:sm8650", made().to_json())
        writer.commit()
    with Bundle.open(tmp_path / "c.shoal") as opened, pytest.raises(BundleError, match="no section"):
        contexts.held(opened)
    with create(tmp_path / "d.shoal") as writer:
        writer.add(contexts.KIND, "qnn:sm8650", made().to_json())
        writer.add(contexts.KIND, "qnn:sm8650/binaries", BINARY * 2)
        writer.commit()
    with Bundle.open(tmp_path / "d.shoal") as opened, pytest.raises(BundleError, match="12 bytes, and should be 4102"):
        contexts.held(opened)
