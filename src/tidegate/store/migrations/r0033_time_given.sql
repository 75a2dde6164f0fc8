-- The time that a job was given, in ms, noted when it is requeued and given that time again; null before.
-- The version before gives a job that is requeued once more all the time since it was submitted as well.
ALTER TABLE requests ADD COLUMN given_ms bigint;
