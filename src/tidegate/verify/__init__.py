"""The promises, checked against this installation: its Valkey, its PostgreSQL, its network.

Everything happens in pools and of a tenant that are made for it and removed after it; the provider
is the emulator, on a free port of loopback. So nothing of anybody else's is read, written or
called, and the load is bounded: see `plan`.

    promises   what was promised, what was measured, and whether it was kept
    plan       how long and how much
    probe      a process that wants permits without end, and calls the emulator under each
    probes     starts, pauses and kills them, and hears what they do
    limiting   the limiter's promises; latencies those on time
    jobber     a worker of the job path in a pool of its own
    working    the job path's promises
    run        all of it, and the cleaning up
    words      the report, for a terminal and for a runbook
"""
