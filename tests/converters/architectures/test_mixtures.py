"""What only mixtures have: routers between blocks, and configurations and cards of their own. That each family gives
its original's logits is in test_decoders.py."""

import json

import numpy as np
import pytest

from shoal.converters import architectures
from shoal.converters.walk import Scratch, Walk
from shoal.runtime.card import Card
from shoal.runtime.errors import BundleError, ConvertError

FAMILIES = ("qwen2_moe", "qwen3_moe", "olmoe", "mixtral", "smallthinker", "shoal_moe")


def reference(tiny, family: str) -> dict[str, np.ndarray]:
    with np.load(tiny / family / "reference.npz") as stored:
        return dict(stored)


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_one_by_one_make_the_whole(converted, tiny, family, tmp_path):
    """What a router passes on to the next one comes along."""
    expected = reference(tiny, family)
    model = converted(tiny / family)
    walk = Walk(model.architecture, model.card, [expected["tokens"]])
    for block in range(model.card.blocks):
        with Scratch(model.source, tmp_path) as scratch:
            walk.advance(range(block, block + 1), scratch)
        if block == 0:
            np.testing.assert_allclose(walk.hidden[0][0], expected["first_block"], atol=1e-4)
    with Scratch(model.source, tmp_path) as scratch, walk.end(scratch) as head:
        rows = np.arange(len(expected["tokens"]))
        logits = head.run(walk.feeds(walk.hidden[0], range(0)) | {"rows": rows})["logits"]
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-4)


def test_cards_say_what_the_mixture_is(converted, tiny):
    cards = {family: converted(tiny / family).card for family in FAMILIES}
    assert all(Card.from_json(card.to_json()) == card for card in cards.values())
    qwen2, qwen3, olmoe, mixtral, thinker, own = cards.values()
    assert qwen2.routed_blocks == (0, 2) and (qwen2.shared_ffn, qwen2.shared_gate, qwen2.normalised) == (
        48,
        True,
        False,
    )
    assert qwen3.routed_blocks == (0, 1, 2) and (qwen3.experts, qwen3.top_k, qwen3.normalised) == (8, 2, True)
    assert (olmoe.top_k, olmoe.expert_ffn, olmoe.qk_norm) == (3, 48, False)
    assert (mixtral.experts, mixtral.normalised, mixtral.windows) == (4, True, (7, 7, 7))
    assert (thinker.routing, thinker.early_routing, thinker.expert_activation) == ("sigmoid", True, "relu")
    assert thinker.windows == (0, 7, 7) and thinker.rope_of == (1, 0, 0)
    assert (own.experts, own.total_experts, own.top_k, own.gating_residual) == (6, 11, 4, True)


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv"),
        ("qwen3_moe", {"num_experts_per_tok": 9}, "num_experts_per_tok is 9"),
        ("qwen3_moe", {"attention_bias": True}, "attention_bias"),
        ("qwen2_moe", {"mlp_only_layers": [0, 1, 2]}, "no block has experts"),
        ("qwen2_moe", {"mlp_only_layers": "1"}, "mlp_only_layers"),
        ("qwen2_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step"),
        ("mixtral", {"num_local_experts": 1 << 20}, "num_local_experts"),
        ("mixtral", {"num_local_experts": 1024, "num_hidden_layers": 65}, "more than 65536"),
        ("mixtral", {"num_local_experts": 5}, "block_sparse_moe.experts.4.w1.weight [48, 64] is missing"),
        ("smallthinker", {"rope_layout": [1, 2, 1]}, "rope_layout"),
        ("smallthinker", {"moe_layer_layout": [1, 0, 1]}, "moe_layer_layout"),
        ("smallthinker", {"moe_enable_early_router": False}, "moe_enable_early_router"),
        ("shoal_moe", {"zero_experts": 1020}, "more than 1024"),
        ("shoal_moe", {"routing": "top1"}, "routing 'top1'"),
    ],
)
def test_what_is_not_supported_is_named(converted, tiny, family, changes, named):
    source = converted(tiny / family).source
    config = source.config() | changes
    source.config = lambda: config
    with pytest.raises(ConvertError) as caught:
        architectures.find(source)
    assert named in caught.value.why


@pytest.mark.parametrize(
    "changes",
    [
        {"top_k": 0}, {"top_k": 12}, {"experts": 1025}, {"expert_ffn": 0}, {"expert_activation": "tanh"},
        {"routing": "hash"}, {"routed": [1, 0]}, {"routed": [0, 0, 0]}, {"routed": [1, 2, 0]}, {"experts": 0},
        {"zero_experts": -1}, {"copy_experts": 1 << 40}, {"task": "embed"}, {"normalised": 1},
    ],
)  # fmt: skip
def test_a_card_that_contradicts_itself_is_refused(converted, tiny, changes):
    raw = json.loads(converted(tiny / "shoal_moe").card.to_json())
    Card.from_json(json.dumps(raw).encode())
    with pytest.raises(BundleError):
        Card.from_json(json.dumps(raw | changes).encode())
