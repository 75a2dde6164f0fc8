-- Reconciliations: what a provider says that a day cost, beside the record.
--
-- The newest of each upstream, day and model is kept, and the record says at which upstream a call was
-- made.

-- The upstream that a call was made at: of a job the pool is that of its queue. Null in what an
-- older version writes.
ALTER TABLE audit ADD COLUMN upstream text;

-- verdict: equal, explained or unexplained. calls: those that explain a difference, with what
-- each was charged before and is now.
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
