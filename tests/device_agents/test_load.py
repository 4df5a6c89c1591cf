"""Many devices at once: nothing is lost, everybody gets its own, memory and descriptors stay."""

import asyncio
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_edge import Device, infer, running

from shoal.converters.split.tail import pack_tail
from shoal.runtime import measure
from shoal.runtime.errors import BusyError
from shoal.runtime.session import open_graph

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))
from make_split import split  # noqa: E402


@pytest.mark.parametrize(
    "devices, streams, seconds", [(12, 12, 3.0), pytest.param(64, 32, 60.0, marks=pytest.mark.deep)]
)
def test_no_answer_is_lost_under_load(devices, streams, seconds, tmp_path, record_property):
    made = split()
    digest = pack_tail(made.tail, tmp_path / "t.shoal", "cats")
    latents = np.random.default_rng(2).random((devices, 16, 8, 8), np.float32)
    with open_graph(made.tail, {}, threads=1) as tail:
        expected = tail.run({"latent": latents})["logits"]

    async def main():
        async with running(tmp_path, tmp_path / "t.shoal") as edge:
            known = [Device(edge, tmp_path / str(index), f"d{index}") for index in range(devices)]
            connections = [await device.dial() for device in known]
            room, took, refused, marks = asyncio.Semaphore(streams), [], 0, []
            end = time.monotonic() + seconds

            async def work(index: int) -> None:
                nonlocal refused
                while time.monotonic() < end:
                    async with room:
                        began = time.monotonic()
                        try:
                            _, found = await infer(connections[index], digest, latents[index : index + 1])
                        except BusyError:
                            refused += 1
                            continue
                        np.testing.assert_allclose(found["logits"], expected[index : index + 1], atol=1e-4)
                        took.append(time.monotonic() - began)

            async def watch() -> None:
                while time.monotonic() < end:
                    await asyncio.sleep(seconds / 12)
                    marks.append((measure.anonymous_bytes() or 0, len(os.listdir("/proc/self/fd"))))

            async with asyncio.TaskGroup() as group:
                group.create_task(watch())
                for index in range(devices):
                    group.create_task(work(index))
            counted = edge.snapshot()["requests"]
            assert counted["done"] == len(took) > 0 and counted["busy"] == refused
            assert counted["failed"] == counted["late"] == counted["running"] == 0
            model = edge.snapshot()["models"][0]
            figures = {
                "answers": len(took), "refused": refused, "median_ms": 1000 * float(np.median(took)),
                "p95_ms": 1000 * float(np.percentile(took, 95)), "batch": model["served"] / model["batches"],
                "grew_bytes": marks[-1][0] - marks[3][0],
            }  # fmt: skip
            print(figures)
            for name, value in figures.items():
                record_property(name, value)
            assert marks[-1][1] <= marks[3][1] + 2
            assert figures["grew_bytes"] < (8 << 20)
            for connection in connections:
                await connection.close()

    asyncio.run(main())
