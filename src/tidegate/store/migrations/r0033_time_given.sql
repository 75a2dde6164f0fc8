-- The time given to a job in ms, stored when it is requeued and given that time again; null before. If
-- the previous version requeues such a job, its time also includes the time since its submission.
ALTER TABLE requests ADD COLUMN given_ms bigint;
