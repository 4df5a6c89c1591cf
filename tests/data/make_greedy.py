"""Makes tests/data/greedy.json: what transformers answers greedily, in fp32, from the GGUF files that the tests use.

Run by hand, in an environment with torch, transformers and gguf:
`python tests/data/make_greedy.py smollm2=PATH.gguf qwen=PATH.gguf gemma=PATH.gguf`.
Made with torch 2.13.0 and transformers 5.23.0, which dequantises the file to fp32. Each entry has a prompt, its ids as
the file's own tokenizer gives them, the next 64 ids (an end-of-text token is a token like any other) and the smallest
lead, in logits, of a chosen token over the runner-up: where that is tiny two right programs may differ.
"""

import hashlib
import json
import sys
from pathlib import Path

import torch
import transformers

NEW = 64
PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n    ",
    "Water boils at a temperature of",
    "Q: What is the largest planet of the solar system?\nA:",
    "1, 2, 3, 5, 8, 13,",
    "Dear Sir or Madam,\n\nI am writing to",
    "La lune est",
    "SELECT name, count(*) FROM",
    "It is a truth universally acknowledged, that a single man in possession of a good fortune,",
]


def answers(path: Path) -> dict:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    found = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt)["input_ids"]
        tokens, step, cache, lead = [], ids, None, float("inf")
        for _ in range(NEW):
            with torch.no_grad():
                output = model(torch.tensor([step]), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            best = output.logits[0, -1].topk(2)
            lead = min(lead, float(best.values[0] - best.values[1]))
            step = [int(best.indices[0])]
            tokens += step
        found.append({"prompt": prompt, "ids": ids, "tokens": tokens, "lead": round(lead, 5)})
        print(f"{path.name}: {prompt!r} -> {tokenizer.decode(tokens)!r} (lead {lead:.5f})", flush=True)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"sha256": digest, "transformers": transformers.__version__, "answers": found}


if __name__ == "__main__":
    target = Path(__file__).with_name("greedy.json")
    known = json.loads(target.read_text()) if target.exists() else {}
    for name, path in (argument.split("=", 1) for argument in sys.argv[1:]):
        known[name] = answers(Path(path))
    target.write_text(
        json.dumps(known, ensure_ascii=False, separators=(",", ":")).replace('{"prompt"', '\n{"prompt"') + "\n"
    )
