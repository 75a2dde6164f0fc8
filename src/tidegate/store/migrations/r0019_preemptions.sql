-- Counts of preempted calls of jobs and batch lines.

-- An older version does not change them.
ALTER TABLE requests ADD COLUMN preemptions integer NOT NULL DEFAULT 0;
ALTER TABLE batch_lines ADD COLUMN preemptions integer NOT NULL DEFAULT 0;
