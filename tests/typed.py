"""`tidegate` for shell lines of tests, without the half second that each command takes to import.

The folder of `commands()` comes first on the PATH of a shell. What is in it hands its arguments,
folder, environment and open files to this process, which has them done by `tests/forked.py`, and
ends as the command ends.
"""

from __future__ import annotations

import atexit
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from functools import cache
from pathlib import Path

from tests.forked import started

_LONGEST_ORDER = 1 << 18
_LONGEST_COMMAND_S = 80.0
_PROGRAM = """\
#!{python} -ISE
import json, os, socket, sys

with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as to_tests:
    to_tests.connect({address!r})
    order = {{"arguments": sys.argv[1:], "cwd": os.getcwd(), "env": dict(os.environ)}}
    socket.send_fds(to_tests, [json.dumps(order).encode()], [0, 1, 2])
    sys.exit(int(to_tests.recv(16) or b"1"))
"""


@cache
def commands() -> str:
    """The folder, for the whole run of this process."""
    if platform.system() != "Linux":
        return str(Path(sys.executable).parent)
    folder = tempfile.mkdtemp(prefix="typed")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    address = f"{folder}/orders"
    program = Path(folder, "tidegate")
    program.write_text(_PROGRAM.format(python=sys.executable, address=address))
    program.chmod(0o755)
    orders = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    orders.bind(address)
    orders.listen()
    threading.Thread(target=_take, args=[orders], daemon=True).start()
    return folder


def _take(orders: socket.socket) -> None:
    while True:
        order, _ = orders.accept()
        threading.Thread(target=_do, args=[order], daemon=True).start()


def _do(orders: socket.socket) -> None:
    with orders:
        data, files, _, _ = socket.recv_fds(orders, _LONGEST_ORDER, 3)
        order = json.loads(data)
        with (
            os.fdopen(files[0], "rb") as stdin,
            os.fdopen(files[1], "wb") as stdout,
            os.fdopen(files[2], "wb") as stderr,
        ):
            process = started(
                ["tidegate", *order["arguments"]],
                cwd=Path(order["cwd"]),
                env=order["env"],
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
            )
            try:
                code = process.wait(_LONGEST_COMMAND_S)
            except subprocess.TimeoutExpired:
                process.kill()
                code = process.wait()
        orders.send(str(code if code >= 0 else 128 - code).encode())
