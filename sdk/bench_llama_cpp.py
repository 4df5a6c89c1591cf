"""llama.cpp's half of a comparison: one JSON test a line in, one JSON answer a line out.

Run by bench.LlamaCppArm as `python bench_llama_cpp.py GGUF THREADS CONTEXT OPTIONS`, in an environment that has
xllamacpp; it needs nothing of shoal. OPTIONS is a string such as "-fa off".
"""

import json
import random
import sys


def main() -> None:
    gguf, threads, context, options = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = gguf
    params.n_ctx, params.n_parallel, params.n_batch, params.n_ubatch = context, 1, 512, 512
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.cpuparams.poll = params.cpuparams_batch.poll = 0  # it must sleep while the other arm runs
    params.n_gpu_layers, params.warmup, params.verbosity, params.cache_ram_mib = 0, True, -1, 0
    if "-fa off" in options:
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if "-nopo" in options or "--no-repack" in options:
        params.no_extra_bufts = True
    server = xllamacpp.Server(params)
    vocab = 1000
    print(json.dumps({"vocab": vocab}), flush=True)
    draw = random.Random(7)
    for line in sys.stdin:
        test = json.loads(line)
        ids = [draw.randrange(10, vocab) for _ in range(test["depth"] + test["tokens"] + 1)]

        def complete(prompt: list[int], predict: int) -> dict:
            answer = server.handle_completions(
                {
                    "prompt": prompt,
                    "n_predict": predict,
                    "ignore_eos": True,
                    "temperature": 0.0,
                    "cache_prompt": True,
                    "timings_per_token": False,
                    "stream": False,
                }  # fmt: skip
            )
            answer = json.loads(answer) if isinstance(answer, str) else answer
            if "timings" not in answer:
                raise RuntimeError(str(answer)[:300])
            return answer["timings"]

        try:
            if test["kind"] == "pp":
                if test["depth"]:
                    complete(ids[: test["depth"]], 1)
                speed = complete(ids[: test["depth"] + test["tokens"]], 1)["prompt_per_second"]
            else:
                timings = complete(ids[: max(1, test["depth"])], test["tokens"] + 1)
                # Its clock starts with the first of n + 1 tokens: n steps
                speed = 1000.0 * test["tokens"] / timings["predicted_ms"]
            print(json.dumps({"tokens_per_s": speed}), flush=True)
        except Exception as error:
            print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)


if __name__ == "__main__":
    main()
