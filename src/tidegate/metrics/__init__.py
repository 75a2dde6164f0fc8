"""What Prometheus is told: see docs/observability.md.

`names` spells all metrics; `tally` gathers what happens at little cost; `instruments` hands it to
prometheus-client; `calls`, `limiting` and `process` say what happens in this process; `standing`
reads what is true of all processes together; `exposition` answers a scrape.
"""
