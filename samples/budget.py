"""Ask what fits, then shrink a model while it answers: python samples/budget.py BUNDLE"""

import sys

import shoal

for memory in ("1GB", "300MB", "20MB"):
    try:
        print(f"{memory}: a context of {shoal.plan(sys.argv[1], memory=memory).context} tokens")
    except shoal.ShoalError as error:
        print(f"{memory}: {error.what} {error.fix}")

with shoal.load(sys.argv[1], context=2048) as model:
    print(model.plan.table())
    answer = model.generate("Count from one to ten.", max_tokens=32)
    next(answer)
    model.set_context(256)  # memory is given back between two tokens
    print(answer.finish())
    print(model.plan.table())
