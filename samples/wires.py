"""What a sample needs of wires: a serial cable of two pseudo-terminals, and a TCP wire, each of which can be cut.

    cable = Cable(baud=921_600)     # cable.a and cable.b are serial ports, as /dev/ttyUSB0 is one
    wire = Wire(port)               # wire.port leads to `port` of this machine
    cable.cut(), cable.mend()

They need POSIX and know nothing about what they carry.
"""

import contextlib
import os
import pty
import socket
import threading
import time
import tty


class Cable:
    """Joins the serial ports `a` and `b`, at the pace of `baud`. While it is cut, what is written is lost."""

    def __init__(self, baud: int = 921_600):
        self.baud, self.whole = baud, True
        ends = [pty.openpty() for _ in range(2)]
        for _, port in ends:
            tty.setraw(port)  # it stays open here, so that a side may close it and come back
        self.a, self.b = (os.ttyname(port) for _, port in ends)
        for (source, _), (sink, _) in (ends, ends[::-1]):
            threading.Thread(target=self._carry, args=(source, sink), daemon=True).start()

    def cut(self) -> None:
        self.whole = False

    def mend(self) -> None:
        self.whole = True

    def _carry(self, source: int, sink: int) -> None:
        free = 0.0  # when the line has sent what it was given
        while data := os.read(source, 512):
            free = max(free, time.monotonic()) + 10 * len(data) / self.baud  # a byte is ten bits
            time.sleep(max(0.0, free - time.monotonic()))
            while data and self.whole:
                data = data[os.write(sink, data) :]


class Wire:
    """Leads from `port`, which it chooses, to port `there`. While it is cut, connections break and none is made."""

    def __init__(self, there: int):
        self._there, self._open, self.whole = there, set[socket.socket](), True
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._listen, daemon=True).start()

    def cut(self) -> None:
        self.whole = False
        for end in list(self._open):
            self._shut(end)

    def mend(self) -> None:
        self.whole = True

    def _listen(self) -> None:
        while True:
            here, _ = self._listener.accept()
            if not self.whole:
                here.close()
                continue
            there = socket.create_connection(("127.0.0.1", self._there))
            self._open |= {here, there}
            for source, sink in ((here, there), (there, here)):
                threading.Thread(target=self._carry, args=(source, sink), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                sink.sendall(data)
        for end in (source, sink):
            self._shut(end)
            self._open.discard(end)

    def _shut(self, end: socket.socket) -> None:
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads it
