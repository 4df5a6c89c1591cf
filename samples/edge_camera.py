"""A camera that reads a page, over a cable that is cut: python3 samples/edge_camera.py [FRAMES]

Makes .venv and fetches a real network and a real photograph, as quickstart.py does. The device computes the first half
of the network and sends 46 KB a frame; the edge computes the rest. They pair over a serial cable (two pseudo-terminals,
921,600 baud), then work over TCP, then over the cable. After FRAMES frames (3) the link is cut and after as many more
mended; meanwhile the device reads by itself. Every frame says where it was read, how long that took, what the link
carried meanwhile.
"""

import asyncio
import logging
import sys
import tempfile
from pathlib import Path

from environment import ROOT, enter

DEADLINE = 1.5  # seconds in which a frame must be read, by whomever
PAUSE = 0.5  # seconds between two frames


async def main(count: int, folder: Path) -> None:
    from models import fetch
    from reader import cut_in_two, frames
    from shoal.device_agents import endpoint
    from shoal.device_agents.agent import Agent
    from shoal.device_agents.edge import Edge
    from wires import Cable, Wire

    device, tail = ROOT / "build" / "reader.device.shoal", ROOT / "build" / "reader.tail.shoal"
    device.parent.mkdir(exist_ok=True)
    letters, lines, cable = cut_in_two(fetch("reader"), device, tail), frames(fetch("page")), Cable()
    edge = Edge(folder / "edge", ["127.0.0.1:0", f"serial:{cable.b}?baud={cable.baud}"], name="desk")
    edge.store.add(tail)
    await edge.start()
    wire = Wire(edge.addresses[0].port)
    try:
        window = edge.open_window()  # a person would carry this code over
        agent = Agent(folder / "device", f"127.0.0.1:{wire.port}", name="camera", models={"reader": device})
        await endpoint.pair(f"serial:{cable.a}?baud={cable.baud}", window.code, agent.identity, agent.peers)
        async with agent:
            await watch("tcp", agent, wire, lines, letters, count)
        agent = Agent(folder / "device", f"serial:{cable.a}?baud={cable.baud}", models={"reader": device})
        async with agent:
            await watch("serial", agent, cable, lines, letters, count)
    finally:
        await edge.stop(1.0)


async def watch(name: str, agent, link, lines, letters, count: int) -> None:
    """Reads `count` frames, `count` more while the link is cut, and then goes on until the edge has read as many."""
    from reader import text

    number = 0

    async def read() -> bool:
        nonlocal number
        transport = agent.connection.transport if agent.connection else None
        before = (transport.sent, transport.received) if transport else (0, 0)
        answer = await agent.infer({"x": lines[number % len(lines)]}, DEADLINE)
        now = (transport.sent, transport.received) if transport else (0, 0)
        number += 1
        print(
            f"{name:6} {number:2}  {answer.where:5}  {1000 * answer.seconds:4.0f} ms  {now[0] - before[0]:6,} bytes out"
            f"  {now[1] - before[1]:5,} in  {text(answer.outputs['letters'][0], letters)}"
            + (f"  [{answer.why}]" if answer.why else "")
        )
        await asyncio.sleep(PAUSE)
        return answer.where == "edge"

    while not (agent.status()["agreement"] or {}).get("tail"):  # the edge has yet to say what it will do
        await asyncio.sleep(0.05)
    for _ in range(count):
        await read()
    print(f"{name:6}     the link is cut")
    link.cut()
    for _ in range(count):
        await read()
    print(f"{name:6}     the link is mended")
    link.mend()
    while count:
        count -= await read()


if __name__ == "__main__":
    try:
        enter("convert", "agent")
        logging.getLogger("shoal").setLevel(logging.ERROR)  # it is no news that the link breaks
        from models import FetchError
        from shoal import ShoalError

        try:
            with tempfile.TemporaryDirectory() as made:
                asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 3, Path(made)))
        except (ShoalError, FetchError) as error:
            sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
