"""What decoder language models share: positions, attention over a cache in place, gated feed-forward, the head.

The graph's contract with the runtime (docs/architecture.md): `tokens` or `hidden` in, `logits` of chosen `rows` or
`hidden` out, the cache of every block as past and present over one buffer. Architectures compose these parts; a part
knows tensors' roles and not their family.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from shoal.runtime.card import MAX_EXPERTS, Card, Rope
from shoal.runtime.kernels import DOMAIN as KERNELS

from ..experts import mixture as mixtures
from ..experts import names as mixture_names
from ..experts.names import NORM, Names
from ..graph import GraphBuilder, Norm
from . import is_positive

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}  # as cards call them
EXPERT_ACTIVATIONS = ACTIVATIONS | {"relu": "relu"}
_MOST_EXPERTS = 1 << 16  # of a model


@dataclass
class Step:
    """The values that every block of one graph uses; `x` is the stream."""

    g: GraphBuilder
    card: Card
    last: ir.Value
    total: ir.Value
    tables: list[tuple[ir.Value, ir.Value]]
    x: ir.Value
    transform: Callable | None = None  # of a stored norm's weight
    logits: ir.Value | None = None  # of the router before

    def weight(self, name: str) -> ir.Value:
        """The weight of the norm called `name`."""
        return self.g.plain(f"{name}.weight", self.transform)

    def norm(self, weight: ir.Value) -> Norm:
        """An RMS norm of this model, by its weight."""
        return Norm(weight, self.card.norm_eps)


def begin(g: GraphBuilder, card: Card, blocks: range, table: str, transform: Callable | None = None) -> Step:
    """Declares the inputs and embeds the tokens (or takes `hidden` where the range starts later)."""
    if blocks.start == 0:
        x = g.input("tokens", "int64", ["batch", "tokens"])
    else:
        x = g.input("hidden", "float32", ["batch", "tokens", card.hidden])
    last = g.input("last", "int32", ["batch"])
    total = g.input("total", "int32", [1])
    tables = [
        tuple(g.input(f"{part}_{j}", "float32", ["context", len(rope.inverse_frequencies)]) for part in ("cos", "sin"))
        for j, rope in enumerate(card.ropes)
    ]
    if blocks.start == 0:
        g.scope("embed")
        x = g.embed(table, x, card.embedding_scale, card.tied)
    step = Step(g, card, last, total, tables, x, transform)  # type: ignore[arg-type]
    if card.gating_residual and blocks.start > card.routed_blocks[0] and set(blocks) & set(card.routed_blocks):
        # A router that depends on the one before takes what that gave in an earlier range, as it takes the stream
        step.logits = g.input("routing", "float32", ["batch", "tokens", card.total_experts])
    return step


def attention(
    step: Step, prefix: str, block: int, after: str, norms: tuple[ir.Value, ir.Value] | None = None,
    residual: ir.Value | None = None, row_norms: tuple[ir.Value, ir.Value] | None = None,
) -> ir.Value:  # fmt: skip
    """Grouped-query attention (Ainslie et al. 2023) with rotary positions, over the cache of `block`; `residual` is
    added to what comes out.

    Q, K and V are one product; with `norms` (Q's, K's) each head is normalised before it is rotated, with `row_norms`
    all heads together. `after` names the norm that is applied to the stream first.
    """
    g, card = step.g, step.card
    names = tuple(f"{prefix}.{part}_proj" for part in "qkv")
    norm = step.norm(step.weight(after))
    qkv = g.linear(names, step.x, bias=card.attention_bias, after=after, norm=norm)
    if row_norms is not None:
        widths = [card.heads * card.head_dim, *[card.kv_heads * card.head_dim] * 2]
        q, k, v = g.op("Split", qkv, g.constant(widths), count=3, axis=-1)
        q, k = (g.rms(part, step.norm(weight)) for part, weight in zip((q, k), row_norms, strict=True))
        qkv = g.op("Concat", q, k, v, axis=-1)
    shape: list[int | str] = ["batch", card.kv_heads, "context", card.head_dim]
    past = [g.input(f"past_{part}_{block}", g.cache, shape) for part in ("key", "value")]
    scales = [None, None] if g.cache_scales is None else [g.constant(row, "float32") for row in g.cache_scales[block]]
    y, key, value = g.op(
        "CachedAttention", qkv, *past, step.last, step.total, *step.tables[card.rope_of[block]],
        *(norms or (None, None)), *scales, count=3, domain=KERNELS, heads=card.heads, kv_heads=card.kv_heads,
        head_dim=card.head_dim, half=int(g.cache == "float16"),
        fast=int(g.weights.recipe.linear.bits < 32), window=card.windows[block],
        scale=card.attention_scale, epsilon=card.norm_eps,
    )  # fmt: skip
    for part, present in (("key", key), ("value", value)):
        g.output(present, f"present_{part}_{block}", g.cache, shape)
    return g.linear(f"{prefix}.o_proj", y, residual=residual, mixes=f"{prefix}.v_proj")


def feed_forward(step: Step, prefix: str, after: str, residual: ir.Value | None = None) -> ir.Value:
    """down(activation(gate(x)) * up(x)), and `residual` added; `after` names the norm that is applied to the stream
    first."""
    g = step.g
    norm = step.norm(step.weight(after))
    y = g.gated((f"{prefix}.gate_proj", f"{prefix}.up_proj"), step.x, step.card.activation, after, norm)
    return g.linear(f"{prefix}.down_proj", y, after=f"{prefix}.up_proj", residual=residual)


def build_routed(
    g: GraphBuilder, card: Card, blocks: range, names: Names, *, head_norms: bool = False, row_norms: bool = False
) -> None:
    """A decoder of pre-norm blocks whose feed-forwards are mixtures of experts called `names` or, in blocks that have
    none, ordinary ones called `mlp`. With `head_norms` the heads of Q and of K are normalised each by itself, with
    `row_norms` together."""
    step = begin(g, card, blocks, "model.embed_tokens.weight")
    for block in blocks:
        _routed_block(step, block, names, head_norms, row_norms)
    end(step, blocks, "model.norm", "model.embed_tokens.weight" if card.tied else "lm_head.weight")


def _routed_block(step: Step, block: int, names: Names, head_norms: bool, row_norms: bool) -> None:
    g, card, prefix = step.g, step.card, f"model.layers.{block}"
    routed = block in card.routed_blocks
    if routed and card.early_routing:
        g.scope(f"{block}/router")
        logits = _route(step, block, names, step.x)
        step.x = mixtures.start_reads(g, card, block, names, step.x, logits)
    g.scope(f"{block}/attention")
    norms = None
    if head_norms or row_norms:
        norms = (step.weight(f"{prefix}.self_attn.q_norm"), step.weight(f"{prefix}.self_attn.k_norm"))
    step.x = attention(
        step, f"{prefix}.self_attn", block, f"{prefix}.input_layernorm", norms if head_norms else None, step.x,
        norms if row_norms else None,
    )  # fmt: skip
    g.scope(f"{block}/mlp")
    after = f"{prefix}.{NORM}"
    if not routed:
        step.x = feed_forward(step, f"{prefix}.mlp", after, residual=step.x)
        return
    x = g.rms(step.x, step.norm(step.weight(after)))
    if not card.early_routing:
        logits = _route(step, block, names, x)
    step.x = mixtures.mixture(g, card, block, names, x, logits, step.x)


def _route(step: Step, block: int, names: Names, x: ir.Value) -> ir.Value:
    before = step.logits if step.card.gating_residual else None
    step.logits = mixtures.route(step.g, step.card, block, names, x, before)
    return step.logits


def end(step: Step, blocks: range, norm: str, head: str) -> None:
    """Declares the output: logits of `rows`, or the stream where the range ends early. `norm` names the last one."""
    g, card = step.g, step.card
    g.scope("head")
    if blocks.stop < card.blocks:
        g.output(g.op("Identity", step.x), "hidden_out", "float32", ["batch", "tokens", card.hidden])
        if card.gating_residual and step.logits is not None:
            y = g.op("Identity", step.logits)
            g.output(y, "routing_out", "float32", ["batch", "tokens", card.total_experts])
        return
    rows = g.input("rows", "int64", ["rows"])
    x = g.op("Gather", g.op("Reshape", step.x, g.constant([-1, card.hidden])), rows, axis=0)
    g.output(g.head(head, x, step.norm(step.weight(norm))), "logits", "float32", ["rows", card.vocab])


def decoder_tensors(
    card: Card, *, norms: tuple[str, ...], attention_norms: bool = False, experts: Names | None = None
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a gated decoder's tensors; `norms` are each block's of the stream, `experts` the names where
    a block has some."""
    q, kv = card.heads * card.head_dim, card.kv_heads * card.head_dim
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (card.vocab, card.hidden),
        "model.norm.weight": (card.hidden,),
    }
    if not card.tied:
        found["lm_head.weight"] = (card.vocab, card.hidden)
    for block in range(card.blocks):
        prefix = f"model.layers.{block}"
        for part, width in (("q", q), ("k", kv), ("v", kv)):
            found[f"{prefix}.self_attn.{part}_proj.weight"] = (width, card.hidden)
            if card.attention_bias:
                found[f"{prefix}.self_attn.{part}_proj.bias"] = (width,)
        found[f"{prefix}.self_attn.o_proj.weight"] = (card.hidden, q)
        if experts is not None and block in card.routed_blocks:
            found |= mixture_names.tensors(card, experts, block)
        else:
            for part in ("gate", "up"):
                found[f"{prefix}.mlp.{part}_proj.weight"] = (card.ffn, card.hidden)
            found[f"{prefix}.mlp.down_proj.weight"] = (card.hidden, card.ffn)
        found |= {f"{prefix}.{name}.weight": (card.hidden,) for name in norms}
        if attention_norms:
            found |= {f"{prefix}.self_attn.{part}_norm.weight": (card.head_dim,) for part in "qk"}
    return found


def decoder_card(config, source: str, *, activation: str | None = None, **overrides) -> Card:
    """The card of a gated decoder from its Hugging Face configuration; problems are collected in `config`."""
    heads = config.integer("num_attention_heads", high=4096)
    hidden = config.integer("hidden_size", high=1 << 17)
    head_dim = config.integer("head_dim", max(1, hidden // heads), high=4096)
    blocks = config.integer("num_hidden_layers", high=1024)
    context = config.integer("max_position_embeddings", 2048, high=1 << 28)
    named = config.text("hidden_activation") or config.text("hidden_act", "silu")
    chosen = activation or ACTIVATIONS.get(named)
    if chosen is None:
        config.refuse(f"activation {named!r} is not supported")
    kv_heads = config.integer("num_key_value_heads", heads, high=4096)
    if heads % kv_heads:
        config.refuse(f"num_key_value_heads {kv_heads} does not divide num_attention_heads {heads}")
    if head_dim % 16:  # what GroupQueryAttention with rotary positions takes
        config.refuse(f"heads of {head_dim} channels are not supported, only multiples of 16")
    if config.flag("mlp_bias"):
        config.refuse("mlp_bias is not supported")
    if config.number("partial_rotary_factor", 1.0) != 1.0:
        config.refuse("partial_rotary_factor is not supported")
    ffn = overrides.pop("ffn", None) or config.integer("intermediate_size", high=1 << 20)
    bos = config.ids("bos_token_id")
    pad = config.ids("pad_token_id")
    values = dict(
        name=config.text("name") or source, model_type=config.text("model_type"), task="generate", blocks=blocks,
        hidden=hidden, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
        ffn=ffn, vocab=config.integer("vocab_size"),
        max_context=context, norm_eps=config.number("rms_norm_eps", 1e-6), activation=chosen or "silu",
        tied=config.flag("tie_word_embeddings"), attention_scale=head_dim**-0.5,
        rope_of=(0,) * blocks, windows=(0,) * blocks, bos=bos[0] if bos else -1, eos=config.ids("eos_token_id"),
        pad=pad[0] if pad else -1, add_bos=config.flag("add_bos_token"), source=source,
    )  # fmt: skip
    if "ropes" not in overrides:
        values["ropes"] = (rope(config, head_dim),)
    return Card(**(values | overrides))  # type: ignore[arg-type]


def experts_card(config, *, experts: str = "num_experts", ffn: str = "moe_intermediate_size", **overrides) -> dict:
    """What a card says about experts, from the configuration's `experts` (how many), `ffn` (their width) and what most
    families call alike; to be given to `decoder_card`."""
    blocks = config.integer("num_hidden_layers", high=1024)
    # transformers writes one of two names, whatever the family's own is
    named = next((key for key in (experts, "num_experts", "num_local_experts") if key in config.values), experts)
    number = config.integer(named, high=MAX_EXPERTS)
    values = dict(
        experts=number, expert_ffn=config.integer(ffn, high=1 << 20), expert_activation="silu",
        normalised=config.flag("norm_topk_prob"),
    )  # fmt: skip
    named = config.text("hidden_act", "silu")
    if "expert_activation" not in overrides and (activation := EXPERT_ACTIVATIONS.get(named)) is not None:
        values["expert_activation"] = activation
    if "routed" not in overrides and {"decoder_sparse_step", "mlp_only_layers"} & config.values.keys():
        every, dense = config.integer("decoder_sparse_step", 1, high=1024), config.values.get("mlp_only_layers") or []
        if not isinstance(dense, list) or any(type(block) is not int for block in dense):
            config.refuse(f"mlp_only_layers is {dense!r:.60}, not a list of blocks")
            dense = []
        routed = tuple(int(block not in dense and (block + 1) % every == 0) for block in range(blocks))
        if not any(routed):
            config.refuse("no block has experts, by decoder_sparse_step and mlp_only_layers")
        elif not all(routed):
            values["routed"] = routed
    values |= overrides
    special = sum(values.get(f"{kind}_experts", 0) for kind in ("zero", "copy", "constant"))
    if number + special > MAX_EXPERTS:
        config.refuse(f"{number} experts and {special} special ones are more than {MAX_EXPERTS}")
    if number * blocks > _MOST_EXPERTS:
        config.refuse(f"{number} experts in each of {blocks} blocks are more than {_MOST_EXPERTS}")
        values["experts"] = 1  # so that nobody lists them all
    if "top_k" not in values:
        values["top_k"] = config.integer("num_experts_per_tok", high=number + special)
    return values


def rope(config, dims: int, theta: float | None = None, scaling: dict | None = None) -> Rope:
    """Inverse frequencies of `dims` rotary channels under the configuration's static scaling.

    llama3: frequencies below a wavelength are divided, with a ramp between (Llama 3.1's release); yarn: NTK by parts
    (Peng et al. 2023); linear: all divided (Chen et al. 2023); factors: one divisor a pair.
    """
    parameters = config.table("rope_parameters")
    if theta is None:
        theta = parameters.get("rope_theta", config.number("rope_theta", 10000.0))
    if not is_positive(theta) or theta <= 1:
        config.refuse(f"rope_theta is {theta!r:.60}, not a number above one")
        theta = 10000.0
    plain = [theta ** (-2 * i / dims) for i in range(dims // 2)]
    if scaling is None:
        scaling = config.table("rope_scaling") or parameters
    kind = scaling.get("rope_type", scaling.get("type", "default")) if scaling else "default"

    def number(key: str, default: float | None = None) -> float:
        value = scaling.get(key, default)
        if not is_positive(value):
            config.refuse(f"rope_scaling.{key} is {value!r:.60}, not a positive number")
            return 1.0
        return float(value)

    if kind in ("default", None):
        return Rope(tuple(plain))
    if kind == "linear":
        return Rope(tuple(f / number("factor") for f in plain))
    if kind == "factors":
        factors = scaling.get("factors")
        if not isinstance(factors, list) or len(factors) != len(plain) or not all(map(is_positive, factors)):
            config.refuse(f"rope_scaling.factors are not {len(plain)} positive numbers")
            return Rope(tuple(plain))
        return Rope(tuple(f / factor for f, factor in zip(plain, factors, strict=True)))
    if kind == "llama3":
        factor, low, high = number("factor"), number("low_freq_factor"), number("high_freq_factor")
        original = number("original_max_position_embeddings")

        def scaled(f: float) -> float:
            wavelength = 2 * math.pi / f
            share = (original / wavelength - low) / max(high - low, 1e-9)
            share = min(1.0, max(0.0, share))
            return f * (share + (1 - share) / factor)

        return Rope(tuple(scaled(f) for f in plain))
    if kind == "yarn":
        factor, fast, slow = number("factor"), number("beta_fast", 32.0), number("beta_slow", 1.0)
        original = number(
            "original_max_position_embeddings", config.integer("max_position_embeddings", 2048, high=1 << 28)
        )

        def pair(turns: float) -> float:
            return dims * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = max(math.floor(pair(fast)), 0), min(math.ceil(pair(slow)), dims - 1)
        ramp = [min(1.0, max(0.0, (i - low) / max(high - low, 1e-3))) for i in range(dims // 2)]
        return Rope(
            tuple(f * (1 - r) + f / factor * r for f, r in zip(plain, ramp, strict=True)),
            number("attention_factor", 0.1 * math.log(factor) + 1.0),
        )
    config.refuse(f"rope scaling {kind!r} is not supported")
    return Rope(tuple(plain))
