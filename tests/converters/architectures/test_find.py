"""What cannot be converted is refused with all that is wrong with it, and with nothing else than a ConvertError."""

import copy
import json
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.converters import architectures
from shoal.converters.sources import TensorInfo
from shoal.runtime.card import Card
from shoal.runtime.errors import ConvertError

CONFIG = dict(
    model_type="llama", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, vocab_size=100, max_position_embeddings=64, rms_norm_eps=1e-5, rope_theta=10000.0,
    tie_word_embeddings=True,
)  # fmt: skip


@dataclass
class Stub:
    """A source that has a configuration and shapes, and no weights."""

    values: dict
    shapes: dict

    def config(self):
        return self.values

    def tensors(self):
        return {name: TensorInfo(shape, "F32", 0) for name, shape in self.shapes.items()}

    def describe(self):
        return "a stub"


def complete() -> Stub:
    stub = Stub(CONFIG, {})
    architecture = architectures._families()["llama"]
    stub.shapes = architecture.tensors(architecture.card(architectures.Config(CONFIG, []), "a stub"))
    return stub


def test_a_complete_checkpoint_is_found():
    architecture, card = architectures.find(complete())
    assert architecture.MODEL_TYPES == ("llama",)
    assert Card.from_json(card.to_json()) == card
    assert (card.head_dim, card.kv_heads, card.tied) == (16, 1, True)


def test_every_missing_and_misshapen_tensor_is_named():
    stub = complete()
    del stub.shapes["model.norm.weight"]
    stub.shapes["model.layers.1.mlp.down_proj.weight"] = (64, 32)
    with pytest.raises(ConvertError) as caught:
        architectures.find(stub)
    assert "model.norm.weight [32] is missing" in caught.value.why
    assert "down_proj.weight is [64, 32], not [32, 64]" in caught.value.why


def test_a_table_may_be_longer_than_what_is_used(tiny):
    config = json.loads((tiny / "bert-mean" / "config.json").read_text()) | {"max_seq_length": 32}
    bert = architectures._families()["bert"]
    shapes = dict(bert.tensors(bert.card(architectures.Config(config, []), "a stub")))
    table = "embeddings.position_embeddings.weight"
    assert shapes[table] == (-32, 48)
    shapes["embeddings.token_type_embeddings.weight"] = (2, 48)
    architectures.find(Stub(config, shapes | {table: (40, 48)}))
    with pytest.raises(ConvertError, match=r"position_embeddings.weight is \[31, 48\], not \[32 or more, 48\]"):
        architectures.find(Stub(config, shapes | {table: (31, 48)}))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "mamba"}, "Supported are bert, "),
        ({"model_type": ["llama"]}, "Supported are"),
        ({"num_key_value_heads": 3}, "does not divide"),
        ({"head_dim": 24}, "heads of 24 channels"),
        ({"hidden_act": "relu"}, "'relu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling.low_freq_factor"),
        ({"rope_theta": 10**400}, "rope_theta"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window"),
        ({"model_type": "gemma3_text", "final_logit_softcapping": 30.0}, "soft-capping"),
        ({"model_type": "gemma3_text", "layer_types": ["sliding_attention", "mamba"]}, "layer_types"),
        ({"model_type": "bert", "pooling": "max"}, "pooling 'max'"),
        ({"model_type": "bert", "position_embedding_type": "relative_key"}, "relative_key"),
    ],
)
def test_what_is_not_supported_is_named(changes, named):
    with pytest.raises(ConvertError) as caught:
        architectures.find(Stub(CONFIG | changes, {}))
    assert named in caught.value.why + caught.value.fix


FAMILIES = ("llama", "llama3", "qwen2-yarn", "qwen3", "gemma3", "bert-mean", "qwen2_moe", "olmoe", "mixtral",
            "smallthinker", "shoal_moe")  # fmt: skip
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.lists(st.integers(), max_size=3),
    st.just(10**400), st.dictionaries(st.sampled_from(["rope_type", "factor", "rope_theta"]), st.floats(), max_size=3),
    st.fixed_dictionaries({"rope_type": st.sampled_from(["llama3", "yarn", "linear", "factors", "default"]),
                           "factor": st.floats()}),
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    family=st.sampled_from(FAMILIES),
    changes=st.lists(st.tuples(st.booleans(), st.integers(0, 99), VALUES), min_size=1, max_size=3),
)
def test_no_configuration_breaks_it(tiny, family, changes):
    config = copy.deepcopy(json.loads((tiny / family / "config.json").read_text()))
    config.setdefault("rope_scaling", None)
    for nested, index, value in changes:
        target = config["rope_parameters"] if nested and config.get("rope_parameters") else config
        if not isinstance(target, dict):
            continue
        target[sorted(target)[index % len(target)]] = value
    with pytest.raises(ConvertError):  # there are no tensors at all
        architectures.find(Stub(config, {}))
