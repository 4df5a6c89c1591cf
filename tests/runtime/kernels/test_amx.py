"""AMX as Python reaches it, on processors that have none: the library as installed, under the emulator of its tiles."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from shoal.converters.recipe import Format
from shoal.runtime import kernels
from shoal.runtime.kernels import build
from shoal.runtime.kernels.layout import LinearFormat

CHILD = """
import json, sys
import numpy as np
import shoal
from shoal.runtime import kernels
from shoal.runtime.kernels.layout import LinearFormat

arrays, formats, bundles = sys.argv[1], *map(json.loads, sys.argv[2:])
with np.load(arrays) as stored:
    for index, numbers in enumerate(formats):
        for rows in (1, 16, 35):
            x, weights = stored[f"x{index}"][:rows], stored[f"w{index}"]
            found, wanted = (kernels.linear(LinearFormat(*numbers), weights, x, path=path, threads=2)
                             for path in ("", "scalar"))
            assert found.tobytes() == wanted.tobytes(), (numbers, rows)
said = []
for path in bundles:
    with shoal.load(path, context=64, chunk=32, prepare=False) as model:
        said.append([(token.id, token.logprob) for token in model.generate(list(range(5, 45)), max_tokens=8)])
print(json.dumps([kernels.isa(), said]))
"""


@pytest.fixture(scope="module")
def emulator(tmp_path_factory) -> Path:
    """To be preloaded."""
    folder = tmp_path_factory.mktemp("emulator")
    source = Path(__file__).with_name("amx_emulator.cpp")
    try:
        compiler = build.Compiler()
    except build.BuildError as error:
        pytest.skip(str(error))
    return compiler.link(compiler.compile([source], folder), folder / "libamx_emulator.so", shared=True)


@pytest.mark.skipif(not kernels.has("avx512"), reason="the emulator is of AMX alone, and this processor has no AVX-512")
def test_the_library_on_emulated_tiles(emulator, matrix, bundle, tmp_path):
    formats = [
        LinearFormat(300, 37, 4, 32, 320),
        LinearFormat(576, 50, 3, 64, 192, 1),
        LinearFormat(300, 37, 8, 320, 320),
    ]
    random, arrays = np.random.default_rng(4), {}
    for index, format in enumerate(formats):
        arrays[f"w{index}"] = matrix(format)[0]
        arrays[f"x{index}"] = random.standard_normal((35, format.inputs)).astype(np.float32)
    np.savez(tmp_path / "arrays.npz", **arrays)
    bundles = [str(bundle("llama", Format(4))), str(bundle("gemma3", Format(8)))]
    command = [
        sys.executable,
        "-c",
        CHILD,
        str(tmp_path / "arrays.npz"),
        json.dumps([[*vars(f).values()] for f in formats]),
    ]

    def run(isa: str) -> list:
        preload = {"LD_PRELOAD": str(emulator)} if isa == "amx" else {}
        done = subprocess.run([*command, json.dumps(bundles)], env={**os.environ, "SHOAL_ISA": isa, **preload},
                              capture_output=True, text=True, timeout=300)  # fmt: skip
        assert done.returncode == 0, done.stderr
        used, said = json.loads(done.stdout)
        assert used == isa
        return said

    tiles = run("amx")
    assert tiles == run("avx512"), "attention is the same there, and so are all bits"
    assert [[token for token, _ in one] for one in tiles] == [[token for token, _ in one] for one in run("scalar")]
