"""English text in the public domain, for calibration and for measuring: two files that share no chapter.

Both mix three kinds of writing in pieces of about 3 KB, so that any stretch has all of them:

- fiction: Jane Austen, *Emma* (1815, calibration) and *Northanger Abbey* (1817, held out), Project Gutenberg's
  transcription as Debian's `r-cran-janeaustenr` 1.0.0 carries it;
- essays: the Jargon File 4.4.7 (Debian's `jargon-text`; "this document is in the public domain, to be freely used,
  shared, and modified"), chapters of its introduction (calibration) and of its appendices (held out);
- technical prose with C declarations: SQLite's header `sqlite3.h` 3.40 ("the author disclaims copyright"), its first
  100 KB (calibration) and a later 40 KB (held out).

Paragraphs of the first two were joined into lines, cross-reference braces, tables and listings left out.
"""

from importlib import resources


def _read(name: str) -> str:
    return resources.files(__name__).joinpath(name).read_text("utf-8")


CALIBRATION = _read("calibration.txt")  # 300 KB, about 70,000 tokens
HELDOUT = _read("heldout.txt")  # 140 KB, about 32,000 tokens
