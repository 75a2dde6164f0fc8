-- Indexes of requests that no statement reads: each was written with a job, or looked at whenever a
-- statement was planned. The version before counts a tenant's jobs by `requests_place` without
-- `requests_ready`.
DROP INDEX IF EXISTS requests_ripening, requests_deadline, requests_cancelling, requests_claimed,
    requests_ready;
