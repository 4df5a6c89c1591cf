"""What the daemons and systemd tell each other: units are written for it, and it is told how a daemon fares."""

import os
import socket


def notify(state: str) -> None:
    """Tells systemd `state` (sd_notify(3)), where it has started us; else nothing happens."""
    if path := os.environ.get("NOTIFY_SOCKET"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as to:
            to.connect("\0" + path[1:] if path.startswith("@") else path)
            to.sendall(state.encode())


def quoted(word: str) -> str:
    """A word of a command line as systemd.service(5) wants it."""
    if word and all(letter.isalnum() or letter in "/._-:=@+,[]?" for letter in word):
        return word
    return '"' + word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$") + '"'
