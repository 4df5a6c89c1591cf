"""A small convolutional network with seeded weights, whole and cut in two: an image encoder and its tail."""

from dataclasses import dataclass

import numpy as np
from onnx import numpy_helper, parser

_HEAD = """
   a = Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (image, w0, b0)
   r = Relu (a)
   c = Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (r, w1, b1)
   {latent} = Relu (c)
"""
_TAIL = """
   d = Conv <pads = [1, 1, 1, 1]> (latent, w2, b2)
   e = Relu (d)
   f = Add (e, latent)
   pooled = GlobalAveragePool (f)
   flat = Flatten (pooled)
   logits = Gemm <transB = 1> (flat, w3, b3)
   label = ArgMax <axis = 1, keepdims = 0> (logits)
"""
_ANSWER = "float[n, 10] logits, int64[n] label"


@dataclass(frozen=True)
class Split:
    """ModelProto bytes. image fp32 [n, 3, 32, 32] -> latent fp32 [n, 16, 8, 8] -> logits fp32 [n, 10], label [n]."""

    head: bytes
    tail: bytes
    whole: bytes


def split(seed: int = 0) -> Split:
    """The network with weights of this seed."""
    rng = np.random.default_rng(seed)
    shapes = {"w0": (8, 3, 3, 3), "b0": (8,), "w1": (16, 8, 3, 3), "b1": (16,), "w2": (16, 16, 3, 3), "b2": (16,),
              "w3": (10, 16), "b3": (10,)}  # fmt: skip
    weights = {name: rng.standard_normal(shape, np.float32) * 0.3 for name, shape in shapes.items()}
    latent = "float[n, 16, 8, 8] latent"
    image = "float[n, 3, 32, 32] image"
    return Split(
        build("head", image, latent, _HEAD.format(latent="latent"), weights, ("w0", "b0", "w1", "b1")),
        build("tail", latent, _ANSWER, _TAIL, weights, ("w2", "b2", "w3", "b3")),
        build("whole", image, _ANSWER, _HEAD.format(latent="latent") + _TAIL, weights, tuple(weights)),
    )


def build(name: str, inputs: str, outputs: str, body: str, weights=None, used=()) -> bytes:
    """ModelProto bytes of a graph in ONNX's text form; `weights[used]` are its initializers."""
    text = f'<ir_version: 10, opset_import: ["" : 21]> {name} ({inputs}) => ({outputs}) {{ {body} }}'
    model = parser.parse_model(text)
    model.graph.initializer.extend(numpy_helper.from_array(weights[key], key) for key in used)
    return model.SerializeToString()


_MEMBER = """
   a{i} = Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (image, v{i}, b0)
   r{i} = Relu (a{i})
   c{i} = Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (r{i}, u{i}, b1)
   y{i} = {sum}
"""
_LATENT = "float[n, 16, 8, 8]"
MEMBERS = 3


def slimmable(seed: int = 0) -> Split:
    """`split` with a head of three members: its input `encoder` int64 [] says how many of them are added up. Only those
    are computed: each further one is in a branch, whose weights are the whole graph's."""
    plain, rng = split(seed), np.random.default_rng(seed + 1)
    shapes = {f"v{i}": (8, 3, 3, 3) for i in range(1, MEMBERS + 1)} | {"b0": (8,)}
    shapes |= {f"u{i}": (16, 8, 3, 3) for i in range(1, MEMBERS + 1)} | {"b1": (16,)}
    weights = {name: rng.standard_normal(shape, np.float32) * 0.3 for name, shape in shapes.items()}

    def members(i: int) -> str:
        """From member i on, giving `s{i}`."""
        body = _MEMBER.format(i=i, sum=f"Add (c{i}, y{i - 1})" if i > 1 else f"Identity (c{i})")
        if i == MEMBERS:
            return body + f"s{i} = Relu (y{i})"
        return (
            body
            + f"""
           n{i} = Constant <value_int = {i}> ()
           more{i} = Greater (encoder, n{i})
           s{i} = If (more{i}) <then_branch = more_{i} () => ({_LATENT} s{i + 1}) {{ {members(i + 1)} }},
                                else_branch = done_{i} () => ({_LATENT} d{i}) {{ d{i} = Relu (y{i}) }}>"""
        )

    inputs, body = "float[n, 3, 32, 32] image, int64 encoder", members(1) + "\n latent = Identity (s1)"
    head = build("slimmable", inputs, f"{_LATENT} latent", body, weights, tuple(weights))
    return Split(head, plain.tail, plain.whole)
