-- Upstream of the last call that was begun of a job or of a line of a batch.
--
-- Where its process dies, the record says at which upstream the call may have cost something.

-- Null in what an older version begins.
ALTER TABLE requests ADD COLUMN upstream text;
ALTER TABLE batch_lines ADD COLUMN upstream text, ADD COLUMN model text;
