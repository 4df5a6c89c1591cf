"""Stream an answer inside a memory budget: python samples/stream.py BUNDLE [PROMPT]"""

import sys

import shoal

bundle, prompt = sys.argv[1], " ".join(sys.argv[2:]) or "Why is the sky blue?"
with shoal.load(bundle, memory="300MB") as model:
    for token in model.generate(prompt, max_tokens=64):
        print(token.text, end="", flush=True)
    print()
