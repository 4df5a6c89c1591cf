"""One language model on two machines, here in two processes: python3 samples/split_chat.py [PROMPT]

Makes .venv and fetches SmolLM2-135M, as quickstart.py does, and converts it in two parts: blocks 0 to 9 are the
device's, 10 to 29 and the head the edge's. Then it does what a person would in two terminals (shoal edge, shoal edge
pair; shoal pair, shoal agent) and asks the device's agent, as an app does. In the middle of the answer the edge is
killed and started again; the answer goes on.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from environment import ROOT, enter

PARTS = {"0:10": ROOT / "build" / "SmolLM2-135M-Instruct.int8.0-10.shoal",
         "10:30": ROOT / "build" / "SmolLM2-135M-Instruct.int8.10-30.shoal"}  # fmt: skip
SHOAL = [sys.executable, "-m", "shoal"]


def main(prompt: str) -> None:
    convert()
    front, rest = PARTS.values()
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    serve = ["edge", "--name", "desk", "--listen", address, "--memory", "1GB", "--no-discovery"]
    with ExitStack() as stack:
        os.environ["SHOAL_HOME"] = stack.enter_context(tempfile.TemporaryDirectory())
        subprocess.run([*SHOAL, "edge", "add", str(rest)], check=True, stdout=subprocess.DEVNULL)
        edge = start(stack, "listens at", *serve)
        shown = subprocess.Popen([*SHOAL, "edge", "pair", "--json"], stdout=subprocess.PIPE, text=True)
        code = json.loads(read_json(shown))["code"]
        subprocess.run([*SHOAL, "pair", address, code, "--name", "kitchen"], check=True)
        shown.communicate()
        start(stack, "ready for apps", "agent", "--model", f"chat={front}", "--name", "kitchen")
        ask(prompt, lambda: (edge.kill(), start(stack, "listens at", *serve)))


def ask(prompt: str, break_it) -> None:
    """The app: it knows of no edge and no link."""
    from shoal.device_agents.agent import App

    with App() as app:
        print(f"\n> {prompt}")
        for number, piece in enumerate(app.generate(prompt, max_tokens=60), 1):
            print(piece.text, end="", flush=True)
            if number == 20:
                print(" [the edge is killed and started again] ", end="", flush=True)
                break_it()
        link = app.status()
        print(f"\n\n{number} tokens, the last block run by the {piece.where}, {link['edge']}, over {link['link']}")


def convert() -> None:
    """Makes the parts that an earlier run did not leave."""
    import shoal
    from models import fetch
    from quickstart import usable
    from shoal.show import Show

    for blocks, bundle in PARTS.items():
        if not usable(bundle):
            bundle.parent.mkdir(exist_ok=True)
            with Show() as show:
                shoal.convert(fetch("smollm2"), bundle, "int8", blocks=blocks, overwrite=True, check_parity=False,
                              progress=show.progress)  # fmt: skip


def start(stack: ExitStack, ready: str, *words: str) -> subprocess.Popen:
    """A daemon that says `ready` when it is; ended with the stack."""
    log = open(Path(os.environ["SHOAL_HOME"]) / f"{words[0]}.log", "a+")  # noqa: SIM115
    daemon = subprocess.Popen([*SHOAL, *words], stdout=subprocess.PIPE, stderr=log, text=True)
    stack.callback(daemon.wait)
    stack.callback(daemon.terminate)
    assert daemon.stdout is not None
    if not any(ready in line for line in daemon.stdout):
        log.seek(0)
        sys.exit(log.read())
    return daemon


def read_json(process: subprocess.Popen) -> str:
    """The first JSON value that a process prints."""
    text = ""
    assert process.stdout is not None
    for line in process.stdout:
        text += line
        if line.startswith("}"):
            return text
    sys.exit("The edge opened no window.")


if __name__ == "__main__":
    try:
        enter("convert", "agent")
        from models import FetchError
        from shoal import ShoalError

        try:
            main(" ".join(sys.argv[1:]) or "Why is the sky blue? Answer in one sentence.")
        except (ShoalError, FetchError) as error:
            sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
