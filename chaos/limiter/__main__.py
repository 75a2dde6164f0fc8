"""`python -m chaos.limiter --seconds 60`: one fault after another, and the truth after each.

Each fault has a Valkey and workers of its own, and is done again and again while its share of the
time lasts, at least once. Ends with a table of what was done, how many calls were open at the most,
how long the permits took to be used again, and with 1 if a promise was broken.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import sys

from chaos.limiter.faults import FAULTS
from chaos.limiter.play import play
from chaos.limiter.report import table
from chaos.limiter.scene import SMALL, Size


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m chaos.limiter", description=__doc__)
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="how long faults are done, all together"
    )
    parser.add_argument(
        "--fault", choices=FAULTS, action="append", help="only this one; may be given again"
    )
    parser.add_argument("--small", action="store_true", help="one round each, of a small size")
    parser.add_argument("--seed", type=int, help="of what is left to chance")
    return parser.parse_args()


async def main() -> int:
    arguments = read_arguments()
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().randrange(2**32)
    names = arguments.fault or list(FAULTS)
    size, rounds = (SMALL, 1) if arguments.small else (Size(), None)
    print(f"seed {seed}", flush=True)
    outcomes = []
    for name in names:
        chance = random.Random(f"{seed} {name}")
        seconds = arguments.seconds / len(names)
        outcome = await play(name, size, seconds, chance, rounds=rounds)
        outcomes.append(outcome)
        word = "left out" if outcome.left_out else "BROKEN" if outcome.problems else "kept"
        print(f"{word:8} {name}", *outcome.problems, sep="\n         ", flush=True)
    print(f"\n{table(outcomes)}")
    return 1 if any(outcome.problems for outcome in outcomes) else 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(asyncio.run(main()))
