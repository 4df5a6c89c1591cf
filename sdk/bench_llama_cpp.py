"""Drives llama.cpp through xllamacpp, a package of built libraries, for bench_worker.py."""

import json
from collections.abc import Callable, Sequence

FLASH = {"on": "ENABLED", "off": "DISABLED", "auto": "AUTO"}


def start(package, model: str, threads: int, context: int, options: dict[str, str]) -> Callable[..., float]:
    """A server without a port, with one slot."""
    params = package.CommonParams()
    params.model.path = model
    params.n_ctx, params.n_parallel, params.n_batch, params.n_ubatch = context, 1, 512, 512
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.cpuparams.poll = params.cpuparams_batch.poll = 0  # it must sleep while the other arm runs
    params.n_gpu_layers, params.warmup, params.verbosity, params.cache_ram_mib = 0, True, -1, 0
    flash = FLASH[options.get("-fa", "auto")]
    params.flash_attn_type = getattr(package.llama_flash_attn_type, f"LLAMA_FLASH_ATTN_TYPE_{flash}")
    params.no_extra_bufts = "--no-repack" in options
    server = package.Server(params)

    def complete(prompt: Sequence[int], predict: int) -> dict:
        answer = server.handle_completions({
            "prompt": prompt, "n_predict": predict, "ignore_eos": True, "temperature": 0.0, "cache_prompt": True,
            "stream": False,
        })  # fmt: skip
        answer = json.loads(answer) if isinstance(answer, str) else answer
        if "timings" not in answer:
            raise RuntimeError(str(answer)[:300])
        return answer["timings"]

    def measure(kind: str, tokens: int, depth: int, ids: list[int]) -> float:
        if kind == "tg":
            timings = complete(ids, tokens + 1)
            # Its clock starts with the first of n + 1 tokens: n steps
            return 1000.0 * (timings["predicted_n"] - 1) / timings["predicted_ms"]
        if depth:
            complete(ids[:depth], 0)
        timings = complete(ids, 1)
        if timings["prompt_n"] != tokens:
            raise RuntimeError(f"It took {timings['prompt_n']} prompt tokens instead of {tokens}")
        return 1000.0 * timings["prompt_n"] / timings["prompt_ms"]

    return measure
