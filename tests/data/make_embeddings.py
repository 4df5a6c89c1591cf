"""Makes tests/data/embeddings.json: sentence embeddings of all-MiniLM-L6-v2 by transformers, in fp32.

Run by hand, in an environment with torch and transformers: `python tests/data/make_embeddings.py MINILM_FOLDER`. Made
with torch 2.13.0 and transformers 5.23.0: mean of the last hidden states over what is not padding, then unit length,
as the folder's modules.json tells sentence-transformers. No text reaches the 256 tokens at which that one cuts.
"""

import json
import sys
from pathlib import Path

import torch
import transformers

TEXTS = [
    "hello",
    "A man is eating food.",
    "The girl is carrying a baby.",
    "On-device inference keeps private words private.",
    "Ünïcödé, 中文 and emoji 🙂 in one line",
    "",
    "The quick brown fox jumps over the lazy dog. " * 12,
    "supercalifragilisticexpialidocious " * 20,
]

if __name__ == "__main__":
    model = transformers.AutoModel.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
    found = []
    for text in TEXTS:
        batch = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            vector = torch.nn.functional.normalize(model(**batch).last_hidden_state[0].mean(0), dim=0)
        numbers = [round(float(value), 6) for value in vector]
        found.append({"text": text, "tokens": batch["input_ids"].shape[1], "embedding": numbers})
    print([entry["tokens"] for entry in found])
    target = Path(__file__).with_name("embeddings.json")
    target.write_text(json.dumps({"texts": found}, ensure_ascii=False, separators=(",", ":")) + "\n")
