"""The card: what a model is, in numbers, without its weights.

A card is written by a converter, stored as JSON in the bundle and read by everything that plans: `budget.plan` needs
nothing else. It knows nothing about files, graphs or execution providers.
"""

import dataclasses
import json
import math
from dataclasses import dataclass

from .errors import BundleError

MAX_EXPERTS = 1024  # of a block, as in experts/layout.py


@dataclass(frozen=True)
class Rope:
    """A rotary position table: angle of pair i at position p is p * inverse_frequencies[i].

    Static scalings (linear, llama3, yarn) only change the frequencies and the `scale` of the cosines and sines
    (Su et al. 2021; Peng et al. 2023), so a table of head_dim/2 numbers says everything.
    """

    inverse_frequencies: tuple[float, ...]
    scale: float = 1.0


@dataclass(frozen=True)
class Card:
    """A model's shape. Counts are tokens, channels or blocks; `windows` and `rope_of` have one entry a block."""

    name: str
    model_type: str
    task: str  # "generate" or "embed"
    blocks: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    max_context: int
    norm_eps: float
    activation: str  # silu, gelu, gelu_tanh
    tied: bool = False  # the head is the embedding
    attention_bias: bool = False  # Q, K and V have a bias
    qk_norm: bool = False  # Q and K are normalised per head
    attention_scale: float = 0.0
    embedding_scale: float = 1.0
    ropes: tuple[Rope, ...] = ()
    rope_of: tuple[int, ...] = ()
    windows: tuple[int, ...] = ()  # 0 is full attention, n sees the last n positions
    bos: int = -1  # -1: none
    eos: tuple[int, ...] = ()
    pad: int = -1
    add_bos: bool = False
    pooling: str = ""  # embed: mean or cls
    normalize: bool = False  # embed: unit length
    source: str = ""  # what it was converted from, for a person
    tokenizer_bytes: int = 0  # what the tokenizer holds in memory
    first_block: int = 0  # of a part: it has the blocks range(first_block, last_block) of the model
    last_block: int = 0  # 0: all
    whole: str = ""  # of a part: what it shares with the other parts of the same model and recipe, and with no others
    experts: int = 0  # gated feed-forwards of which a router chooses; 0: every block has one feed-forward
    top_k: int = 0  # how many of them (and of the special ones) see a token
    expert_ffn: int = 0
    expert_activation: str = ""  # silu, gelu, gelu_tanh, relu
    routing: str = "softmax"  # what makes weights of logits: softmax over all, sigmoid of each, or equal: each is 1
    normalised: bool = False  # the weights of the chosen sum to 1
    routed_scale: float = 1.0  # what the weights are multiplied by
    routed: tuple[int, ...] = ()  # one entry a block: whether it has experts; empty: all have, where there are any
    early_routing: bool = False  # the router reads the stream that enters the block, before attention
    gating_residual: bool = False  # a router's logits also depend on those of the router before
    zero_experts: int = 0  # special ones give nothing, their input, or it and a constant; their numbers follow
    copy_experts: int = 0
    constant_experts: int = 0
    shared_ffn: int = 0  # of a feed-forward that sees every token beside the chosen ones; 0: none
    shared_gate: bool = False  # what it gives is multiplied by a sigmoid

    @property
    def span(self) -> range:
        """The blocks that are here: all of them, but in a part."""
        return range(self.first_block, self.last_block or self.blocks)

    @property
    def is_part(self) -> bool:
        return len(self.span) < self.blocks

    @property
    def routed_blocks(self) -> tuple[int, ...]:
        """The blocks that have experts, ascending."""
        if not self.experts:
            return ()
        return tuple(block for block, some in enumerate(self.routed or (1,) * self.blocks) if some)

    @property
    def total_experts(self) -> int:
        """How many a router chooses of: the special ones count."""
        return self.experts + self.zero_experts + self.copy_experts + self.constant_experts

    @property
    def has_head(self) -> bool:
        """Whether logits come out, and not the stream after the last block that is here."""
        return self.span.stop == self.blocks

    def to_json(self) -> bytes:
        """Deterministic UTF-8 JSON."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True, indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes) -> "Card":
        """Reads untrusted bytes; unknown keys are ignored (a newer minor version may add some).

        Raises BundleError naming the field that is missing, of a wrong type or out of range.
        """

        def refuse(field_name: str, why: str) -> BundleError:
            return BundleError(
                "The bundle's card cannot be used.", f"Field {field_name!r} {why}.", "Convert the checkpoint again."
            )

        try:
            raw = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise refuse("card", f"is not JSON ({error})") from None
        if not isinstance(raw, dict):
            raise refuse("card", "is not an object")
        values: dict[str, object] = {}
        for item in dataclasses.fields(cls):
            if item.name not in raw:
                if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
                    raise refuse(item.name, "is missing")
                continue
            value = raw[item.name]
            if item.name == "ropes":
                value = tuple(_rope(entry, refuse) for entry in _list(value, item.name, refuse))
            elif item.name in ("rope_of", "windows", "eos", "routed"):
                value = tuple(_integer(entry, item.name, refuse) for entry in _list(value, item.name, refuse))
            elif item.type is int or item.type == "int":
                value = _integer(value, item.name, refuse)
            elif item.type is float or item.type == "float":
                value = _number(value, item.name, refuse)
            elif not isinstance(value, item.type if isinstance(item.type, type) else str):
                raise refuse(item.name, f"has type {type(value).__name__}")
            values[item.name] = value
        card = cls(**values)  # type: ignore[arg-type]
        card._check(refuse)
        return card

    def _check(self, refuse) -> None:
        limits = {"blocks": 1024, "hidden": 1 << 17, "heads": 4096, "kv_heads": 4096, "head_dim": 4096,
                  "ffn": 1 << 20, "vocab": 1 << 24, "max_context": 1 << 28}  # fmt: skip
        for name, most in limits.items():
            if not 1 <= getattr(self, name) <= most:
                raise refuse(name, f"is {getattr(self, name)}, outside 1 to {most}")
        if self.heads % self.kv_heads:
            raise refuse("kv_heads", f"({self.kv_heads}) does not divide heads ({self.heads})")
        if not 0 <= self.first_block < self.span.stop <= self.blocks:
            raise refuse("last_block", f"and first_block are no range of {self.blocks} blocks")
        if self.task not in ("generate", "embed"):
            raise refuse("task", f"is {self.task!r}, not generate or embed")
        if self.task == "generate":
            if len(self.windows) != self.blocks or len(self.rope_of) != self.blocks:
                raise refuse("windows", "and rope_of need one entry a block")
            if any(not 0 <= index < len(self.ropes) for index in self.rope_of):
                raise refuse("rope_of", "names a rope that is not there")
            if any(len(rope.inverse_frequencies) * 2 > self.head_dim for rope in self.ropes):
                raise refuse("ropes", "has more frequencies than half a head")
        self._check_experts(refuse)

    def _check_experts(self, refuse) -> None:
        limits = {"experts": MAX_EXPERTS, "expert_ffn": 1 << 20, "shared_ffn": 1 << 20, "zero_experts": MAX_EXPERTS,
                  "copy_experts": MAX_EXPERTS, "constant_experts": MAX_EXPERTS}  # fmt: skip
        for name, most in limits.items():
            if not 0 <= getattr(self, name) <= most:
                raise refuse(name, f"is {getattr(self, name)}, outside 0 to {most}")
        if self.routing not in ("softmax", "sigmoid", "equal"):
            raise refuse("routing", f"is {self.routing!r:.40}, not softmax, sigmoid or equal")
        if not self.experts:
            if self.top_k or self.routed or self.total_experts or self.shared_ffn:
                raise refuse("experts", "is 0, but other fields tell of experts")
            return
        if self.task != "generate":
            raise refuse("experts", f"has no meaning with the task {self.task!r}")
        if self.total_experts > MAX_EXPERTS:
            raise refuse("experts", f"and the special ones are {self.total_experts}, more than {MAX_EXPERTS}")
        if not 1 <= self.top_k <= self.total_experts:
            raise refuse("top_k", f"is {self.top_k} of {self.total_experts} experts")
        if self.expert_ffn < 1:
            raise refuse("expert_ffn", "is 0, but there are experts")
        if self.expert_activation not in ("silu", "gelu", "gelu_tanh", "relu"):
            raise refuse("expert_activation", f"is {self.expert_activation!r:.40}")
        if self.routed and (len(self.routed) != self.blocks or not set(self.routed) <= {0, 1} or not any(self.routed)):
            raise refuse("routed", "is not one 0 or 1 a block, one of them 1 at least")


def _list(value, name, refuse) -> list:
    if not isinstance(value, list) or len(value) > 1 << 16:
        raise refuse(name, "is not a list of a sensible length")
    return value


def _integer(value, name, refuse) -> int:
    if type(value) is not int or not -1 <= value < 1 << 62:
        raise refuse(name, f"is {value!r:.40}, not a count")
    return value


def _number(value, name, refuse) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise refuse(name, f"is {value!r:.40}, not a finite number")
    return float(value)


def _rope(value, refuse) -> Rope:
    if not isinstance(value, dict):
        raise refuse("ropes", "has an entry that is not an object")
    numbers = _list(value.get("inverse_frequencies"), "ropes", refuse)
    return Rope(tuple(_number(n, "ropes", refuse) for n in numbers), _number(value.get("scale", 1.0), "ropes", refuse))
