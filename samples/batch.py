"""Several answers at once, sharing every step: python samples/batch.py BUNDLE"""

import sys

import shoal

prompts = [f"Name one animal that lives in {place}." for place in ("the sea", "a desert", "a forest", "the Arctic")]
with shoal.load(sys.argv[1], context=256, slots=4) as model:
    for prompt, answer in zip(prompts, model.generate_batch(prompts, max_tokens=24), strict=True):
        print(f"> {prompt}\n{answer.text}")
