"""The job path: `python -m bench.gateway.jobs` submits jobs and waits until all have succeeded.

Everything is included: HTTP, the rules that decide the kind, the durable insert, the claim, the
limits, the call to an upstream that answers at once, and the record of it. Counted from the first
job's receipt to the last one's end, both as the database has them.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

from bench import machine
from bench.gateway.processes import cpu_ns
from bench.gateway.product import Product
from bench.gateway.programs import Figures, Load, LoadFailed, Upstream

BODY = {"data": "Explain the importance of cybersecurity."}
WARM = 500
# Where the call is a stream: a short answer, whose events come at once.
CHUNKS = 2
AT_ONCE = 64
GIVE_UP_S = 120.0
READY_S = 60.0
_POLL_S = 0.02


class NotDone(Exception):
    """The jobs did not all succeed; the message says how far they came."""


def measure(count: int, apis: int, workers: int) -> Figures:
    """Jobs a second, and what each role's processes used for one. Raises NotDone."""
    with (
        tempfile.TemporaryDirectory() as folder,
        Upstream() as upstream,
        Product(upstream.url, apis=apis, workers=workers) as product,
    ):
        body = Path(folder) / "body.json"
        body.write_text(json.dumps(BODY))
        upstream.behave(chunks=CHUNKS, gap_ms=0)
        await_ready(product, body)
        submit(product, body, WARM)
        await_calls(product, upstream, WARM + 1)
        upstream.behave(chunks=CHUNKS, gap_ms=0)
        since = product.query("SELECT now() AS now")[0]["now"]
        before_ns, busy_ns, upstream_ns = product.cpu_ns(), machine.busy_ns(), _cpu(upstream)
        began_s = time.monotonic()
        submitted = submit(product, body, count)
        await_calls(product, upstream, count)
        took_s = time.monotonic() - began_s
        after_ns, after_busy_ns = product.cpu_ns(), machine.busy_ns()
        upstream_ns = _cpu(upstream) - upstream_ns
        rows = product.query(
            "SELECT count(*), min(created_at), max(finished_at), "
            "count(*) FILTER (WHERE classified_by = 'rules') AS ruled, "
            "percentile_cont(0.5) WITHIN GROUP (ORDER BY finished_at - created_at) AS p50 "
            f"FROM requests WHERE status = 'succeeded' AND created_at >= '{since.isoformat()}'"
        )
        most = upstream.stats()["max_in_flight"]
    row = rows[0]
    if row["count"] != count:
        raise NotDone(f"{row['count']} of {count} succeeded")
    span_s = (row["max"] - row["min"]).total_seconds()
    used_ns = {role: after_ns[role] - before_ns[role] for role in after_ns}
    ours_ns = sum(used_ns.values()) + upstream_ns + round(submitted["cpu_s"] * 1e9)
    others = (after_busy_ns - busy_ns - ours_ns) / (took_s * 1e9 * (os.cpu_count() or 1))
    return {
        "jobs": count,
        "apis": apis,
        "workers": workers,
        "per_s": count / span_s,
        "submits_per_s": submitted["completed"] / submitted["all_seconds"],
        "submit_p99_ms": submitted["p99_ms"],
        "median_s": row["p50"].total_seconds(),
        "by_rules": row["ruled"],
        "most_in_flight": most,
        "others": max(0.0, others),
        **{f"{role}_us": ns / count / 1000 for role, ns in used_ns.items()},
    }


def submit(product: Product, body: Path, count: int) -> Figures:
    """Hand in so many jobs, as fast as they are taken. Raises NotDone."""
    load = Load(
        product.port, "/submit", body, requests=count, connections=AT_ONCE, seconds=GIVE_UP_S
    )
    found = load.figures()
    if found["ok"] != count:
        raise NotDone(f"{found['ok']} of {count} submits accepted: {found['said']}")
    return found


def await_calls(product: Product, upstream: Upstream, count: int) -> None:
    """Until the upstream has answered so many calls and their jobs have ended. Raises NotDone."""
    deadline_s = time.monotonic() + GIVE_UP_S
    while (answered := upstream.stats()["answers"]) < count:
        if time.monotonic() > deadline_s:
            raise NotDone(f"the upstream has answered {answered} of {count} calls")
        time.sleep(_POLL_S)
    pending = "SELECT count(*) FROM requests WHERE status IN ('queued', 'running')"
    while left := product.query(pending)[0]["count"]:
        if time.monotonic() > deadline_s:
            raise NotDone(f"{left} of {count} jobs do not end")
        time.sleep(_POLL_S)


def await_ready(product: Product, body: Path) -> None:
    deadline_s = time.monotonic() + READY_S
    while True:
        try:
            submit_one = Load(product.port, "/submit", body, requests=1, connections=1, seconds=0.5)
            if submit_one.figures()["ok"] == 1:
                return
        except LoadFailed:
            pass
        if time.monotonic() > deadline_s or not product.program.alive:
            raise NotDone(f"the product did not start: {product.program.said()}")
        time.sleep(0.1)


def _cpu(upstream: Upstream) -> int:
    return cpu_ns([upstream.pid])


def said(figures: Figures) -> str:
    costs = ", ".join(
        f"{role} {figures[f'{role}_us']:.0f}" for role in ("serve", "worker", "postgres", "valkey")
    )
    return (
        f"{figures['jobs']} jobs, {figures['apis']} API and {figures['workers']} worker "
        f"process(es): {figures['per_s']:.0f} jobs/s from submit to succeeded "
        f"({figures['by_rules']} decided by rules), submits {figures['submits_per_s']:.0f}/s "
        f"with p99 {figures['submit_p99_ms']:.0f} ms; median {figures['median_s']:.2f} s, most in "
        f"flight {figures['most_in_flight']}; CPU us a job: {costs}; "
        f"other work {figures['others']:.0%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gateway.jobs", description=__doc__)
    parser.add_argument("--jobs", type=int, default=5000)
    parser.add_argument("--apis", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    print(said(measure(options.jobs, options.apis, options.workers)))


if __name__ == "__main__":
    main()
