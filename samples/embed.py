"""Find the nearest text by meaning: python samples/embed.py BUNDLE (of an embedding model)"""

import sys

import shoal

texts = ["The cat sleeps on the sofa.", "Interest rates were raised again.", "It will rain tomorrow."]
query = "What is the weather going to be like?"
with shoal.load(sys.argv[1]) as model:
    vectors = model.embed([query, *texts])  # float32 [4, hidden], of length 1
    for score, text in sorted(zip(vectors[1:] @ vectors[0], texts, strict=True), reverse=True):
        print(f"{score:.3f}  {text}")
