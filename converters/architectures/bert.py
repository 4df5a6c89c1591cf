"""BERT encoders for sentence embeddings, MiniLM among them: learnt positions, post-norm blocks, attention in both
directions, a pooled vector at the end (Devlin et al. 2019; Reimers and Gurevych 2019).

The graph takes `tokens` and `mask` int64 [batch, tokens] and gives `embedding` fp32 [batch, hidden]; a range that
starts late takes `hidden` for the tokens, one that ends early gives `hidden_out`. Every text is a single segment.
"""

import onnx_ir as ir

from shoal.runtime.card import Card

from ..graph import MICROSOFT, GraphBuilder

MODEL_TYPES = ("bert",)
PREFIX = "bert."  # where the encoder was saved with a head on it
_ACTIVATIONS = {
    "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
}  # fmt: skip


def card(config, source: str) -> Card:
    hidden, heads = config.integer("hidden_size", high=1 << 17), config.integer("num_attention_heads", high=4096)
    if hidden % heads:
        config.refuse(f"num_attention_heads {heads} does not divide hidden_size {hidden}")
    named = config.text("hidden_act", "gelu")
    activation = _ACTIVATIONS.get(named)
    if activation is None:
        config.refuse(f"activation {named!r} is not supported")
    if config.text("position_embedding_type", "absolute") != "absolute":
        config.refuse(f"position_embedding_type {config.text('position_embedding_type')!r} is not supported")
    if config.flag("is_decoder"):
        config.refuse("is_decoder is not supported")
    pooling = config.text("pooling", "mean")
    if pooling not in ("mean", "cls"):
        config.refuse(f"pooling {pooling!r} is not supported")
    positions = config.integer("max_position_embeddings", high=1 << 20)
    limit = config.integer("max_seq_length", positions, high=1 << 28)  # what the sentence model was trained to see
    pad = config.ids("pad_token_id")
    return Card(
        name=config.text("name") or source, model_type=config.text("model_type"), task="embed",
        blocks=config.integer("num_hidden_layers", high=1024), hidden=hidden, heads=heads, kv_heads=heads,
        head_dim=max(1, hidden // heads), ffn=config.integer("intermediate_size", high=1 << 20),
        vocab=config.integer("vocab_size"), max_context=min(positions, limit),
        norm_eps=config.number("layer_norm_eps", 1e-12), activation=activation or "gelu", attention_bias=True,
        attention_scale=max(1, hidden // heads) ** -0.5, pad=pad[0] if pad else 0, pooling=pooling,
        normalize=config.flag("normalize"), source=source,
    )  # fmt: skip


def tensors(card: Card) -> dict[str, tuple[int, ...]]:
    hidden, ffn = card.hidden, card.ffn
    found: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (card.vocab, hidden),
        "embeddings.position_embeddings.weight": (-card.max_context, hidden),
        "embeddings.token_type_embeddings.weight": (-1, hidden),
    }

    def linear(name: str, outputs: int, inputs: int) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = (outputs, inputs), (outputs,)

    def norm(name: str) -> None:
        found[f"{name}.weight"] = found[f"{name}.bias"] = (hidden,)

    norm("embeddings.LayerNorm")
    for block in range(card.blocks):
        prefix = f"encoder.layer.{block}"
        for part in ("query", "key", "value"):
            linear(f"{prefix}.attention.self.{part}", hidden, hidden)
        linear(f"{prefix}.attention.output.dense", hidden, hidden)
        norm(f"{prefix}.attention.output.LayerNorm")
        linear(f"{prefix}.intermediate.dense", ffn, hidden)
        linear(f"{prefix}.output.dense", hidden, ffn)
        norm(f"{prefix}.output.LayerNorm")
    return found


def build(g: GraphBuilder, card: Card, blocks: range) -> None:
    if blocks.start == 0:
        tokens = g.input("tokens", "int64", ["batch", "tokens"])
    else:
        x = g.input("hidden", "float32", ["batch", "tokens", card.hidden])
    mask = g.input("mask", "int64", ["batch", "tokens"])
    root = "" if "embeddings.word_embeddings.weight" in g.weights.shapes else PREFIX
    if blocks.start == 0:
        g.scope("embed")
        x = _embed(g, card, tokens, root)
    key_mask = g.op("Cast", mask, to=ir.DataType.INT32)
    for block in blocks:
        prefix = f"{root}encoder.layer.{block}"
        g.scope(f"{block}/attention")
        y = _attention(g, card, x, f"{prefix}.attention", key_mask)
        x = _norm(g, card, f"{prefix}.attention.output.LayerNorm", y, x)
        g.scope(f"{block}/mlp")
        y = g.linear(f"{prefix}.intermediate.dense", x, bias=True)
        y = g.op("Gelu", y, approximate="tanh" if card.activation == "gelu_tanh" else "none")
        x = _norm(g, card, f"{prefix}.output.LayerNorm", g.linear(f"{prefix}.output.dense", y, bias=True), x)
    if blocks.stop < card.blocks:
        g.output(x, "hidden_out", "float32", ["batch", "tokens", card.hidden])
        return
    g.scope("pool")
    g.output(_pool(g, card, x, mask), "embedding", "float32", ["batch", card.hidden])


def _embed(g: GraphBuilder, card: Card, tokens: ir.Value, root: str) -> ir.Value:
    words = g.embed(f"{root}embeddings.word_embeddings.weight", tokens)
    count = g.op("Shape", tokens, start=1, end=2)
    table = g.plain(f"{root}embeddings.position_embeddings.weight", lambda stored: stored[: card.max_context])
    positions = g.op("Slice", table, g.constant([0]), count, g.constant([0]))
    # Every text is one segment, so of the types only the first is ever added
    segment = g.plain(f"{root}embeddings.token_type_embeddings.weight", lambda stored: stored[0])
    return _norm(g, card, f"{root}embeddings.LayerNorm", words, g.op("Add", positions, segment))


def _norm(g: GraphBuilder, card: Card, name: str, x: ir.Value, residual: ir.Value) -> ir.Value:
    """Layer norm of a sum."""
    weight, bias = g.plain(f"{name}.weight"), g.plain(f"{name}.bias")
    return g.op("LayerNormalization", g.op("Add", x, residual), weight, bias, axis=-1, epsilon=card.norm_eps)


def _attention(g: GraphBuilder, card: Card, x: ir.Value, prefix: str, key_mask: ir.Value) -> ir.Value:
    """Every token of a text attends to every other; `key_mask` int32 [batch, tokens] is 0 on padding."""
    qkv = g.linear(tuple(f"{prefix}.self.{part}" for part in ("query", "key", "value")), x, bias=True)
    q, k, v = g.op("Split", qkv, count=3, axis=-1, num_outputs=3)
    y = g.op(
        "MultiHeadAttention", q, k, v, None, key_mask, domain=MICROSOFT,
        num_heads=card.heads, scale=card.attention_scale,
    )  # fmt: skip
    return g.linear(f"{prefix}.output.dense", y, bias=True)


def _pool(g: GraphBuilder, card: Card, x: ir.Value, mask: ir.Value) -> ir.Value:
    """One vector a text: the first token's, or the mean of those that are not padding; then, perhaps, unit length."""
    if card.pooling == "cls":
        pooled = g.op("Gather", x, g.constant(0), axis=1)
    else:
        shares = g.op("Unsqueeze", g.op("Cast", mask, to=ir.DataType.FLOAT), g.constant([-1]))
        total = g.op("ReduceSum", g.op("Mul", x, shares), g.constant([1]), keepdims=0)
        count = g.op("ReduceSum", shares, g.constant([1]), keepdims=0)
        pooled = g.op("Div", total, g.op("Max", count, g.constant(1e-9, "float32")))
    if card.normalize:
        length = g.op("ReduceL2", pooled, g.constant([-1]), keepdims=1)
        pooled = g.op("Div", pooled, g.op("Max", length, g.constant(1e-12, "float32")))
    return pooled
