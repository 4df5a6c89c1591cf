"""Makes tests/data/tiny: models of every family with random weights, as Hugging Face folders of a few hundred KB,
each with what transformers computes from it (reference.npz). Run by hand, in an environment with torch, transformers
and tokenizers: `python tests/data/make_tiny.py`. Made with torch 2.13.0 and transformers 5.23.0.

Every number in a model is random, biases and norms too (a freshly initialised model has zeros and ones there and
hides mistakes), and shapes are awkward on purpose: a feed-forward that is no multiple of a group, heads that do not
add up to the hidden size, a sliding window shorter than the prompt.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers

HERE = Path(__file__).parent / "tiny"
LENGTH = 40
SPECIAL = ["<pad>", "<s>", "</s>", "<|user|>"]
COMMON = dict(
    vocab_size=260, hidden_size=48, intermediate_size=72, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=256, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2,
    pad_token_id=0,
)  # fmt: skip
LLAMA3 = dict(rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)  # fmt: skip
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=64)

DECODERS = {
    "llama": (transformers.LlamaConfig(**COMMON, tie_word_embeddings=False), torch.float32),
    "llama3": (transformers.LlamaConfig(**COMMON, rope_parameters=LLAMA3, tie_word_embeddings=True), torch.bfloat16),
    "qwen2": (transformers.Qwen2Config(**COMMON, tie_word_embeddings=True), torch.float16),
    "qwen2-yarn": (transformers.Qwen2Config(**COMMON, rope_parameters=YARN, tie_word_embeddings=True), torch.float32),
    "qwen3": (transformers.Qwen3Config(**COMMON, tie_word_embeddings=False), torch.float32),
    "gemma3": (
        transformers.Gemma3TextConfig(
            **COMMON, sliding_window=7, query_pre_attn_scalar=24, tie_word_embeddings=True,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
        torch.bfloat16,
    ),
}  # fmt: skip


def randomise(model, seed: int, dtype) -> None:
    """Weights that keep the stream's size; rounded to `dtype` first, so that the reference is of the stored numbers."""
    torch.manual_seed(seed)
    offset = "Gemma3" in type(model).__name__  # its norms store their distance from one
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim == 2:
                value.normal_(0, 1 if "embed" in name else value.shape[1] ** -0.5)
            elif "norm" in name.lower() and name.endswith("weight"):
                value.normal_(0 if offset else 1, 0.2)
            else:
                value.normal_(0, 0.5)
            value.copy_(value.to(dtype).float())


def save(model, folder: Path, dtype, reference: dict) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    model.to(dtype).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "model.safetensors").chmod(0o644)
    np.savez(folder / "reference.npz", **reference)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder.name}: {size / 1024:.0f} KB")


def byte_tokenizer() -> tokenizers.Tokenizer:
    """Four special tokens, then one token a byte."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(SPECIAL + alphabet)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(SPECIAL)
    return made


def word_tokenizer() -> tokenizers.Tokenizer:
    """WordPiece over letters and digits, as BERT's."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,;:!?'-"
    tokens = "[PAD] [UNK] [CLS] [SEP] the and ##ing".split() + [*letters] + [f"##{letter}" for letter in letters]
    vocab = {token: index for index, token in enumerate(tokens)}
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=100))
    made.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    made.decoder = tokenizers.decoders.WordPiece()
    return made


def decoders() -> None:
    for seed, (name, (config, dtype)) in enumerate(DECODERS.items()):
        config._attn_implementation = "eager"
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        randomise(model, seed, dtype)
        tokens = torch.randint(4, 260, (1, LENGTH), generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            found = model(tokens, output_hidden_states=True)
        first = found.hidden_states[1][0].numpy()  # after the first block
        reference = dict(tokens=tokens[0].numpy(), logits=found.logits[0].numpy(), first_block=first)
        save(model, HERE / name, dtype, reference)
        byte_tokenizer().save(str(HERE / name / "tokenizer.json"))
        (HERE / name / "tokenizer_config.json").write_text(
            json.dumps(
                dict(
                    bos_token="<s>", eos_token="</s>", pad_token="<pad>", add_bos_token=True,
                    chat_template="{% for m in messages %}<|user|>{{ m['content'] }}{% endfor %}",
                ),
                indent=1,
            )
        )  # fmt: skip


def encoders() -> None:
    words = word_tokenizer()
    for seed, (pooling, normalize) in enumerate((("mean", True), ("cls", False))):
        config = transformers.BertConfig(
            vocab_size=words.get_vocab_size(), hidden_size=48, num_hidden_layers=3, num_attention_heads=3,
            intermediate_size=88, max_position_embeddings=40, layer_norm_eps=1e-12,
        )  # fmt: skip
        config._attn_implementation = "eager"
        model = transformers.BertModel(config, add_pooling_layer=False).eval()
        randomise(model, 100 + seed, torch.float32)
        lengths = [1, 5, 17, 32]
        tokens = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
        mask = torch.zeros_like(tokens)
        for row, length in enumerate(lengths):
            tokens[row, :length] = torch.randint(4, config.vocab_size, (length,))
            mask[row, :length] = 1
        with torch.no_grad():
            hidden = model(tokens, attention_mask=mask).last_hidden_state
        shares = mask[..., None].float()
        pooled = (hidden * shares).sum(1) / shares.sum(1) if pooling == "mean" else hidden[:, 0]
        pooled = torch.nn.functional.normalize(pooled, dim=-1) if normalize else pooled
        folder = HERE / f"bert-{pooling}"
        save(model, folder, torch.float32, dict(tokens=tokens.numpy(), mask=mask.numpy(), embedding=pooled.numpy()))
        words.save(str(folder / "tokenizer.json"))
        modules = ["Transformer", "Pooling"] + ["Normalize"] * normalize
        paths = ["", "1_Pooling", "2_Normalize"]
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(
            json.dumps({
                "word_embedding_dimension": 48, "pooling_mode_cls_token": pooling == "cls",
                "pooling_mode_mean_tokens": pooling == "mean", "pooling_mode_max_tokens": False,
            })
        )  # fmt: skip
        (folder / "modules.json").write_text(
            json.dumps([
                dict(idx=i, name=str(i), path=paths[i], type=f"sentence_transformers.models.{kind}")
                for i, kind in enumerate(modules)
            ])
        )  # fmt: skip
        (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 32, "do_lower_case": False}))


def ropes() -> None:
    """Frequencies that transformers computes from configurations of real models."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    cases = [
        dict(rope_type="llama3", rope_theta=500000.0, factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
             original_max_position_embeddings=8192),
        dict(rope_type="yarn", rope_theta=1e6, factor=4.0, original_max_position_embeddings=32768),
        dict(rope_type="yarn", rope_theta=1e4, factor=40.0, original_max_position_embeddings=4096, beta_fast=32.0,
             beta_slow=1.0, attention_factor=1.25),
        dict(rope_type="linear", rope_theta=1e6, factor=8.0),
    ]  # fmt: skip
    found = []
    for parameters in cases:
        config = transformers.LlamaConfig(
            hidden_size=2048, num_attention_heads=32, head_dim=64, max_position_embeddings=131072,
            rope_parameters=parameters,
        )  # fmt: skip
        frequencies, scale = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, device="cpu")
        found.append(dict(parameters=parameters, inverse_frequencies=frequencies.tolist(), scale=float(scale)))
    (HERE / "ropes.json").write_text(json.dumps(found))


if __name__ == "__main__":
    HERE.mkdir(exist_ok=True)
    decoders()
    encoders()
    ropes()
