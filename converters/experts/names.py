"""Where a mixture's tensors are in a checkpoint. It knows nothing about what they are for."""

from collections.abc import Iterator
from dataclasses import dataclass

from shoal.runtime.card import Card

NORM = "post_attention_layernorm"  # of the experts' input, in every family


@dataclass(frozen=True)
class Names:
    """Names below a block and without `.weight`; `{}` is the expert's number."""

    router: str = "mlp.gate"
    gate: str = "mlp.experts.{}.gate_proj"
    up: str = "mlp.experts.{}.up_proj"
    down: str = "mlp.experts.{}.down_proj"
    shared: str = "mlp.shared_expert"
    shared_gate: str = "mlp.shared_expert_gate"
    residual: str = "mlp.gate_residual"  # of the router before
    constant: str = "mlp.constant.{}"  # its `.weight` [2, hidden] and its `.value` [hidden]

    def expert(self, block: int, expert: int) -> tuple[str, str, str]:
        """Its gate, its up and its down."""
        prefix = f"model.layers.{block}"
        return tuple(f"{prefix}.{part.format(expert)}" for part in (self.gate, self.up, self.down))  # type: ignore


def all_experts(card: Card, names: Names) -> Iterator[tuple[str, str, str]]:
    """Every expert's matrices, `.weight` included, in the order of records."""
    for block in card.routed_blocks:
        for expert in range(card.experts):
            yield tuple(f"{part}.weight" for part in names.expert(block, expert))  # type: ignore[misc]


def tensors(card: Card, names: Names, block: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what a routed block has in place of a feed-forward."""
    prefix, hidden, total = f"model.layers.{block}", card.hidden, card.total_experts
    found: dict[str, tuple[int, ...]] = {f"{prefix}.{names.router}.weight": (total, hidden)}
    for expert in range(card.experts):
        gate, up, down = names.expert(block, expert)
        found |= {f"{name}.weight": (card.expert_ffn, hidden) for name in (gate, up)}
        found[f"{down}.weight"] = (hidden, card.expert_ffn)
    if card.shared_ffn:
        for part in ("gate", "up"):
            found[f"{prefix}.{names.shared}.{part}_proj.weight"] = (card.shared_ffn, hidden)
        found[f"{prefix}.{names.shared}.down_proj.weight"] = (hidden, card.shared_ffn)
        if card.shared_gate:
            found[f"{prefix}.{names.shared_gate}.weight"] = (1, hidden)
    if card.gating_residual and block != card.routed_blocks[0]:
        found[f"{prefix}.{names.residual}.weight"] = (total, total)
    for index in range(card.constant_experts):
        constant = f"{prefix}.{names.constant.format(index)}"
        found |= {f"{constant}.weight": (2, hidden), f"{constant}.value": (hidden,)}
    return found
