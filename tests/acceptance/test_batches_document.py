"""The program of docs/batches.md, run as it stands: only host and port differ."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.product import Product

pytest_plugins = ["tests.product"]

DOCUMENT = Path(__file__).parents[2] / "docs" / "batches.md"


def test_the_program_prints_the_custom_ids(product: Product) -> None:
    (program,) = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(), re.M | re.S)
    done = subprocess.run(
        [sys.executable, "-c", program.replace("localhost:8000", product.place)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.stdout.split(), done.stderr) == (["word-0", "word-1", "word-2"], "")
