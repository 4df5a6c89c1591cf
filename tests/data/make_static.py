"""A tiny llama with static graphs, written here by the layout alone: in fp32, or with 8-bit products on the device
whose scales clip so much that without their shadows nothing would be right."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file

from shoal.runtime.bundle import Bundle, Graph, create
from shoal.runtime.card import Card
from shoal.runtime.static.layout import KIND, PREFILL, SECTION, STATIC, Attend, Call, Shadow, Static, graph_name

DATA = Path(__file__).resolve().parent
CHUNKS = (4, 8)
F32, I64, I32 = TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32
OPSETS = [helper.make_opsetid("", 21), helper.make_opsetid("shoal", 1)]


class Maker:
    """One graph from named values to named values; weights are inside, or in the section `static`."""

    def __init__(self):
        self.nodes, self.tensors = [], []

    def constant(self, array) -> str:
        self.tensors.append(numpy_helper.from_array(np.asarray(array), f"c{len(self.tensors)}"))
        return self.tensors[-1].name

    def op(self, kind: str, *inputs: str, out: str = "", domain: str = "", **attributes) -> str:
        out = out or f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [out], f"node{len(self.nodes)}", domain=domain, **attributes))
        return out

    def rms(self, x: str, weight: np.ndarray, epsilon: float) -> str:
        mean = self.op("ReduceMean", self.op("Mul", x, x), self.constant(np.array([-1])))
        root = self.op("Sqrt", self.op("Add", mean, self.constant(np.float32(epsilon))))
        return self.op("Mul", self.op("Div", x, root), self.constant(weight))

    def done(self, inputs: dict, outputs: dict, types=None) -> bytes:
        def ports(values):
            return [helper.make_tensor_value_info(n, (types or {}).get(n, F32), dims) for n, dims in values.items()]

        graph = helper.make_graph(self.nodes, "g", ports(inputs), ports(outputs), self.tensors)
        return helper.make_model(graph, opset_imports=OPSETS, ir_version=10).SerializeToString()


class Product:
    """A linear layer as the device has it: exact in fp32, or on codes of 8 bits of `scale` with a shadow."""

    def __init__(self, weight: np.ndarray, store: bytearray, scale: float | None):
        self.weight, self.scale = np.ascontiguousarray(weight.T), scale  # [inputs, outputs]
        if scale is None:
            return
        steps = np.abs(self.weight).max(0) / 127
        self.codes, self.steps = np.rint(self.weight / steps).astype(np.int8), steps.astype(np.float32)
        self.at = len(store)
        store += self.codes.tobytes() + bytes(-self.codes.size % 4)
        self.steps_at = len(store)
        store += self.steps.tobytes()

    def emit(self, maker: Maker, x: str, out: str = "") -> str:
        if self.scale is None:
            return maker.op("MatMul", x, maker.constant(self.weight), out=out)
        scale, zero = maker.constant(np.float32(self.scale)), maker.constant(np.int8(0))
        codes = maker.op("QuantizeLinear", x, scale, zero)
        dense = maker.op("DequantizeLinear", codes, scale, zero)
        weight = maker.op(
            "DequantizeLinear", maker.constant(self.codes), maker.constant(self.steps),
            maker.constant(np.zeros(len(self.steps), np.int8)), axis=1,
        )  # fmt: skip
        return maker.op("MatMul", dense, weight, out=out)

    def shadow(self, block: int, takes: str, gives: str) -> Shadow:
        inputs, outputs = self.codes.shape
        return Shadow(block, takes, gives, self.scale, inputs, outputs, self.at, self.steps_at, (1, 5), 1.0)


def write(source: Path, out: Path, scale: float | None, backend: str = "cpu") -> None:
    """`source`, an fp32 bundle of tests/data/tiny/llama, with static graphs beside its own."""
    w = load_file(DATA / "tiny" / "llama" / "model.safetensors")
    w = {name: array.astype(np.float32) for name, array in w.items()}
    with Bundle.open(source) as bundle, create(out, overwrite=True) as writer:
        card = Card.from_json(bundle.bytes(bundle.section("card")))
        hidden, q, kv, ffn = card.hidden, card.heads * card.head_dim, card.kv_heads * card.head_dim, card.ffn
        widths = {"a": hidden, "b": hidden, "norm": hidden, "qkv": q + 2 * kv, "y": q, "up": ffn}
        widths |= {f"{name}.shadow": widths[name] for name in ("qkv",)} | {"down": hidden, "down.shadow": hidden}
        store, steps, graphs = bytearray(), [], {}
        exact = scale is None

        def call(block, name, takes, gives, build):
            """A device graph for each chunk: `build(maker)` emits what `gives` names."""
            for chunk in CHUNKS:
                maker = Maker()
                build(maker)
                shapes = [{value: [chunk, widths[value]] for value in values} for values in (takes, gives)]
                graphs[graph_name(name, chunk)] = (maker.done(*shapes), STATIC, backend, chunk)
            steps.append(Call(name, block, tuple(takes), tuple(gives)))

        maker = Maker()
        rows = maker.op("Gather", maker.constant(w["model.embed_tokens.weight"]), "tokens")
        maker.op("Reshape", rows, maker.constant(np.array([-1, hidden])), out="a")
        graphs["embed"] = (maker.done({"tokens": [1, "n"]}, {"a": ["n", hidden]}, {"tokens": I64}), PREFILL, "cpu", 0)
        steps.append(Call("embed", 0, ("tokens",), ("a",), device=False))
        for block in card.span:
            prefix = f"model.layers.{block}"
            qkv = np.concatenate([w[f"{prefix}.self_attn.{part}_proj.weight"] for part in "qkv"])
            one, two = Product(qkv, store, scale), Product(w[f"{prefix}.mlp.down_proj.weight"], store, scale)
            first, second = (w[f"{prefix}.{name}.weight"] for name in ("input_layernorm", "post_attention_layernorm"))
            before = f"{prefix}.mlp"

            def norm(m, first=first):
                m.op("Identity", m.rms("a", first, card.norm_eps), out="norm")

            def product(m, one=one):
                one.emit(m, "norm", "qkv")

            def mlp(m, prefix=prefix, second=second, before=before):
                attended = m.op("MatMul", "y", m.constant(w[f"{prefix}.self_attn.o_proj.weight"].T.copy()))
                m.op("Add", "a", attended, out="b")
                x = m.rms("b", second, card.norm_eps)
                gate = m.op("MatMul", x, m.constant(w[f"{before}.gate_proj.weight"].T.copy()))
                up = m.op("MatMul", x, m.constant(w[f"{before}.up_proj.weight"].T.copy()))
                m.op("Mul", m.op("Mul", gate, m.op("Sigmoid", gate)), up, out="up")

            def down(m, two=two):
                two.emit(m, "up", "down")

            def add(m):
                m.op("Add", m.op("Add", "b", "down"), "down.shadow", out="a") if not exact else m.op(
                    "Add", "b", "down", out="a"
                )

            call(block, f"{block}.norm", ["a"], ["norm"], norm)
            call(block, f"{block}.qkv", ["norm"], ["qkv"], product)
            if not exact:
                steps.append(one.shadow(block, "norm", "qkv.shadow"))
            steps.append(Attend(f"attend.{block}", block, ("qkv",) if exact else ("qkv", "qkv.shadow"), "y"))
            call(block, f"{block}.mlp", ["a", "y"], ["b", "up"], mlp)
            call(block, f"{block}.down", ["up"], ["down"], down)
            if not exact:
                steps.append(two.shadow(block, "up", "down.shadow"))
            call(block, f"{block}.add", ["b", "down"] + ([] if exact else ["down.shadow"]), ["a"], add)
        for kind, cache in (("", F32), (".fp16", TensorProto.FLOAT16)):
            maker = Maker()
            names = ["qkv", "past_key", "past_value", "last", "total", "cos", "sin"]
            maker.nodes.append(helper.make_node(
                "CachedAttention", names, ["y", "present_key", "present_value"], domain="shoal", heads=card.heads,
                kv_heads=card.kv_heads, head_dim=card.head_dim, half=int(bool(kind)), fast=0, window=0,
                scale=card.attention_scale, epsilon=card.norm_eps,
            ))  # fmt: skip
            past = [1, card.kv_heads, "context", card.head_dim]
            takes = {"qkv": [1, "n", q + 2 * kv], "past_key": past, "past_value": past, "last": [1], "total": [1]}
            takes |= {"cos": ["context", card.head_dim // 2], "sin": ["context", card.head_dim // 2]}
            types = {"last": I32, "total": I32} | dict.fromkeys(
                ("past_key", "past_value", "present_key", "present_value"), cache
            )
            data = maker.done(takes, {"y": [1, "n", q], "present_key": past, "present_value": past}, types)
            for block in card.span:
                graphs[f"attend.{block}{kind}"] = (data, PREFILL, "cpu", 0)
        maker = Maker()
        head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
        maker.op("MatMul", maker.rms("x", w["model.norm.weight"], card.norm_eps), maker.constant(head.T.copy()),
                 out="logits")  # fmt: skip
        graphs["static.head"] = (maker.done({"x": ["n", hidden]}, {"logits": ["n", card.vocab]}), PREFILL, "cpu", 0)
        for section in bundle.sections:
            data = bundle.bytes(section)
            writer.add(section.kind, section.name, data, section.alignment, section.required)
        for graph in bundle.graphs:
            writer.graph(graph)
        writer.add("weights", SECTION, bytes(store) or bytes(4), 4096)
        sections: dict[bytes, str] = {}
        for name, (data, role, made_for, chunk) in graphs.items():
            if data not in sections:
                sections[data] = name
                writer.add("graph", name, data)
            writer.graph(Graph(name, role, made_for, chunk, 0, card.blocks, sections[data]))
        index = Static(backend, CHUNKS, widths, tuple(steps), "a", "static.head")
        writer.add(KIND, "index", index.to_json())
        writer.commit()
    onnx.checker.check_model(onnx.load_from_string(graphs[graph_name("0.mlp", CHUNKS[0])][0]))
