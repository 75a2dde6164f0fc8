-- Counts of calls that gave way to higher bands, of jobs and of batch lines.

-- An older version leaves them as they are.
ALTER TABLE requests ADD COLUMN preemptions integer NOT NULL DEFAULT 0;
ALTER TABLE batch_lines ADD COLUMN preemptions integer NOT NULL DEFAULT 0;
