"""`make bench`: every benchmark, one after the other, with the machine they ran on."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

BENCHMARKS = ("bench.limiter", "bench.submit", "bench.dashboard", "bench.gateway")


def main() -> int:
    print(f"{platform.platform()}, Python {platform.python_version()}, {os.cpu_count()} cores")
    failed = 0
    for name in BENCHMARKS:
        print(f"\n{name}", flush=True)
        failed |= subprocess.run([sys.executable, "-m", name], check=False).returncode
    return failed


if __name__ == "__main__":
    sys.exit(main())
