-- Upstream of each call of a job, so that attempts name the account that was called.
--
-- Null in calls begun by an older version.
ALTER TABLE attempts ADD COLUMN upstream text;
