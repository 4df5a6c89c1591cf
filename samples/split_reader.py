"""A reader that chooses how well to send a line, by the time it has: python3 samples/split_reader.py

Makes .venv and fetches a real network and a real photograph, as edge_camera.py does. The network is cut in two; what
goes between is coded in 2, 4 or 8 bits a number, with tables fitted to three lines of the page. The device pairs with
its edge over a serial cable (two pseudo-terminals, 460,800 baud), its agent keeps the link, and a client in the app
reads the other lines with less and less time: it sends in the most accurate mode that is in time, and reads by itself
where none is.
"""

import asyncio
import logging
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from environment import enter

BITS = (2, 4, 8)
DEADLINES = (6.0, 4.0, 2.0, 1.0, 0.5, 0.25, 0.1)  # seconds
SHAPE = (480, 1, 96)  # of what goes between


def split(source: Path, device: Path, edge: Path, lines: list) -> None:
    """Writes both bundles. A mode's accuracy is how many letters it reads as the uncut network does, on lines that its
    tables were not fitted to."""
    import numpy as np

    from reader import CUT, HEIGHT, LETTERS, WIDTH
    from shoal.converters.sources.onnx import graph
    from shoal.converters.split.graph import Node, halves
    from shoal.converters.split.tail import pack, pack_tail
    from shoal.converters.split.write import write
    from shoal.runtime.session import open_graph
    from shoal.runtime.split.codec import Codec
    from shoal.runtime.split.quantise import Quantiser
    from shoal.runtime.split.tables import Tables

    whole = graph(source)
    letters = Node("letters", "ArgMax", (LETTERS,), ("letters",), {"axis": 2, "keepdims": 0})
    whole = replace(whole, nodes=(*whole.nodes, letters), outputs=("letters",))
    image = {whole.inputs[0].name: (None, 3, HEIGHT, WIDTH)}
    cut = {CUT: (None, *SHAPE)}
    before, behind = halves(whole, CUT)
    head, tail = (write(half, dims={**image, **cut}, names={CUT: "latent"}) for half in (before, behind))

    modes, codecs = [], {}
    with open_graph(head, {}) as encoder, open_graph(tail, {}) as reader:
        (latents,) = encoder.run({next(iter(image)): np.concatenate(lines)}).values()
        (right,) = reader.run({"latent": latents[3:]}).values()
        for number, bits in enumerate(BITS, 1):
            tables = Tables.fit(Quantiser.fit(latents[:3], bits, per_channel=False), latents[:3], np.zeros(480, int))
            codec, codecs[f"b{bits}"] = Codec(tables, SHAPE), tables.to_bytes()
            messages = [codec.encode(one[None]) for one in latents[3:]]
            (read,) = reader.run({"latent": np.concatenate([codec.decode(one) for one in messages])}).values()
            known = right > 0  # where the uncut network sees a letter
            modes.append({"id": number, "codec": f"b{bits}", "bits": bits, "bytes": sum(map(len, messages)) // 3,
                          "accuracy": round(float((read == right)[known].mean()), 4)})  # fmt: skip
    pack({"head": head, "tail": tail}, device, "reader", modes=modes, codecs=codecs)
    pack_tail(tail, edge, "reader", modes=modes, codecs=codecs)
    for mode in modes:
        size, share = f"{mode['bytes']:6,}", f"{mode['accuracy']:.1%}"
        print(f"mode {mode['id']}: {mode['bits']} bits, {size} bytes, {share} of the letters")


async def main(folder: Path) -> None:
    from models import fetch
    from reader import cut_in_two, frames
    from shoal.device_agents import endpoint
    from shoal.device_agents.agent import Agent
    from shoal.device_agents.edge import Edge
    from wires import Cable

    device, served, cable = folder / "device.shoal", folder / "edge.shoal", Cable(baud=460_800)
    source, lines = fetch("reader"), frames(fetch("page"))
    known = cut_in_two(source, folder / "a.shoal", folder / "b.shoal")
    await asyncio.to_thread(split, source, device, served, lines)
    edge = Edge(folder / "edge", [f"serial:{cable.b}?baud={cable.baud}"], name="desk")
    edge.store.add(served)
    await edge.start()
    try:
        window = edge.open_window()  # a person would carry this code over
        address = f"serial:{cable.a}?baud={cable.baud}"
        agent = Agent(folder / "device", address, name="camera", models={"reader": device})
        await endpoint.pair(address, window.code, agent.identity, agent.peers)
        async with agent:
            while not (agent.status()["agreement"] or {}).get("tail"):
                await asyncio.sleep(0.05)
            await asyncio.to_thread(read, device, folder / "device" / "agent.sock", lines[3:], known)
    finally:
        await edge.stop(1.0)


def read(device: Path, socket: Path, lines: list, known: list[str]) -> None:
    """The app: it knows its bundle and the agent's socket, and nothing of the cable."""
    from reader import text
    from shoal.device_agents.paired_link import PairedLink
    from shoal.runtime.split.client import Client

    with PairedLink("reader", socket) as link, Client(device, link) as client:
        for number, deadline in enumerate(DEADLINES):
            result = client.run(lines[number % len(lines)], deadline=deadline)
            took, said = 1000 * result.seconds.total, text(result.outputs["letters"][0], known)
            print(
                f"{1000 * deadline:5.0f} ms  {result.where:5} mode {result.mode} {result.bytes:6,} bytes"
                f" {took:5.0f} ms  {said}" + (f"  [{result.why}]" if result.why else "")
            )


if __name__ == "__main__":
    try:
        enter("convert", "agent")
        logging.getLogger("shoal").setLevel(logging.ERROR)
        from models import FetchError
        from shoal import ShoalError

        try:
            with tempfile.TemporaryDirectory() as made:
                asyncio.run(main(Path(made)))
        except (ShoalError, FetchError) as error:
            sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
