"""The job path: `python -m bench.gateway.jobs` submits jobs and waits until all have succeeded.

Everything is included: HTTP, the rules that decide the kind, the durable insert, the claim, the
limits, the call to an upstream that answers at once, and the record of it. Counted from the first
job's receipt to the last one's end, both as the database has them. `--lines N` measures a batch of
N lines instead, from its creation to its end, and native calls at 50 a second all the while.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from bench import machine
from bench.gateway.processes import cpu_ns
from bench.gateway.product import Product
from bench.gateway.programs import Figures, Load, LoadFailed, Upstream

MODEL = "gemini-2.5-flash"
BODY = {"data": "Explain the importance of cybersecurity."}
CALL = {"model": MODEL, "messages": [{"role": "user", "content": BODY["data"]}]}
WARM = 500
# Where the call is a stream: a short answer, whose events come at once.
CHUNKS = 2
AT_ONCE = 64
GIVE_UP_S = 120.0
# Of batch lines: slower than this is given up.
LEAST_PER_S = 100.0
NATIVE_PER_S = 50.0
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
        wal_bytes, valkey_reads = product.wal_bytes(), product.valkey_reads()
        began_s = time.monotonic()
        submitted = submit(product, body, count)
        await_calls(product, upstream, count)
        took_s = time.monotonic() - began_s
        after_ns, after_busy_ns = product.cpu_ns(), machine.busy_ns()
        upstream_ns = _cpu(upstream) - upstream_ns
        wal_bytes = product.wal_bytes() - wal_bytes
        valkey_reads = product.valkey_reads() - valkey_reads
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
        "wal_bytes": wal_bytes / count,
        "valkey_reads": valkey_reads / count,
        "others": max(0.0, others),
        **{f"{role}_us": ns / count / 1000 for role, ns in used_ns.items()},
    }


def measure_batch(lines: int, apis: int, workers: int) -> Figures:
    """Lines a second, and the times of native calls from the batch's creation to its end. Raises
    NotDone."""
    with (
        tempfile.TemporaryDirectory() as folder,
        Upstream() as upstream,
        Product(upstream.url, apis=apis, workers=workers) as product,
    ):
        body, native = Path(folder) / "body.json", Path(folder) / "native.json"
        body.write_text(json.dumps(BODY))
        native.write_text(json.dumps(CALL))
        upstream.behave(chunks=CHUNKS, gap_ms=0)
        await_ready(product, body)
        of_batch(product, uploaded(product, CALL, WARM), WARM)
        file = uploaded(product, CALL, lines)
        before_ns, wal_bytes = product.cpu_ns(), product.wal_bytes()
        within_s = GIVE_UP_S + lines / LEAST_PER_S
        load = Load(
            product.port,
            "/v1/chat/completions",
            native,
            rate=NATIVE_PER_S,
            connections=16,
            seconds=within_s,
        )
        try:
            took_s = of_batch(product, file, lines)
            used_ns = {role: ns - before_ns[role] for role, ns in product.cpu_ns().items()}
            wal_bytes = product.wal_bytes() - wal_bytes
            meanwhile = load.end()
        finally:
            load.stop()
    if meanwhile["ok"] < meanwhile["sent"]:
        raise NotDone(f"{meanwhile['ok']} of {meanwhile['sent']} calls: {meanwhile['said']}")
    return {
        "lines": lines,
        "apis": apis,
        "workers": workers,
        "per_s": lines / took_s,
        "native_calls": meanwhile["ok"],
        "native_s": meanwhile["all_seconds"],
        "native_p50_ms": meanwhile["p50_ms"],
        "native_p99_ms": meanwhile["p99_ms"],
        "wal_bytes": wal_bytes / lines,
        **{f"{role}_us": ns / lines / 1000 for role, ns in used_ns.items()},
    }


def uploaded(product: Product, call: Mapping[str, Any], lines: int) -> str:
    """The id of a file of so many lines."""
    line = {"method": "POST", "url": "/v1/chat/completions", "body": call}
    file = "\n".join(json.dumps({"custom_id": f"l{n}", **line}) for n in range(lines))
    mark = "of-the-bench"
    form = (
        f'--{mark}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--{mark}\r\n'
        'Content-Disposition: form-data; name="file"; filename="in.jsonl"\r\n\r\n'
        f"{file}\r\n--{mark}--\r\n"
    )
    made = _asked(product, "/v1/files", form, f"multipart/form-data; boundary={mark}")
    return str(made["id"])


def of_batch(product: Product, file: str, lines: int) -> float:
    """Seconds from the creation of a batch to its end. Raises NotDone."""
    wanted = {
        "input_file_id": file,
        "endpoint": "/v1/chat/completions",
        "completion_window": "24h",
    }
    began_s = time.monotonic()
    batch = _asked(product, "/v1/batches", json.dumps(wanted))
    within_s = GIVE_UP_S + lines / LEAST_PER_S
    while batch["status"] != "completed":
        if time.monotonic() - began_s > within_s or batch["status"] == "failed":
            raise NotDone(f"the batch is {batch['status']}: {batch}")
        time.sleep(0.1)
        batch = _asked(product, f"/v1/batches/{batch['id']}")
    if batch["request_counts"]["completed"] != lines:
        raise NotDone(f"of {lines} lines {batch['request_counts']}")
    return time.monotonic() - began_s


def _asked(
    product: Product, path: str, body: str | None = None, kind: str = "application/json"
) -> dict[str, Any]:
    data = None if body is None else body.encode()
    url = f"http://127.0.0.1:{product.port}{path}"
    with urlopen(Request(url, data, {"Content-Type": kind}), timeout=GIVE_UP_S) as answer:
        found: dict[str, Any] = json.load(answer)
        return found


def submit(product: Product, body: Path, count: int) -> Figures:
    """Submit so many jobs at full speed. Raises NotDone."""
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
        f"flight {figures['most_in_flight']}; CPU us a job: {costs}; WAL a job: "
        f"{figures['wal_bytes'] / 1000:.1f} kB, round trips to Valkey: "
        f"{figures['valkey_reads']:.2f}; other work {figures['others']:.0%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gateway.jobs", description=__doc__)
    parser.add_argument("--jobs", type=int, default=5000)
    parser.add_argument("--apis", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--lines", type=int, help="measure a batch of so many lines")
    options = parser.parse_args()
    if options.lines:
        figures = measure_batch(options.lines, options.apis, options.workers)
        print(", ".join(f"{name} {figure:,.1f}" for name, figure in figures.items()))
        return
    print(said(measure(options.jobs, options.apis, options.workers)))


if __name__ == "__main__":
    main()
