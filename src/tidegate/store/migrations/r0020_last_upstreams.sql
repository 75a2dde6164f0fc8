-- Upstream of the last call begun of a job or a batch line.
--
-- If its process dies, this is the upstream at which the call may have cost something.

-- Null in calls begun by an older version.
ALTER TABLE requests ADD COLUMN upstream text;
ALTER TABLE batch_lines ADD COLUMN upstream text, ADD COLUMN model text;
