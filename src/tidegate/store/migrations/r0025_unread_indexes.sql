-- Drops indexes of requests that no statement reads: each was written with every job, or considered
-- whenever a statement was planned. Without `requests_ready`, the previous version counts a tenant's
-- jobs by `requests_place`.
DROP INDEX IF EXISTS requests_ripening, requests_deadline, requests_cancelling, requests_claimed,
    requests_ready;
