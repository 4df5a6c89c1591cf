"""A rival's half of a comparison: one JSON test a line in, one JSON answer a line out.

Run by bench_arms.ProcessArm as `python bench_worker.py DRIVER PACKAGE MODEL THREADS CONTEXT OPTIONS` in an environment
that has PACKAGE; neither this file nor a driver needs anything of shoal. A driver is a file beside this one with
`start(package, model, threads, context, options)`, which loads the model and returns
`measure(kind, tokens, depth, ids)`, which returns tokens a second. Only answers reach standard output: what an engine
says itself goes to stderr.
"""

import importlib
import json
import os
import sys


def main() -> None:
    driver, package, model, threads, context, options = sys.argv[1:]
    start = importlib.import_module(driver).start
    here = os.path.dirname(os.path.abspath(__file__))  # its modules are not meant for the engine
    sys.path[:] = [path for path in sys.path if os.path.abspath(path) != here]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def tell(answer: dict) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    try:
        found = importlib.import_module(package)
    except ImportError as error:
        tell({"error": str(error), "missing": package})
        return
    try:
        measure = start(found, model, int(threads), int(context), json.loads(options))
        tell({"ready": True})
        for line in sys.stdin:
            tell({"tokens_per_s": measure(**json.loads(line))})
    except Exception as error:
        tell({"error": f"{type(error).__name__}: {error}"})
    os._exit(0)  # its threads would be waited for


if __name__ == "__main__":
    main()
