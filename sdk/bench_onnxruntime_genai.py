"""Drives onnxruntime-genai for bench_worker.py. The model is a folder of its model builder."""

import json
import time
from collections.abc import Callable


def start(package, model: str, threads: int, context: int, options: dict[str, str]) -> Callable[..., float]:
    import numpy as np

    config = package.Config(model)
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    loaded = package.Model(config)

    def measure(kind: str, tokens: int, depth: int, ids: list[int]) -> float:
        params = package.GeneratorParams(loaded)
        # min_length: nothing ends an answer
        params.set_search_options(max_length=context, min_length=context, do_sample=False)
        generator = package.Generator(loaded, params)
        held = len(ids) if kind == "tg" else depth
        if held:
            generator.append_tokens(np.array(ids[:held], np.int32))
        if kind == "tg":
            generator.generate_next_token()  # the first token comes with the prompt
        started = time.perf_counter()
        if kind == "pp":
            generator.append_tokens(np.array(ids[held:], np.int32))
        else:
            for _ in range(tokens):
                generator.generate_next_token()
        took = time.perf_counter() - started
        if generator.token_count() != len(ids) + (tokens + 1 if kind == "tg" else 0):
            raise RuntimeError(f"It holds {generator.token_count()} tokens at the end")
        return tokens / took

    return measure
