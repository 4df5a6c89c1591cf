"""Drives OpenVINO GenAI's language pipeline for bench_worker.py.

The model is a folder in OpenVINO's form, or a GGUF file of an architecture and quantisation that it reads itself.
"""

from collections.abc import Callable, Sequence

BLOCK = 32  # tokens of a block of its cache on a CPU


def start(package, model: str, threads: int, context: int, options: dict[str, str]) -> Callable[..., float]:
    import numpy as np

    # Its own defaults for one user, but for the cache: room for one context. Otherwise it keeps every prompt of the run
    scheduler = package.SchedulerConfig()
    scheduler.enable_prefix_caching, scheduler.max_num_batched_tokens = True, 1 << 30
    scheduler.num_kv_blocks = -(-context // BLOCK) + 1
    pipeline = package.LLMPipeline(model, "CPU", scheduler_config=scheduler, INFERENCE_NUM_THREADS=threads)

    def answer(ids: Sequence[int], tokens: int):
        """Times in ms: to the first token, and from it to the last."""
        tensor = package.openvino.Tensor(np.array([ids], np.int64))
        said = pipeline.generate(tensor, max_new_tokens=tokens, ignore_eos=True, do_sample=False)
        if len(said.tokens[0]) != tokens:
            raise RuntimeError(f"It made {len(said.tokens[0])} tokens instead of {tokens}")
        times = said.perf_metrics.raw_metrics.m_new_token_times
        return said.perf_metrics.get_ttft().mean, times[-1] - times[0]

    def measure(kind: str, tokens: int, depth: int, ids: list[int]) -> float:
        if kind == "tg":
            return 1000.0 * tokens / answer(ids, tokens + 1)[1]
        if depth:  # whole blocks of these are found in the cache afterwards
            answer(ids[:depth], 1)
        return 1000.0 * tokens / answer(ids, 1)[0]

    return measure
