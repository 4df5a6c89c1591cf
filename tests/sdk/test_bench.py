"""`shoal bench`: a real run on a tiny model, and a comparison with engines that are absent, hostile or dying."""

import csv
import importlib.util
import io
import json
import mmap
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from shoal import bench, bench_arms, bench_machine, cli
from shoal.bench_report import render
from shoal.runtime.errors import BackendError, MissingPackageError, UsageError

PROMISED = {
    "prefill_tokens_per_s",
    "decode_tokens_per_s",
    "time_to_first_token_s",
    "peak_anonymous_bytes",
    "load_s",
    "backend_nodes",
    "devices",
}


@pytest.fixture(scope="module")
def report(tiny_bundle):
    tests = [bench.Test("pp", 8), bench.Test("tg", 4), bench.Test("pp", 8, 16), bench.Test("tg", 4, 16)]
    return bench.measure_model(tiny_bundle, tests, repetitions=3, threads=1, sustained_s=0.05)


def test_a_run_has_what_was_promised(report):
    assert report.keys() >= PROMISED
    assert [row["test"] for row in report["results"]] == ["pp8", "tg4", "pp8 @ d16", "tg4 @ d16"]
    assert all(len(row["speeds"]) == 3 and row["mean"] > 0 and row["ratio"] is None for row in report["results"])
    assert report["prefill_tokens_per_s"] == report["results"][0]["mean"]
    assert report["decode_tokens_per_s"] == report["results"][1]["mean"]
    assert report["decode_gb_per_s"] == pytest.approx(report["decode_tokens_per_s"] * report["step_bytes"] / 1e9)
    assert report["results"][1]["of_stream_read"] > 0
    assert report["load_s"]["warm"] > 0 and (report["load_s"]["cold"] is None) == bool(report["load_note"])
    assert sum(report["backend_nodes"].values()) > 10
    if sys.platform == "linux":
        assert 0 < report["peak_anonymous_bytes"] < 200 << 20
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_the_step_reads_the_weights_that_were_prepared(report):
    """The tiny model in fp32: what a step reads are its matrices; the row also has what fills up their pages."""
    rows = {row["name"]: row["bytes"] for row in report["plan"]["rows"]}
    assert 0.8 * rows["repacked weights"] < report["step_bytes"] <= rows["repacked weights"]


def test_json_is_the_whole_report(report):
    assert json.loads(render(report, "json")) == report


def test_csv_has_a_row_for_each_test_and_window(report):
    rows = list(csv.DictReader(io.StringIO(render(report, "csv"))))
    windows = [row for row in rows if row["test"] == "sustained"]
    assert [row["test"] for row in rows[:4]] == ["pp8", "tg4", "pp8 @ d16", "tg4 @ d16"]
    assert len(windows) == len(report["sustained"]) == len(rows) - 4 > 0
    assert float(rows[1]["mean"]) == report["decode_tokens_per_s"] and rows[0]["gb_per_s"] == ""
    assert {row["peak_anonymous_bytes"] for row in rows} == {str(report["peak_anonymous_bytes"] or "")}
    assert float(rows[0]["load_warm_s"]) > 0 and None not in rows[-1].values()


def test_markdown_is_a_table_and_a_list(report):
    lines = render(report, "md").splitlines()
    assert lines[0] == "| arm | test | tokens/s | GB/s | of stream read |"
    assert lines[2].startswith("| shoal | pp8 | ") and " ± " in lines[2]
    assert all(line.count("|") == 6 for line in lines[:6]) and lines[6] == ""
    assert {line.split(":")[0] for line in lines[7:]} >= {"- load", "- peak anonymous", "- nodes", "- sustained"}


class Recorder:
    """An arm that only takes notes."""

    def __init__(self, name, notes):
        self.name, self.notes = name, notes

    def run(self, test, ids):
        self.notes.append((self.name, str(test), tuple(ids)))
        return bench.Run(len(self.notes))


def test_arms_take_turns_with_the_same_tokens():
    notes = []
    arms = [Recorder("ours", notes), Recorder("theirs", notes)]
    results, _ = bench.run(arms, [bench.Test("pp", 4), bench.Test("tg", 4, 6)], 3, vocab=1000)
    assert [name for name, _, _ in notes] == ["ours", "theirs"] * 6
    assert [test for _, test, _ in notes] == ["pp4"] * 6 + ["tg4 @ d6"] * 6
    for ours, theirs in zip(notes[::2], notes[1::2], strict=True):
        assert ours[2] == theirs[2]
    assert len({ids for _, _, ids in notes}) == 6, "no prompt is seen twice"
    assert [len(ids) for _, _, ids in notes] == [4] * 6 + [6] * 6
    assert [result.mean for result in results] == [3, 4, 9, 10]
    assert results[0].deviation == 2
    assert [row["ratio"] for row in bench.rows(results, 1, None)] == [None, 3 / 4, None, 9 / 10]


# An engine beside ours ------------------------------------------------------------------------------------------------

FAKE = """
import json, os, sys, types
print("what llama.cpp says on its standard output")
os.write(1, b"{}\\n")
CommonParams = lambda: types.SimpleNamespace(
    model=types.SimpleNamespace(), cpuparams=types.SimpleNamespace(), cpuparams_batch=types.SimpleNamespace())
llama_flash_attn_type = types.SimpleNamespace(
    LLAMA_FLASH_ATTN_TYPE_AUTO=0, LLAMA_FLASH_ATTN_TYPE_DISABLED=1, LLAMA_FLASH_ATTN_TYPE_ENABLED=2)
class Server:
    def __init__(self, params):
        self.held = []
        if params.model.path.endswith("broken.gguf"):
            print("failed to open the model", file=sys.stderr)
            raise RuntimeError("Failed to init server")
    def handle_completions(self, request):
        prompt = request["prompt"]
        new = len(prompt) - (len(self.held) if prompt[: len(self.held)] == self.held else 0)
        self.held = prompt
        return json.dumps({"timings": {"prompt_n": new, "prompt_ms": 10.0 * new,
                                       "predicted_n": request["n_predict"], "predicted_ms": 100.0}})
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A stand-in for xllamacpp that the worker's Python finds; returns its file and a GGUF's path."""
    (tmp_path / "site").mkdir()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "site" / "xllamacpp.py").write_text(FAKE)
    return tmp_path / "site" / "xllamacpp.py", tmp_path / "model.gguf"


def test_the_worker_measures_what_was_asked(package):
    arm = bench.rival(f"llama.cpp={package[1]} -fa off --no-repack")(threads=1, context=64)
    try:
        assert arm.name == "llama.cpp model.gguf -fa off --no-repack"
        assert arm.run(bench.Test("pp", 4, 3), [1, 2, 3, 4, 5, 6, 7]).tokens_per_s == pytest.approx(100)
        assert arm.run(bench.Test("tg", 8), [9]).tokens_per_s == pytest.approx(80), "8 steps in 100 ms"
        held = arm.memory()
        assert sys.platform != "linux" or held["peak_resident_bytes"] >= held["anonymous_bytes"] > 0
    finally:
        arm.close()
    assert arm._process.poll() is not None


def test_a_comparison_runs_in_turn_and_has_ratios(package, tiny_bundle, capsys):
    words = [
        "bench",
        str(tiny_bundle),
        "-p",
        "8",
        "-n",
        "4",
        "-r",
        "2",
        "-t",
        "1",
        "--against",
        f"llama.cpp={package[1]}",
    ]
    assert cli.main([*words, "-o", "json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["arm"] for row in report["results"]] == ["shoal", "llama.cpp model.gguf"] * 2
    ours, theirs = report["results"][2:]
    assert theirs["ratio"] == pytest.approx(ours["mean"] / theirs["mean"]) and theirs["gb_per_s"] is None
    assert cli.main(words) == 0
    assert "ratio |" in capsys.readouterr().out.splitlines()[0]


def measure_once(text):
    """Short tests on a real engine, which an environment may have to lack."""
    package = bench_arms.ENGINES[text.partition("=")[0]].package
    if not importlib.util.find_spec(package):
        pytest.skip(f"{package} is not installed")
    arm = bench.rival(text)(threads=1, context=256)
    try:
        assert arm.run(bench.Test("pp", 8, 32), list(range(100, 140))).tokens_per_s > 0
        assert arm.run(bench.Test("tg", 4), [100]).tokens_per_s > 0
        assert arm.run(bench.Test("tg", 4, 64), list(range(100, 164))).tokens_per_s > 0
    finally:
        arm.close()


def test_real_llama_cpp(smollm2_gguf):
    measure_once(f"llama.cpp={smollm2_gguf}")


@pytest.mark.deep
@pytest.mark.parametrize("engine", ["llama-cpp-python", "openvino-genai"])
def test_other_real_engines_that_read_a_gguf(engine, smollm2_gguf):
    measure_once(f"{engine}={smollm2_gguf}")


@pytest.mark.deep
def test_real_onnxruntime_genai(tmp_path):
    if not all(map(importlib.util.find_spec, ("onnxruntime_genai", "torch", "transformers"))):
        pytest.skip("its model builder is not installed, or not all that it needs")
    source = Path(__file__).parent.parent / "data" / "tiny" / "llama"
    words = ["-m", "tiny", "-i", source, "-o", tmp_path / "model", "-c", tmp_path / "cache", "-p", "int4", "-e", "cpu"]
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", *words, "--extra_options", "hf_remote=false"]
    subprocess.run(builder, check=True, capture_output=True)
    measure_once(f"onnxruntime-genai={tmp_path / 'model'}")


def test_a_missing_package_is_told_before_anything_is_measured(package, tiny_bundle, capsys):
    package[0].write_text("raise ImportError('No module named xllamacpp')")
    with pytest.raises(MissingPackageError, match="pip install xllamacpp"):
        bench.rival(f"llama.cpp={package[1]}")(threads=1, context=64)
    words = ["bench", str(tiny_bundle), "-p", "8", "-n", "0", "--against", f"llama.cpp={package[1]}"]
    assert cli.main(words) == MissingPackageError.code
    said = capsys.readouterr()
    assert said.out == "" and "load" not in said.err


def test_a_model_that_the_engine_refuses_is_told_with_its_words(package):
    broken = package[1].with_name("broken.gguf")
    broken.touch()
    with pytest.raises(BackendError, match="(?s)Failed to init server.*failed to open the model"):
        bench.rival(f"llama.cpp={broken}")(threads=1, context=64)


READY = (
    "import sys, time\nsay = lambda text: (sys.stdout.write(text + '\\n'), sys.stdout.flush())\nsay('{}')\ninput()\n"
)
HOSTILE = {
    "ends at once": ("", "ended without an answer"),
    "ends in the middle": (READY + "print('{\"tokens', end='')", "ended without an answer"),
    "ends with a reason": (READY + "sys.exit('out of memory')", "out of memory"),
    "says nothing": (READY + "time.sleep(60)", "no answer in"),
    "says too much": (READY + "say('x' * 1000000)", "too long"),
    "says what is not JSON": (READY + "say('fast')", "not one line of JSON"),
    "says two lines": (READY + "say('{}\\n{}')", "not one line of JSON"),
    "says a list": (READY + "say('[1]')", "not one line of JSON"),
    "nests": (READY + "say('[' * 50000)", "not one line of JSON"),
    "has no speed": (READY + "say('{}')", "speed of None"),
    "is infinitely fast": (READY + "say('{\"tokens_per_s\": Infinity}')", "speed of inf"),
    "is no number": (READY + "say('{\"tokens_per_s\": NaN}')", "speed of nan"),
    "stands still": (READY + "say('{\"tokens_per_s\": 0}')", "speed of 0"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_another_process_says_is_not_trusted(case, tmp_path):
    code, said = HOSTILE[case]
    child = tmp_path / "python"
    child.write_text(f"#!{sys.executable}\n{code}")
    child.chmod(child.stat().st_mode | stat.S_IXUSR)
    with pytest.raises(BackendError, match=said) as caught:
        arm = bench_arms.ProcessArm(
            "llama.cpp", "model.gguf", {}, threads=1, context=64, python=str(child), patience=5.0
        )
        try:
            arm._patience = 0.5 if case == "says nothing" else 5.0
            arm.run(bench.Test("pp", 1), [1])
        finally:
            arm.close()
    assert len(str(caught.value)) < 2000


def test_an_engine_that_does_not_listen_is_ended(tmp_path):
    child = tmp_path / "python"
    child.write_text(f"#!{sys.executable}\n{READY.replace('input()', 'time.sleep(60)')}")
    child.chmod(0o755)
    arm = bench_arms.ProcessArm("llama.cpp", "model.gguf", {}, threads=1, context=64, python=str(child))
    arm._patience = 0.5
    try:
        with pytest.raises(BackendError, match="ended without an answer"):
            arm.run(bench.Test("pp", 100_000), list(range(100_000)))  # more than a pipe holds
    finally:
        arm.close()


def test_an_engine_that_died_between_two_runs_is_told(package):
    arm = bench.rival(f"llama.cpp={package[1]}")(threads=1, context=64)
    try:
        arm._process.kill()
        arm._process.wait()
        with pytest.raises(BackendError, match="ended without an answer"):
            arm.run(bench.Test("pp", 100_000), list(range(100_000)))  # more than a pipe holds
    finally:
        arm.close()


def test_a_python_that_is_not_there(package):
    with pytest.raises(UsageError, match="cannot be started"):
        bench.rival(f"llama.cpp={package[1]}", {"": "/no/such/python"})(threads=1, context=64)


def test_each_engine_may_have_a_python_of_its_own(package, tiny_bundle, capsys):
    words = ["bench", str(tiny_bundle), "-p", "8", "-n", "0", "--against", f"llama.cpp={package[1]}"]
    for pythons, code in (["openvino-genai=/no", sys.executable], 0), ([sys.executable, "llama.cpp=/no"], 2):
        given = [word for python in pythons for word in ("--against-python", python)]
        assert cli.main([*words, *given, "-r", "1", "-t", "1"]) == code
    assert "/no cannot be started" in capsys.readouterr().err


def test_a_path_may_look_like_options(tmp_path):
    path = tmp_path / "a model -fa on.gguf"
    path.touch()
    made = bench.rival(f"llama.cpp={path} -fa auto", {"llama.cpp": "/no/such/python"})
    with pytest.raises(UsageError, match="no/such/python"):
        made(threads=1, context=64)
    with pytest.raises(UsageError, match="no file"):
        bench.rival(f"llama.cpp={tmp_path / 'absent.gguf'}")
    with pytest.raises(UsageError, match="-ngl is not one of -fa, --no-repack"):
        bench.rival(f"llama.cpp={path} -ngl 99")
    with pytest.raises(UsageError, match="-fa takes one of on, off, auto"):
        bench.rival(f"llama-cpp-python={path} -fa")
    with pytest.raises(UsageError, match="takes no options"):
        bench.rival(f"openvino-genai={path} -fa off")


# What cannot be measured ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, said",
    [
        (["-p", "0", "-n", "0"], "Nothing would be measured"),
        (["-r", "0"], "Nothing would be measured"),
        (["--sustained", "nan"], "Nothing would be measured"),
        (["-p", "many"], "not a list of numbers"),
        (["-p", "-5"], "negative"),
        (["-t", "-1"], "threads is -1"),
        (["-n", "10000"], "do not fit the model's context"),
        (["-p", "8", "-n", "8", "--chunk", "0"], "chunk is 0"),
        (["-p", "8", "-n", "8", "--memory", "much"], "not a size"),
        (["--against", "vllm=x"], "no engine 'vllm'"),
        (["--against", "llama.cpp"], "no file ''"),
    ],
)
def test_wrong_options_are_sentences(words, said, tiny_bundle, capsys):
    assert cli.main(["bench", str(tiny_bundle), *words]) == 2
    shown = capsys.readouterr()
    assert said in shown.err and shown.out == "" and "load" not in shown.err.split("\n")[0]


def test_a_budget_that_is_too_small_is_refused_first(tiny_bundle, capsys):
    assert cli.main(["bench", str(tiny_bundle), "-p", "8", "-n", "4", "--memory", "1MB"]) == 6
    assert "bench" not in capsys.readouterr().err


def test_an_embedding_model_is_refused(tmp_path):
    from shoal.converters.convert import convert

    folder = Path(__file__).parent.parent / "data" / "tiny" / "bert-mean"
    convert(folder, tmp_path / "bert.shoal", "fp32", check_parity=False)
    with pytest.raises(UsageError, match="embeds texts"):
        bench.measure_model(tmp_path / "bert.shoal", [bench.Test("pp", 8)])


# The machine ----------------------------------------------------------------------------------------------------------


def test_a_cold_load_is_cold_or_said_not_to_be(tiny_bundle):
    with open(tiny_bundle, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        sum(mapped[:: mmap.PAGESIZE])  # mapped pages stay cached, whatever one asks
        times, note = bench.load_times(str(tiny_bundle), {"context": 64, "threads": 1})
    assert times["cold"] is None and times["warm"] > 0
    assert "stayed in the page cache" in note or "does not let" in note


def test_a_load_that_fails_in_its_process_is_told(tmp_path):
    (tmp_path / "none.shoal").write_bytes(b"nothing")
    with pytest.raises(BackendError, match="fresh process"):
        bench.load_times(str(tmp_path / "none.shoal"), {})


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system has no posix_fadvise")
def test_cached_pages_are_counted_and_dropped(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(bytes(1 << 20))
    assert bench_machine.cached_bytes(path) == 1 << 20
    kind = subprocess.run(["stat", "-f", "-c", "%T", path], capture_output=True, text=True).stdout.strip()
    assert bench_machine.drop_cached(path) == (1 << 20 if kind in ("tmpfs", "ramfs") else 0)
    path.write_bytes(b"")
    assert bench_machine.cached_bytes(path) == 0


def test_a_stream_reads_every_byte_it_counts(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(bytes(100_001))
    stream = bench_machine.Stream([(str(path), 1, 100_000), (str(path), 0, 8)], 2)
    assert stream.bytes == 100_000 and stream.run() > 0
    stream.close()


def test_the_hottest_sensible_zone_counts(tmp_path):
    assert bench_machine.celsius(str(tmp_path)) is None
    for zone, text in enumerate(("41500", "-274000", "nothing", "0", "2147483647", "39000")):
        (tmp_path / f"thermal_zone{zone}").mkdir()
        (tmp_path / f"thermal_zone{zone}" / "temp").write_text(text)
    assert bench_machine.celsius(str(tmp_path)) == 41.5


def test_energy_of_packages_is_summed_and_wraps(tmp_path):
    assert bench_machine.Energy(str(tmp_path)).joules() is None
    zones = {"intel-rapl:0": "package-0", "intel-rapl:1": "package-1", "intel-rapl:2": "psys", "intel-rapl:0:0": "core"}
    for zone, name in zones.items():
        (tmp_path / zone).mkdir()
        (tmp_path / zone / "name").write_text(name + "\n")
        (tmp_path / zone / "energy_uj").write_text("9000000\n")
        (tmp_path / zone / "max_energy_range_uj").write_text("10000000\n")
    energy = bench_machine.Energy(str(tmp_path))
    assert energy.joules() == 0
    for zone in zones:
        (tmp_path / zone / "energy_uj").write_text("9500000")
    assert energy.joules() == pytest.approx(1.0)
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("500000")
    assert energy.joules() == pytest.approx(2.0)
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    assert energy.joules() is None


def test_what_others_use_is_told_apart_from_ones_own(tmp_path):
    assert bench_machine.Others(str(tmp_path)).cores() is None

    def write(total, own, child):
        (tmp_path / "stat").write_text(f"cpu {total} 0 0 999 0 0 0 0 0 0\ncpu0 1 0 0\n")
        for process, parent, used in ((os.getpid(), 1, own), (7, os.getpid(), child), (8, 1, total)):
            (tmp_path / str(process)).mkdir(exist_ok=True)
            (tmp_path / str(process) / "stat").write_text(f"{process} (a) b) R {parent} {'0 ' * 9}{used} 0 {'0 ' * 9}")

    write(100, 10, 10)
    others = bench_machine.Others(str(tmp_path))
    write(100 + 10**9, 10 + 10**9, 10)
    assert others.cores() == 0
    write(100 + 10**9, 10, 10 + 10**9)
    assert others.cores() == 0
    write(100 + 10**9, 10, 10)
    assert others.cores() > 1000


def test_what_has_no_sensor_is_unavailable(monkeypatch):
    monkeypatch.setattr(bench_machine, "celsius", lambda: None)
    monkeypatch.setattr(bench_machine.Energy, "joules", lambda self: None)
    first = next(bench.sustained(Recorder("ours", []), 10.0, 100))
    assert first["celsius"] == first["joules"] == "unavailable" and first["decode_tokens_per_s"] == 1
