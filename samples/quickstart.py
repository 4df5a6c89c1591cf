"""From nothing to an answer: python3 samples/quickstart.py [PROMPT]

Makes .venv in this checkout and installs shoal there (once), fetches a small real model, converts it to eight bits,
shows what it will use before loading it, streams an answer, and shows how fast that was and what it really used.
"""

import sys

from environment import ROOT, enter

BUNDLE = ROOT / "build" / "SmolLM2-135M-Instruct.int8.shoal"
MEMORY = "300MB"


def main(prompt: str) -> None:
    import shoal
    from models import fetch
    from shoal.options import speeds
    from shoal.show import Show

    with Show() as show:
        if not usable(BUNDLE):
            BUNDLE.parent.mkdir(exist_ok=True)
            report = shoal.convert(fetch("smollm2"), BUNDLE, "int8", overwrite=True, progress=show.progress)
            show.table(report.rows)
        show.line(f"\nBefore loading, of the {MEMORY} it may have:\n{shoal.plan(BUNDLE, memory=MEMORY).table()}\n")
        with shoal.load(BUNDLE, memory=MEMORY, progress=show.progress) as model:
            with model.generate(prompt, max_tokens=200) as answer:
                for token in answer:
                    show.text(token.text)
            show.line(f"\n\n{speeds(answer.stats)}")
            measured = ", ".join(f"{row} {held / 2**20:.1f} MiB" for row, held in model.measure().items() if held)
            show.line(f"measured: {measured}")
        show.line(f"\nGo on with: {ROOT / '.venv/bin/shoal'} chat {BUNDLE}")


def usable(bundle) -> bool:
    """Whether an earlier run left a whole bundle."""
    from shoal.runtime.bundle import Bundle
    from shoal.runtime.errors import ShoalError

    try:
        with Bundle.open(bundle) as opened:
            opened.verify()
        return True
    except ShoalError:
        return False


if __name__ == "__main__":
    try:
        enter("convert")
        from models import FetchError
        from shoal import ShoalError

        try:
            main(" ".join(sys.argv[1:]) or "Why is the sky blue? Answer in two sentences.")
        except (ShoalError, FetchError) as error:
            sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
