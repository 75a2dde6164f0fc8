-- Upstream of each call of a job, so that its attempts say which account was called.
--
-- Null in what an older version begins.
ALTER TABLE attempts ADD COLUMN upstream text;
