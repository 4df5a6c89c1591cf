"""Experts whose closed channels are left out compute what they would with every channel, bit for bit."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
from onnx import helper

import shoal
from shoal.converters.convert import convert
from shoal.converters.recipe import Format, Recipe
from shoal.converters.text import HELDOUT
from shoal.runtime import kernels
from shoal.runtime.bundle import Bundle
from shoal.runtime.errors import BundleError, UsageError
from shoal.runtime.experts.layout import Index, Precision
from shoal.runtime.experts.store import Store, read_index
from shoal.runtime.kernels.layout import Codes, LinearFormat, gather_down, gather_up, pack, ungather_down, ungather_up
from shoal.runtime.session import Place, open_graph

pytestmark = pytest.mark.skipif(not kernels.available(), reason=f"no kernels: {kernels.missing()}")
TINY = Path(__file__).resolve().parents[2] / "data" / "tiny"
EXPERTS, TOP, LAYERS = 4, 2, (0.0, 0.5, 0.9, 1.0)  # a layer's closed channels
RELU, SILU = 4, 1


def codes(random, format: LinearFormat) -> Codes:
    rows, groups = (format.outputs, format.padded), (format.outputs, format.groups)
    scales = random.random((format.outputs, format.spans)).astype("f4") * 0.01 + 0.01
    if format.bits == 8:
        values, zeros = random.integers(-127, 128, rows, np.int8), random.integers(-9, 10, groups, np.int8)
        return Codes(values, np.ones(groups, np.uint8), zeros, scales)
    values, zeros = (random.integers(0, 1 << format.bits, shape, np.uint8) for shape in (rows, groups))
    return Codes(values, random.integers(1, 9, groups).astype(np.uint8), zeros, scales)


def padded(format: LinearFormat, codes: Codes) -> Codes:
    """The same with zeros for inputs that pad."""
    return codes._replace(values=np.where(np.arange(format.padded) < format.inputs, codes.values, 0))


def shut(random, format: LinearFormat, both: Codes, share: float) -> None:
    """Gates, every other panel of 16, that inputs above zero close for this share of channels and open for the rest."""
    gates = np.arange(format.outputs).reshape(-1, 2, 16)[:, 0].ravel()
    closed = random.permutation(len(gates)) < round(share * len(gates))
    low, zero, high = {8: (-127, 0, 127), 4: (0, 8, 15), 2: (0, 3, 3)}[format.bits]
    both.values[gates], both.zeros[gates] = np.where(closed, low, high)[:, None], zero


@pytest.fixture
def layer(tmp_path):
    """layer(precision, contents, number, activation): that layer of a store with these records, as a function of x."""
    opened = []

    def make(precision: Precision, contents: list[bytes], number: int, activation: int):
        path, weights = tmp_path / f"records{len(opened)}", tmp_path / "none"
        path.write_bytes(b"".join(contents))
        weights.write_bytes(b"none")
        checksums = tuple(map(zlib.crc32, contents))
        store = Store.over(path, 0, Index(tuple(range(len(LAYERS))), EXPERTS, (precision,), (checksums,)))
        hidden, ffn = precision.down.outputs, precision.down.inputs
        said = dict(layer=number, experts=EXPERTS, total=EXPERTS, top_k=TOP, hidden=hidden, ffn=ffn,
                    activation=activation, normalised=1)  # fmt: skip
        node = helper.make_node("Experts", ["x", "logits", "experts"], ["y", "gates"], "n", domain="shoal")
        node.attribute.extend(helper.make_attribute(key, value) for key, value in said.items())
        wanted = [("x", np.float32, hidden), ("logits", np.float32, EXPERTS), ("y", np.float32, hidden)]
        wanted += [("gates", np.float32, EXPERTS)]
        values = {
            name: helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(kind)), [None, width])
            for name, kind, width in wanted
        }
        handle = helper.make_tensor_value_info("experts", helper.np_dtype_to_tensor_dtype(np.dtype(np.int64)), [1])
        graph = helper.make_graph([node], "g", [values["x"], values["logits"], handle], [values["y"], values["gates"]])
        opsets = [helper.make_opsetid(name, 21 if not name else 1) for name in ("", "com.microsoft", "shoal")]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
        session = open_graph(model, {"weights": Place(str(weights), 0, 4)}, threads=2)
        opened.extend((session, store))

        def run(x: np.ndarray, logits: np.ndarray) -> np.ndarray:
            return session.run({"x": x, "logits": logits, "experts": np.array([store.handle])})["y"]

        return run

    yield make
    for one in opened:
        one.close()


@pytest.mark.parametrize("activation", [RELU, SILU])
@pytest.mark.parametrize("hidden, ffn", [(128, 96), (320, 32), (96, 208)])
@pytest.mark.parametrize("bits, down_bits", [(8, 8), (4, 4), (2, 2), (4, 8), (2, 4)])
def test_what_is_left_out_changes_no_bit(layer, bits, down_bits, hidden, ffn, activation):
    """One row and several, of records that have the same codes in panels and gathered."""
    random = np.random.default_rng(bits)
    first, second = -(-hidden // 64) * 64, -(-ffn // 64) * 64  # padded
    gate_up = LinearFormat(hidden, 2 * ffn, bits, first if bits == 8 else 32, first)
    down = LinearFormat(ffn, hidden, down_bits, second if down_bits == 8 else 32, second)
    plain, gathered = (Precision("records", gate_up, down, each) for each in (False, True))
    contents: dict[bool, list[bytes]] = {False: [], True: []}
    for share in LAYERS:
        for _ in range(EXPERTS):
            both, last = codes(random, gate_up), codes(random, down)
            shut(random, gate_up, both, share)
            parts = pack(gate_up, both), pack(down, last)
            others = gather_up(gate_up, parts[0]), gather_down(down, last)
            np.testing.assert_array_equal(ungather_up(gate_up, others[0]), parts[0])
            np.testing.assert_array_equal(pack(down, ungather_down(down, others[1])), pack(down, padded(down, last)))
            for precision, (up, rest) in ((plain, parts), (gathered, others)):
                made = np.zeros(precision.record, np.uint8)
                made[: len(up)] = up
                made[precision.down_at : precision.down_at + precision.down_bytes] = rest
                contents[precision.gathered].append(made.tobytes())
    for number, share in enumerate(LAYERS):
        runs = [layer(one, contents[one.gathered], number, activation) for one in (plain, gathered)]
        for rows in (1, 2, 7, 40):
            x = (random.random((rows, hidden)) + 0.1).astype("f4")
            logits = random.standard_normal((rows, EXPERTS)).astype("f4")
            wanted, found = (run(x, logits) for run in runs)
            np.testing.assert_array_equal(found, wanted)
            assert np.isfinite(wanted).all() and (share == 1 or wanted.any())
            assert (wanted == 0).all() or share < 1 or activation != RELU
            np.testing.assert_array_equal(runs[1](x[-1:], logits[-1:]), found[-1:])
        x[0, 0] = np.nan
        np.testing.assert_array_equal(*(run(x[:1], logits[:1]) for run in runs))


@pytest.mark.parametrize("format", [Format(8), Format(4), Format(2, 64)], ids=str)
def test_a_trained_mixture_answers_as_it_does_in_panels(mixture_folder, tmp_path, format):
    """Logits and tokens: half of its channels are closed, and a down of 32 is not rotated in panels either."""
    plain, bundles = Format(8), []
    for gathered in (True, False):
        recipe = Recipe("t", linear=plain, embedding=plain, head=plain, experts=format, gathered=gathered)
        bundles.append(tmp_path / f"{gathered}.shoal")
        convert(mixture_folder, bundles[-1], recipe, check_parity=False)
    answers = []
    for path, gathered in zip(bundles, (True, False), strict=True):
        with Bundle.open(path) as bundle:
            assert [one.gathered for one in read_index(bundle).precisions] == [gathered]
        logits: list[np.ndarray] = []

        def keep(_, found: np.ndarray, logits=logits) -> np.ndarray:
            logits.append(found.copy())
            return found

        with shoal.load(path, context=128) as model:
            ids = model.tokenizer.encode(HELDOUT[:60])
            tokens = [token.id for token in model.generate(ids, max_tokens=40, processors=(keep,), ignore_end=True)]
        answers.append((tokens, np.array(logits)))
    (first, one), (second, other) = answers
    assert first == second and len(first) == 40
    np.testing.assert_array_equal(one, other)


def test_only_what_a_gate_can_close_is_gathered(mixture_folder, tmp_path):
    for source, format in ((mixture_folder, Format(3)), (mixture_folder, Format(32)), (TINY / "qwen3_moe", Format(4))):
        with pytest.raises(UsageError, match="relu"):
            convert(source, tmp_path / "a.shoal", Recipe("t", experts=format, gathered=True), check_parity=False)
    recipe = Recipe("t", experts=Format(4), gathered=True)
    convert(TINY / "smallthinker", tmp_path / "a.shoal", recipe, check_parity=False)
    with Bundle.open(tmp_path / "a.shoal") as bundle:
        (precision,) = read_index(bundle).precisions
    assert precision.gathered and not precision.down.rotated


def test_a_hostile_index_is_refused():
    gate_up, down = LinearFormat(128, 128, 4, 32, 128), LinearFormat(64, 128, 4, 32, 64)
    index = Index((0,), 1, (Precision("records", gate_up, down, True),), ((7,),))
    assert Index.from_json(index.to_json()) == index
    (one,) = json.loads(index.to_json())["precisions"]
    assert "down" not in one  # so that who knows panels alone does not take these for some
    wrong = [
        {**one, "down": one["gathered_down"]},
        {**one, "gathered_down": {**one["gathered_down"], "rotated": 1}},
        {**one, "gathered_down": {**one["gathered_down"], "bits": 3}},
        {**one, "gate_up": {**one["gate_up"], "bits": 3}},
        {**one, "gathered_down": {**one["gathered_down"], "inputs": 48}},
        {**one, "gathered_down": 1},
        {key: value for key, value in one.items() if key != "gathered_down"},
    ]
    for precision in wrong:
        raw = json.loads(index.to_json()) | {"precisions": [precision]}
        with pytest.raises(BundleError, match="experts|matrix"):
            Index.from_json(json.dumps(raw).encode())
