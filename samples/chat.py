"""A conversation that remembers: python samples/chat.py BUNDLE

Only what is new in a conversation is computed: the beginning of the prompt is still in the cache.
"""

import sys

import shoal

questions = ["My name is Ada. Please remember it.", "What is my name?"]
messages = [{"role": "system", "content": "You answer briefly."}]
with shoal.load(sys.argv[1], context=512) as model:
    for question in questions:
        messages.append({"role": "user", "content": question})
        answer = model.generate(messages, max_tokens=32)
        messages.append({"role": "assistant", "content": answer.finish()})
        stats = answer.stats
        print(f"> {question}\n{answer.text}  ({stats.reused_tokens} of {stats.prompt_tokens} prompt tokens reused)")
