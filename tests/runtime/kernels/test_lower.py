"""Whole models by our operators and by ONNX Runtime's: the same weights to the bit, the same answer but for how
activations are rounded on the way; and graphs that neither can take."""

import contextlib
import gc
import io
import os

import numpy as np
import onnx
import pytest

import shoal
from shoal.converters.recipe import Format
from shoal.runtime import onnx_wire, session
from shoal.runtime.bundle import Bundle, create
from shoal.runtime.errors import BackendError, BundleError, ShoalError
from shoal.runtime.kernels import layout, lower
from shoal.runtime.kernels.layout import PANEL, LinearFormat
from shoal.runtime.model import plan

pytestmark = pytest.mark.usefixtures("built")

DECODERS = ("llama", "qwen2", "qwen3", "gemma3")
FORMATS = [Format(32), Format(8), Format(8, 64), Format(4), Format(4, 64, span=64), Format(3), Format(2, rotated=False)]
TOKENS = np.random.default_rng(11).integers(4, 260, (2, 44))


def places(opened: Bundle) -> dict[str, session.Place]:
    weights = opened.section("weights", "weights")
    return {"weights": session.Place(str(opened.path), weights.offset, weights.length)}


def logits(path, **options) -> np.ndarray:
    """fp32 [2, n, vocab]: a prompt in chunks, a row at a time, then single tokens, both rows together."""
    with shoal.load(path, context=64, slots=2, chunk=16, prepare=False, **options) as model:
        decoder = model.scheduler.decoder
        found: list[list[np.ndarray]] = [[], []]
        for slot in (0, 1):
            for start in (0, 16):
                part = TOKENS[slot : slot + 1, start : start + 16]
                found[slot] += [row.copy() for row in decoder.forward(slot, part, [start], [*range(16)])]
        for at in range(32, 44):
            for slot, row in enumerate(decoder.forward(0, TOKENS[:, at : at + 1], [at, at], [0, 1])):
                found[slot].append(row.copy())
        return np.array(found)


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: f"{format}{'' if format.rotated else ' unrotated'}")
@pytest.mark.parametrize("family", DECODERS)
def test_a_decoder_says_the_same(bundle, family, format):
    ours, theirs = (logits(bundle(family, format), kernels=kernels) for kernels in ("auto", "ort"))
    assert relative(ours, theirs) < (1e-5 if format.bits == 32 else 0.03)
    assert (ours.argmax(-1) == theirs.argmax(-1)).mean() > 0.9


@pytest.mark.parametrize("kv", ["fp16", "int8"])
@pytest.mark.parametrize("format", [Format(32), Format(4)], ids=str)
@pytest.mark.parametrize("family", DECODERS)
def test_so_it_does_with_every_cache(bundle, family, format, kv):
    """A cache of float16 makes the whole of ONNX Runtime's attention float16."""
    ours, theirs = (logits(bundle(family, format), kernels=kernels, kv=kv) for kernels in ("auto", "ort"))
    assert relative(ours, theirs) < (0.03 if format.bits < 32 else 0.01 if kv == "int8" else 3e-3)
    exact = logits(bundle(family, format))
    assert 0 < relative(ours, exact) < (0.05 if kv == "int8" else 3e-3 if format.bits == 32 else 0.03)


@pytest.mark.parametrize("format", [Format(32), Format(8), Format(4), Format(3), Format(2)], ids=str)
def test_an_encoder_says_the_same(bundle, format):
    texts = ["the king and the sea", "a", "reading, writing; counting 1234567890 things and more things and more"]
    found = []
    for kernels in ("auto", "ort"):
        with shoal.load(bundle("bert-mean", format), kernels=kernels) as model:
            found.append(model.embed(texts))
    assert relative(*found) < (1e-5 if format.bits == 32 else 0.02)


@pytest.mark.parametrize("format", FORMATS[1:], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma3", "bert-mean"])
def test_weights_are_the_same_to_the_bit(bundle, family, format, monkeypatch):
    """Those of a gate and its up, whose panels alternate, come apart."""
    monkeypatch.setattr(lower, "_SLICE", 5 * PANEL * 128)
    with Bundle.open(bundle(family, format)) as opened:
        model = session.read(opened.bytes(opened.section("graph", opened.graphs[0].name)), places(opened))
        data = opened.view(opened.section("weights", "weights"))
        lowered, out, steps = lower.lower(model), io.BytesIO(), []
        lower.transcode(lowered, lambda at: data[at.offset : at.offset + at.length], out, steps.append)
        written = np.frombuffer(out.getvalue(), np.uint8)
        assert len(written) == lowered.length == steps[-1] and steps == sorted(steps)
        assert any(matrix.gated for matrix in lowered.matrices) == (family != "bert-mean")
        for matrix in lowered.matrices:
            stored = data[matrix.source.offset : matrix.source.offset + matrix.format.bytes]
            plain = LinearFormat(**{**vars(matrix.format), "rotated": 0})
            wanted = layout.dequantize(plain, layout.unpack(plain, stored))
            if matrix.gated:
                wanted = wanted.reshape(-1, 2, PANEL, plain.inputs).swapaxes(0, 1).reshape(plain.outputs, plain.inputs)
            bits, block, blocks = matrix.shape
            codes, scales, zeros = (
                written[at : at + plain.outputs * row].reshape(plain.outputs, row)
                for at, row in zip((matrix.codes, matrix.scales, matrix.zeros), matrix.row, strict=True)
            )
            if bits == 4:
                codes, zeros = (np.stack([part & 15, part >> 4], -1).reshape(len(part), -1) for part in (codes, zeros))
            integers = codes.reshape(plain.outputs, blocks, block).astype(int) - zeros[:, :blocks, None].astype(int)
            found = integers.astype(np.float32) * scales.view(np.float32)[..., None]
            assert (found.reshape(plain.outputs, -1)[:, : plain.inputs] == wanted).all(), matrix.name


def test_large_products_come_in_pieces(bundle, monkeypatch):
    path = bundle("llama", Format(4))
    whole = logits(path, kernels="ort")
    monkeypatch.setattr(lower, "PIECE", 1000)
    with Bundle.open(path) as opened:
        model = session.read(opened.bytes(opened.section("graph", "decode")), places(opened))
        again = onnx_wire.read(lower.lower(model).graph, {"weights": 1 << 40, lower.LOCATION: 1 << 40})
        pieces = [node for node in again.nodes if node.op == "MatMulNBits" and node.name.startswith("head")]
        assert len(pieces) == -(-260 * 64 // 1000) and sum(node.integers["N"] for node in pieces) == 260
    assert relative(logits(path, kernels="ort"), whole) < 0.01


def test_one_file_of_weights_serves_every_cache(bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path))
    for kv in ("fp32", "fp16", "int8", "fp32"):
        shoal.load(bundle("llama", Format(4)), context=64, kernels="ort", kv=kv, prepare=False).close()
        assert len(list(tmp_path.glob("*.cache"))) == 1


# Graphs that lie ------------------------------------------------------------------------------------------------------


@pytest.fixture
def changed(bundle, tmp_path):
    """changed(change, family="llama"): that model in int4, its graphs' bytes as `change` makes them."""

    def make(change, family="llama"):
        out = tmp_path / "changed.shoal"
        with Bundle.open(bundle(family, Format(4))) as source, create(out, overwrite=True) as writer:
            for section in source.sections:
                data = bytes(source.bytes(section))
                if section.kind == "graph":
                    data = change(data)
                writer.add(section.kind, section.name, data, required=section.required)
            for graph in source.graphs:
                writer.graph(graph)
            writer.commit()
        return out

    return make


def refused(path, bundle_error: bool = True) -> None:
    """Neither kernels can take it, and they say so; nothing stays open."""
    gc.collect()  # files that tests before this one left to it
    before = os.listdir("/proc/self/fd") if os.path.exists("/proc/self/fd") else []
    for kernels, kv in (("auto", "fp32"), ("auto", "fp16"), ("ort", "fp32"), ("ort", "fp16")):
        with pytest.raises((BundleError, BackendError)) as error:
            with shoal.load(path, context=64, kernels=kernels, kv=kv) as model:
                model.generate([5, 6, 7], max_tokens=3).finish()
        assert error.value.what and error.value.why and error.value.fix
        assert kernels == "auto" or not bundle_error or isinstance(error.value, BundleError)
    assert not before or os.listdir("/proc/self/fd") == before


def remade(pick, change):
    """A change of a graph's bytes: `change` is called with every node that `pick` takes."""

    def apply(data: bytes) -> bytes:
        model = onnx.ModelProto.FromString(data)
        picked = [node for node in model.graph.node if pick(node)]
        assert picked
        for node in picked:
            change(node)
        return model.SerializeToString()

    return apply


def attributes(node) -> dict[str, onnx.AttributeProto]:
    return {attribute.name: attribute for attribute in node.attribute}


@pytest.mark.parametrize("name", [b"QuantizedLinear", b"QuantizedRows", b"CachedAttention"])
def test_an_unknown_operator_is_refused(changed, name):
    path = changed(lambda data: data.replace(name, name[::-1]))
    for call in (shoal.load, plan):
        for kernels in ("auto", "ort"):
            with pytest.raises(BundleError, match="does not know"):
                call(path, kernels=kernels)


ATTRIBUTES = [
    ("outputs", 256, 272), ("outputs", 256, 240), ("outputs", 384, 1), ("inputs", 128, 192), ("inputs", 128, 1 << 20),
    ("inputs", 128, -128), ("bits", 4, 3), ("bits", 4, 2), ("bits", 4, 7), ("bits", 4, 8), ("group", 32, 33),
    ("group", 32, 0), ("span", 128, 64), ("span", 128, 1 << 16), ("activation", 1, 5), ("activation", 1, -1),
    ("heads", 4, 5), ("heads", 4, 0), ("heads", 4, 1 << 20), ("kv_heads", 2, 3), ("kv_heads", 2, 0), ("window", 0, -1),
]  # fmt: skip


@pytest.mark.parametrize("key, old, new", ATTRIBUTES)
def test_impossible_attributes_are_refused(changed, key, old, new):
    def change(node):
        attributes(node)[key].i = new

    refused(changed(remade(lambda node: key in attributes(node) and attributes(node)[key].i == old, change)))


REWIRED = {
    "weights of a neighbour": ("QuantizedLinear", lambda i, o: ([i[0], "model.norm.weight", *i[2:]], o)),
    "no weights": ("QuantizedLinear", lambda i, o: (i[:1], o)),
    "no inputs": ("QuantizedLinear", lambda i, o: ([], o)),
    "weights that are computed": ("QuantizedLinear", lambda i, o: ([i[0], i[0], *i[2:]], o)),
    "no table": ("QuantizedRows", lambda i, o: (i[:1], o)),
    "no ids": ("QuantizedRows", lambda i, o: ([], o)),
    "too many inputs": ("QuantizedRows", lambda i, o: ([*i, *i, *i], o)),
    "attention without a cache": ("CachedAttention", lambda i, o: ([*i[:1], "", "", *i[3:]], o)),
    "attention without inputs": ("CachedAttention", lambda i, o: ([], o)),
    "attention with one norm": ("CachedAttention", lambda i, o: ([*i[:7], "model.norm.weight"], o)),
    "attention without outputs": ("CachedAttention", lambda i, o: (i, [])),
    "a product without output": ("QuantizedLinear", lambda i, o: (i, [])),
}


@pytest.mark.parametrize("case", REWIRED)
def test_operators_that_lack_what_they_need_are_refused(changed, case):
    op, wire = REWIRED[case]

    def change(node):
        inputs, outputs = wire(list(node.input), list(node.output))
        node.input[:], node.output[:] = inputs, outputs

    path = changed(remade(lambda node: node.op_type == op, change))
    for kernels in ("auto", "ort"):
        with contextlib.suppress(ShoalError):
            plan(path, kernels=kernels)
    refused(path, bundle_error=case != "attention with one norm")


def test_graphs_of_plain_operators_that_lack_inputs_are_refused(changed):
    def change(node):
        del node.input[1:]

    path = changed(remade(lambda node: node.op_type == "Gather", change))
    with contextlib.suppress(ShoalError):
        plan(path)
    refused(path, bundle_error=False)


def test_a_bundle_without_weights_is_refused(bundle, operator, tmp_path):
    cache = [(name, np.float32, ["batch", 2, "context", 32]) for name in ("past_key_0", "past_value_0")]
    inputs = [("hidden", np.float32, ["batch", "tokens", 256]), *cache, ("last", np.int32, ["batch"])]
    inputs += [("total", np.int32, [1]), ("cos_0", np.float32, ["c", 16]), ("sin_0", np.float32, ["c", 16])]
    outputs = [("logits", np.float32, ["batch", "tokens", 128])]
    outputs += [(name.replace("past", "present"), kind, dims) for name, kind, dims in cache]
    path = tmp_path / "hollow.shoal"
    with Bundle.open(bundle("llama", Format(4))) as source, create(path) as writer:
        for kind in ("card", "tokenizer"):
            writer.add(kind, "", bytes(source.bytes(source.section(kind))), required=True)
        writer.add(
            "graph", "decode", operator("CachedAttention", inputs, outputs, dict(heads=4, kv_heads=2, head_dim=32))
        )
        writer.graph(source.graphs[0])
        writer.commit()
    for kernels in ("auto", "ort"):
        plan(path, kernels=kernels)
        with pytest.raises(ShoalError), shoal.load(path, context=64, kernels=kernels) as model:
            model.generate([5, 6, 7], max_tokens=3).finish()
