"""Drives llama.cpp through llama-cpp-python's C functions, built by pip for this processor, for bench_worker.py.

Steps are timed as llama-bench times them, but for the next token: it is the likeliest one, not a random one.
"""

import logging
import time
from collections.abc import Callable, Sequence

FLASH = {"on": "ENABLED", "off": "DISABLED", "auto": "AUTO"}


def start(package, model: str, threads: int, context: int, options: dict[str, str]) -> Callable[..., float]:
    import numpy as np

    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
    package.llama_backend_init()
    params = package.llama_model_default_params()
    params.n_gpu_layers, params.use_extra_bufts = 0, "--no-repack" not in options
    loaded = package.llama_model_load_from_file(model.encode(), params)
    if not loaded:
        raise RuntimeError("It does not load the model.")
    settings = package.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_ubatch, settings.no_perf = context, context, min(context, 512), True
    settings.n_threads = settings.n_threads_batch = threads
    settings.flash_attn_type = getattr(package, f"LLAMA_FLASH_ATTN_TYPE_{FLASH[options.get('-fa', 'auto')]}")
    engine = package.llama_init_from_model(loaded, settings)
    if not engine:
        raise RuntimeError("It makes no context for the model.")
    cache, vocab = package.llama_get_memory(engine), package.llama_vocab_n_tokens(package.llama_model_get_vocab(loaded))

    def feed(ids: Sequence[int]) -> None:
        """The tokens after those that are cached; the logits are those of the last one."""
        held = (package.llama_token * len(ids))(*ids)  # a batch only points at them
        if code := package.llama_decode(engine, package.llama_batch_get_one(held, len(ids))):
            raise RuntimeError(f"llama_decode returned {code}.")
        package.llama_synchronize(engine)

    def likeliest() -> int:
        return int(np.ctypeslib.as_array(package.llama_get_logits_ith(engine, -1), (vocab,)).argmax())

    def measure(kind: str, tokens: int, depth: int, ids: list[int]) -> float:
        package.llama_memory_clear(cache, False)
        held = len(ids) if kind == "tg" else depth
        if held:
            feed(ids[:held])
        started = time.perf_counter()
        if kind == "pp":
            feed(ids[held:])
        else:
            for _ in range(tokens):
                feed([likeliest()])
        return tokens / (time.perf_counter() - started)

    return measure
