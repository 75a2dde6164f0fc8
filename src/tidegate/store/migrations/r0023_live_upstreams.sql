-- Upstreams that are changed while running: revisions of the changes, and who follows them.
--
-- An older version reads neither: it goes on with what its file says until it is replaced.

-- upstreams: all live changes, by name; no secret is in them. in_force_at: null while it is
-- proposed, and for good where a process could not follow it: `refused` says why.
CREATE TABLE upstream_revisions (
    revision bigint PRIMARY KEY,
    upstreams jsonb NOT NULL,
    action text NOT NULL,
    set_by text NOT NULL,
    reason text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    in_force_at timestamptz,
    refused text
);

-- revision: in force there. prepared: what it could put in force. problems: of upstreams that it
-- can't make, by name; proposed_problems: of those of the prepared revision.
CREATE TABLE upstream_processes (
    instance_id text PRIMARY KEY,
    role text NOT NULL,
    revision bigint NOT NULL,
    prepared bigint NOT NULL,
    problems jsonb NOT NULL,
    proposed_problems jsonb NOT NULL,
    seen_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
