-- Reconciliations: the cost of a day as reported by a provider, compared with our records.
--
-- The newest result of each upstream, day and model is kept, and the audit has the upstream of each
-- call.

-- The upstream of the call, since a job's pool is that of its queue. Null in rows of an older version.
ALTER TABLE audit ADD COLUMN upstream text;

-- verdict: equal, explained or unexplained. calls: those that explain a difference, with the cost before
-- and after its correction.
CREATE TABLE reconciliations (
    upstream text NOT NULL,
    day date NOT NULL,
    model text NOT NULL,
    provider text NOT NULL,
    ours_micros bigint NOT NULL,
    theirs_micros bigint NOT NULL,
    verdict text NOT NULL,
    reason text NOT NULL DEFAULT '',
    calls jsonb NOT NULL DEFAULT '[]',
    reconciled_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (upstream, day, model)
);
CREATE INDEX reconciliations_day ON reconciliations (day);
