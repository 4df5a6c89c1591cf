"""llama.cpp's half of a comparison: one JSON test a line in, one JSON answer a line out.

Run by bench.LlamaCppArm as `python bench_llama_cpp.py GGUF THREADS CONTEXT OPTION…`, in an environment that has
xllamacpp; it needs nothing of shoal. Only answers reach its standard output: llama.cpp's own words go to stderr.
"""

import json
import os
import sys
from collections.abc import Sequence

FLASH = {"on": "ENABLED", "off": "DISABLED", "auto": "AUTO"}


def parse(options: Sequence[str]) -> dict:
    """llama.cpp's options that can be compared: -fa on|off|auto, -nr (--no-repack). Raises ValueError for others."""
    found: dict = {"flash": "auto", "repack": True}
    words = iter(options)
    for word in words:
        if word in ("-fa", "--flash-attn"):
            found["flash"] = next(words, "")
            if found["flash"] not in FLASH:
                raise ValueError(f"{word} takes one of {', '.join(FLASH)}")
        elif word in ("-nr", "--no-repack"):
            found["repack"] = False
        else:
            raise ValueError(f"{word} is not one of -fa on|off|auto and --no-repack")
    return found


def start(gguf: str, threads: int, context: int, options: Sequence[str]):
    """A server without a port, with one slot."""
    import xllamacpp

    chosen = parse(options)
    params = xllamacpp.CommonParams()
    params.model.path = gguf
    params.n_ctx, params.n_parallel, params.n_batch, params.n_ubatch = context, 1, 512, 512
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.cpuparams.poll = params.cpuparams_batch.poll = 0  # it must sleep while the other arm runs
    params.n_gpu_layers, params.warmup, params.verbosity, params.cache_ram_mib = 0, True, -1, 0
    params.flash_attn_type = getattr(xllamacpp.llama_flash_attn_type, f"LLAMA_FLASH_ATTN_TYPE_{FLASH[chosen['flash']]}")
    params.no_extra_bufts = not chosen["repack"]
    return xllamacpp.Server(params)


def measure(server, test: dict) -> dict:
    """Tokens a second of one test; its `ids` are the depth and the prompt."""

    def complete(prompt: list[int], predict: int) -> dict:
        answer = server.handle_completions({
            "prompt": prompt, "n_predict": predict, "ignore_eos": True, "temperature": 0.0, "cache_prompt": True,
            "stream": False,
        })  # fmt: skip
        answer = json.loads(answer) if isinstance(answer, str) else answer
        if "timings" not in answer:
            raise RuntimeError(str(answer)[:300])
        return answer["timings"]

    ids, depth = test["ids"], test["depth"]
    if test["kind"] == "tg":
        timings = complete(ids, test["tokens"] + 1)
        # Its clock starts with the first of n + 1 tokens: n steps
        return {"tokens_per_s": 1000.0 * (timings["predicted_n"] - 1) / timings["predicted_ms"]}
    if depth:
        complete(ids[:depth], 0)
    timings = complete(ids, 1)
    if timings["prompt_n"] != test["tokens"]:
        raise RuntimeError(f"It took {timings['prompt_n']} prompt tokens instead of {test['tokens']}")
    return {"tokens_per_s": 1000.0 * timings["prompt_n"] / timings["prompt_ms"]}


def main() -> None:
    here = os.path.dirname(os.path.abspath(__file__))  # its modules are not meant for xllamacpp
    sys.path[:] = [path for path in sys.path if os.path.abspath(path) != here]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def tell(answer: dict) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    try:
        import xllamacpp  # noqa: F401
    except ImportError as error:
        tell({"error": str(error), "missing": "xllamacpp"})
        return
    try:
        server = start(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
        tell({"ready": True})
        for line in sys.stdin:
            tell(measure(server, json.loads(line)))
    except Exception as error:
        tell({"error": f"{type(error).__name__}: {error}"})
    os._exit(0)  # its threads would be waited for


if __name__ == "__main__":
    main()
