"""Looking for devices: libraries that are missing, die, hang, or are none; each tried in a real child process."""

import os

import pytest

from shoal.runtime import backends, providers, session
from shoal.runtime.backends import PLUGINS, probe
from shoal.runtime.backends.provider import Device
from shoal.runtime.errors import BackendError, BundleError, UsageError
from shoal.runtime.providers import CPU


@pytest.fixture(autouse=True)
def no_plugins(monkeypatch):
    """As in a process that has registered nothing yet."""
    monkeypatch.delenv(PLUGINS, raising=False)
    monkeypatch.setattr(providers, "_REGISTERED", {})
    offered = [name for name in providers.offered() if name not in ("QNNExecutionProvider", "WebGpuExecutionProvider")]
    monkeypatch.setattr(providers, "offered", lambda: offered)


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """Installs a wheel onnxruntime_qnn whose get_library_path does what it is told."""

    def install(body):
        (tmp_path / "onnxruntime_qnn.py").write_text(f"import os, signal, time\ndef get_library_path():\n    {body}\n")
        monkeypatch.syspath_prepend(str(tmp_path))

    return install


def why(seconds=60.0):
    (npu,) = backends.discover(("npu",), seconds)
    assert not npu.devices
    return {gap.provider: gap.why for gap in npu.absent}["qnn"]


def test_the_cpu_is_always_there_and_every_gap_has_a_reason_and_a_fix():
    found = {backend.name: backend for backend in backends.discover()}
    assert found.keys() == {"npu", "gpu", "cpu"}
    (cpu,) = found["cpu"].devices
    assert cpu.name == "cpu:onnxruntime" and cpu.listed.provider == CPU and not cpu.simulated
    for backend in found.values():
        assert {gap.provider for gap in backend.absent} | {device.provider for device in backend.devices}
        assert all(gap.why and gap.fix for gap in backend.absent)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "dies of SIGSEGV"),
        ("os._exit(3)", "ends with status 3"),
        ("raise RuntimeError('half installed')", "half installed"),
        ("return __file__", "cannot be registered"),
        ("return '/no/such/library.so'", "cannot be registered"),
    ],
)
def test_a_library_that_dies_or_is_none_is_a_gap(wheel, body, said):
    wheel(body)
    assert said in why()


def test_a_library_that_hangs_is_given_up(wheel):
    wheel("time.sleep(600)")
    assert "does not come back within 3 s" in why(3.0)
    with pytest.raises(BackendError, match="There is no npu:qnn here"):
        backends.choose("npu:qnn", 3.0)


def test_what_a_library_prints_is_no_answer(wheel):
    wheel('os.write(1, b\'{"devices": [], "library": ""}\'); os._exit(0)')
    assert "ends with status 0" in why()


def test_plugins_are_a_user_s_choice(wheel, monkeypatch, tmp_path):
    wheel("os._exit(3)")
    monkeypatch.setenv(PLUGINS, "none")
    assert why() == "$SHOAL_PLUGINS is none"
    monkeypatch.setenv(PLUGINS, f"qnn={tmp_path / 'absent.so'}")
    assert "no file" in why()
    (tmp_path / "text.so").write_text("no library")
    monkeypatch.setenv(PLUGINS, os.pathsep.join([f"qnn={tmp_path / 'text.so'}", f"webgpu={tmp_path / 'text.so'}"]))
    assert "cannot be registered" in why()
    for wrong in ("qnn", "qnn=", "tpu=/x", "coreml=/x"):
        monkeypatch.setenv(PLUGINS, wrong)
        with pytest.raises(UsageError):
            backends.plugins()


def test_a_program_without_an_interpreter_says_so(wheel, monkeypatch):
    wheel("os._exit(3)")
    monkeypatch.setattr(probe.sys, "executable", "")
    assert "no Python interpreter" in why()
    monkeypatch.setattr(probe.sys, "executable", "/no/such/python")
    assert "No such file" in why()


def test_choosing_is_refused_in_words(monkeypatch):
    assert backends.choose("auto") is None and backends.choose("cpu") is None
    for wrong in ("tpu", "npu:", "npu:cuda", "cpu:onnxruntime", "", ":", None):
        with pytest.raises(UsageError):
            backends.choose(wrong)
    monkeypatch.setenv(PLUGINS, "none")
    with pytest.raises(BackendError) as refused:
        backends.choose("gpu")
    assert all(f"{name}: " in refused.value.why for name in ("cuda", "webgpu", "openvino"))


def test_a_built_in_provider_is_tried_too():
    """ONNX Runtime lists some whose hardware or driver is missing; here the CPU's own stands for one that works."""
    found, library = probe.devices(CPU, kinds=("cpu",))
    assert [(listed.provider, listed.kind, fault) for listed, fault in found] == [(CPU, "cpu", "")] and library == ""
    assert probe.devices("NoSuchExecutionProvider") == ([], "")


@pytest.fixture
def cpu():
    """The CPU as any other device is asked: through a child."""
    return Device("cpu", "onnxruntime", providers.listed(CPU)[0])


def test_a_graph_is_surveyed_in_a_child_with_its_weights_where_they_are(cpu, small):
    placement = backends.survey(cpu, small.graph, small.places)
    with session.open_graph(small.graph, small.places) as graph:
        assert [(node.name, node.op, node.provider) for node in placement.nodes] == [
            (node.name, node.op, node.provider) for node in graph.assigned()
        ]
    assert placement.share == 1 and len(placement.nodes) == 4


def test_a_library_that_dies_of_a_graph_takes_nothing_along(cpu, small, monkeypatch):
    for child, said in (("import os; os.abort()", "dies of SIGABRT"), ("print(1)", "ends with status 0"),
                        ("print('{}')", "answers what is no placement")):  # fmt: skip
        monkeypatch.setattr(probe, "_CHILD", child)
        with pytest.raises(BackendError) as refused:
            backends.open_graph(cpu, small.graph, small.places)
        assert said in refused.value.why


def test_what_is_no_graph_is_the_bundle_s_fault(cpu):
    with pytest.raises(BundleError):
        backends.open_graph(cpu, b"no graph", {})


def test_a_graph_that_the_engine_refuses_is_refused_in_its_words(cpu, small):
    broken = small.graph.replace(b"MatMulNBits", b"MatMulNBats")
    with pytest.raises(BackendError, match="MatMulNBats"):
        backends.survey(cpu, broken, small.places)
