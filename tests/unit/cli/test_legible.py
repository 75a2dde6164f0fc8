"""What comes from elsewhere cannot command the terminal that it is shown on."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

from tidegate.cli.terminal import legible

EVIL = "a\x1b]0;title\x07b\x1b[2Jc\x9b1m\td\n日本語 👩‍👧"
SAFE = "a\\x1b]0;title\\x07b\\x1b[2Jc\\x9b1m\td\n日本語 👩‍👧"
SHOW = f"""
from tidegate.cli.client import show_answer
show_answer({{"text": {EVIL!r}, "status": "succeeded"}})
"""


@pytest.mark.parametrize(("text", "shown"), [(EVIL, SAFE), ("a\r\nb", "a\nb"), ("a\rb", "a\\x0db")])
def test_controls_are_seen_and_not_obeyed(text: str, shown: str) -> None:
    assert legible(text) == shown


def test_an_answer_is_safe_on_a_terminal_and_whole_in_a_file() -> None:
    leader, follower = pty.openpty()
    subprocess.run([sys.executable, "-c", SHOW], stdout=follower, check=True, timeout=60)
    os.close(follower)
    shown = os.read(leader, 10_000).decode().replace("\r\n", "\n")
    os.close(leader)
    assert shown.expandtabs() == f"{SAFE}\n".expandtabs()
    kept = subprocess.run([sys.executable, "-c", SHOW], capture_output=True, check=True, timeout=60)
    assert kept.stdout.decode() == f"{EVIL}\n"
