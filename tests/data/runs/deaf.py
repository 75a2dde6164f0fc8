"""A test for a run that was started deaf to Ctrl-C, as a background shell starts its programs."""

import subprocess
import sys

_ASKS = "import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"


def test_a_child_hears_sigint() -> None:
    done = subprocess.run([sys.executable, "-c", _ASKS], capture_output=True, check=True)
    assert done.stdout == b"True\n"
