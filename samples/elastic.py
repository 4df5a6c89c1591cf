"""Answer while the memory for the model goes down and up again: python samples/elastic.py BUNDLE [PROMPT]

BUNDLE is a stacked one (shoal convert --recipe bitstack). Another thread moves the budget between what the floor of its
stack and what all of it needs; each line has a token and how much of the stack it came from.
"""

import itertools
import sys
import threading

import shoal


def move(model, least: int, most: int, stop: threading.Event) -> None:
    """Changes the budget five times a second, down and up again, until `stop`."""
    down = [most - (most - least) * step // 4 for step in range(5)]
    for budget in itertools.cycle(down + down[-2:0:-1]):
        model.set_memory(budget)
        if stop.wait(0.2):
            return


with shoal.load(sys.argv[1]) as model:
    stack = model.stack
    if stack is None:
        sys.exit(f"{sys.argv[1]} has no stack: convert with --recipe bitstack")
    most = model.plan.total
    least = most - stack.bytes + stack.index.sizes()[stack.index.floor]
    stop = threading.Event()
    mover = threading.Thread(target=move, args=(model, least, most, stop))
    mover.start()
    try:
        for token in model.generate(" ".join(sys.argv[2:]) or "Tell a story about the sea.", max_tokens=120):
            print(f"{stack.entries:6} entries {stack.bytes / 2**20:8.1f} MiB  {token.text!r}", flush=True)
    finally:
        stop.set()
        mover.join()
