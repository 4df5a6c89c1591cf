"""Experts from flash give the tokens that experts in memory give, whatever is resident, evicted, late or broken."""

import io
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import shoal
from shoal.converters.convert import convert
from shoal.runtime import kernels
from shoal.runtime.bundle import Bundle
from shoal.runtime.errors import BundleError, UsageError
from shoal.runtime.experts.layout import Index, Precision
from shoal.runtime.experts.policies import POLICIES
from shoal.runtime.experts.predictors import train_predictor
from shoal.runtime.experts.store import Options, read_index
from shoal.runtime.experts.trace import Trace
from shoal.runtime.kernels import build
from shoal.runtime.kernels.layout import LinearFormat

pytestmark = pytest.mark.skipif(not kernels.available(), reason=f"no kernels: {kernels.missing()}")
HERE = Path(__file__).resolve().parent
TINY = HERE.parents[1] / "data" / "tiny" / "qwen3_moe"
PROMPT, TOKENS = list(range(5, 45)), 24


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    """3 layers of 8 experts, 2 a token, ordinary routing."""
    path = tmp_path_factory.mktemp("experts") / "mixture.shoal"
    convert(TINY, path, "int8", check_parity=False)
    return path


def answer(path: Path, slots: int = 0, **options) -> list[int]:
    with shoal.load(path, context=100, experts=Options(**options)) as model:
        if slots:
            model.set_entries(slots)
        return ids(model)


def ids(model) -> list[int]:
    return [token.id for token in model.generate(PROMPT, max_tokens=TOKENS, ignore_end=True, raw=True)]


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "belady"])
@pytest.mark.parametrize("kind", ["bundle", "mixture_bundle"])
def test_any_number_of_slots_gives_the_same_tokens(kind, policy, request):
    path = request.getfixturevalue(kind)
    with shoal.load(path, context=100) as model:
        all_of_them, least, expected = model.experts.entries, model.card.top_k, ids(model)
    for share in (1, 2, 4, 8):
        assert answer(path, max(all_of_them // share, least), policy=policy, threads=share) == expected
    assert answer(path, least, policy=policy, direct=True, guess=False) == expected


def test_slots_change_while_an_answer_is_made(bundle):
    with shoal.load(bundle, context=100) as model:
        expected = ids(model)
        for slots in (2, 24, 3, 12, 5):
            stop = threading.Event()

            def move(slots=slots, stop=stop, model=model):
                while not stop.wait(0.002):  # who changes goes before who computes, and would keep it from that
                    model.set_entries(slots)
                    model.set_entries(26 - slots)

            mover = threading.Thread(target=move)
            mover.start()
            try:
                assert ids(model) == expected
            finally:
                stop.set()
                mover.join()


def test_delays_and_failures_change_nothing_else(bundle, tmp_path):
    """Reads that are slow in any order give the same tokens; those that fail end an answer with an error that names
    layer and expert, and the next answers are right."""
    if shutil.which("gcc") is None or not sys.platform.startswith("linux"):
        pytest.skip("there is no compiler for the library that disturbs reads")
    library = tmp_path / "disturb.so"
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-O1", str(Path(__file__).with_name("disturb.c")), "-o", str(library), "-ldl"],
        check=True, timeout=60,
    )  # fmt: skip
    program = """
import json, sys
import shoal
from shoal.runtime.errors import StorageError
from shoal.runtime.experts.store import Options
path, slots, tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
right, failed = [], []
with shoal.load(path, context=100, experts=Options(threads=3)) as model:
    model.set_entries(slots)
    while len(right) < 3 and len(failed) < 2000:
        try:
            answer = model.generate(list(range(5, 45)), max_tokens=tokens, ignore_end=True, raw=True)
            right.append([token.id for token in answer])
        except StorageError as error:
            failed.append(error.why)
print(json.dumps([right, failed]))
"""
    expected = answer(bundle)
    for slots, environment in ((3, {"DISTURB_MS": "2"}), (6, {"DISTURB_FAIL": "60"}), (2, {"DISTURB_FAIL": "400"})):
        done = subprocess.run(
            [sys.executable, "-c", program, str(bundle), str(slots), str(TOKENS)], capture_output=True, timeout=300,
            env={**os.environ, "LD_PRELOAD": str(library), **environment}, text=True,
        )  # fmt: skip
        assert not done.returncode, done.stderr
        right, failed = json.loads(done.stdout)
        assert right == [expected] * 3
        assert bool(failed) == ("DISTURB_FAIL" in environment)
        assert all(why.startswith("Expert ") and " of layer " in why and "Input/output" in why for why in failed)


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_whatever_happens_a_pass_has_the_right_bytes(sanitizer, tmp_path, request):
    names = ("experts", "expert_cache", "crc32", "crc32_avx2", "crc32_neon")
    try:
        compiler = build.Compiler(extra=["-Werror", "-O1", "-g1", f"-fsanitize={sanitizer}"])
        sources = [build.HERE / f"{name}.cpp" for name in names] + [HERE / "check_experts.cpp"]
        program = compiler.link(compiler.compile(sources, tmp_path), tmp_path / "check")
    except build.BuildError as error:
        pytest.skip(str(error)[:200])
    rounds = "2000" if request.config.getoption("--deep") else "40"
    done = subprocess.run([program, "1", rounds], capture_output=True, text=True)
    assert done.returncode == 0 and "all as it should be" in done.stdout, done.stderr


def test_a_damaged_expert_is_named_and_the_model_lives(bundle, tmp_path):
    copy = tmp_path / "damaged.shoal"
    shutil.copy(bundle, copy)
    with Bundle.open(copy) as opened:
        at = opened.section("experts", "records").offset + read_index(opened).offset(0, 1, 3)
    with shoal.load(copy, context=100) as model:
        model.set_entries(4)
        expected = ids(model)
        whole = copy.read_bytes()
        with copy.open("r+b") as file:
            file.seek(at + 777)
            file.write(bytes(byte ^ 0x5A for byte in whole[at + 777 : at + 779]))
        assert ids(model) == expected  # what was verified once is not asked again
    with shoal.load(copy, context=100) as model:
        with pytest.raises(BundleError, match="Expert 3 of layer 1 .* damaged"):
            ids(model)
        with copy.open("r+b") as file:
            file.seek(at + 777)
            file.write(whole[at + 777 : at + 779])
        assert ids(model) == expected


def test_counters_add_up(bundle):
    with shoal.load(bundle, context=100) as model:
        model.set_entries(6)
        before = model.experts.counters()
        ids(model)
        found = model.experts.counters().since(before)
    layers = 3
    # The prompt is one pass of each layer, each later token but the last another
    assert found.passes == layers * TOKENS
    assert found.hits + found.misses + found.late >= layers * 2 * (TOKENS - 1)
    assert found.read_records == found.read_bytes // 12288
    assert found.useful + found.wasted <= found.guesses <= found.read_records
    assert 0 < found.first_misses <= 24


def test_unimportant_misses_may_be_skipped(bundle):
    """Above the least threshold only the heaviest expert of a token is ever read."""
    with shoal.load(bundle, context=100, experts=Options(skip=0.0, guess=False)) as model:
        model.set_entries(3)
        ids(model)
        assert model.experts.counters().skipped > 0
    with pytest.raises(UsageError):
        Options(skip=2)
    with pytest.raises(UsageError):
        Options(policy="belady")


def test_guesses_keep_to_the_thresholds(bundle):
    """Who would not be read when it is needed is not read ahead either: of each token and layer only the heaviest."""
    guesses = {}
    for skip in (1.0, 0.0):
        with shoal.load(bundle, context=100, experts=Options(skip=skip, expand=6)) as model:
            model.set_entries(6)
            model.generate(PROMPT, max_tokens=1, ignore_end=True, raw=True).finish()
            before = model.experts.counters()
            ids(model)  # one token at a time: but for its last one the prompt is reused
            found = model.experts.counters().since(before)
        guesses[skip] = found.guesses / found.passes
    assert guesses[0.0] <= 1 and guesses[0.0] < guesses[1.0]


def test_a_trained_predictor_takes_the_place_of_the_bundles(bundle, tmp_path):
    with shoal.load(bundle, context=100) as model:
        with model.trace_experts(tmp_path / "trace", inputs=True):
            for first in range(4):
                model.generate([first + 1, 5, 9, 2 * first], max_tokens=20, ignore_end=True).finish()
        plain = ids(model)
    matrices = train_predictor(Trace.load(tmp_path / "trace"))
    path = tmp_path / "next.npy"
    np.save(path, matrices)
    with shoal.load(bundle, context=100, experts=Options(predictor=str(path))) as model:
        model.set_entries(8)
        assert ids(model) == plain
        assert model.experts.counters().guesses > 0
    wrong = {
        "short": path.read_bytes()[:-4], "shape": _npy(matrices[:1]), "type": _npy(matrices.astype(float)),
        "number": _npy(np.where(matrices == matrices.max(), np.nan, matrices)), "objects": _npy(np.array([{}])),
        "text": b"no matrices", "empty": b"",
    }  # fmt: skip
    for name, data in wrong.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UsageError, match="predictor"):
            shoal.load(bundle, context=100, experts=Options(predictor=str(tmp_path / name)))
    with pytest.raises(UsageError, match="No such file"):
        shoal.load(bundle, context=100, experts=Options(predictor=str(tmp_path / "none")))


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def test_a_budget_buys_slots(bundle):
    least = shoal.plan(bundle, context=64)
    for row in least.rows:
        if row.name == "experts":
            whole = row.bytes
    memory = least.total - whole // 2
    with shoal.load(bundle, memory, context=64) as model:
        assert 2 <= model.experts.entries < 24 and model.plan.total <= memory
        model.set_memory(least.total + (1 << 20))
        assert model.experts.entries == 24


def test_a_hostile_index_is_refused(bundle):
    with Bundle.open(bundle) as opened:
        index = read_index(opened)
    assert Index.from_json(index.to_json()) == index
    raw = json.loads(index.to_json())
    changes = [
        {"experts": 1 << 40}, {"experts": "8"}, {"blocks": [2, 1, 0]}, {"blocks": []}, {"checksums": [[1, 2]]},
        {"precisions": []}, {"blocks": [0, 1, 2.5]}, {"checksums": [[-1] * 24]},
        {"precisions": [{**raw["precisions"][0], "section": "elsewhere"}]},
        {"precisions": [{**raw["precisions"][0], "down": {**raw["precisions"][0]["down"], "inputs": 48}}]},
    ]  # fmt: skip
    for change in changes:
        with pytest.raises(BundleError):
            Index.from_json(json.dumps({**raw, **change}).encode())
    random = np.random.default_rng(3)
    text = bytearray(index.to_json())
    for _ in range(2000):
        mutated = bytearray(text)
        mutated[random.integers(len(mutated))] = random.integers(256)
        try:
            Index.from_json(bytes(mutated))
        except BundleError:
            pass


def test_a_record_is_whole_pages():
    one = Precision("records", LinearFormat(64, 64, 4, 32, 64), LinearFormat(32, 64, 4, 32, 64))
    assert one.record % 4096 == 0 and one.record >= one.down_at + one.down.bytes
