-- Upstreams that change at run time: revisions of the changes, and the processes that apply them.
--
-- An older version reads neither: it uses its file until it is replaced.

-- upstreams: all live changes, by name, without secrets. in_force_at: null while the revision is
-- proposed, and for good if a process could not apply it, for the reason `refused`.
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

-- revision: the one in force in the process. prepared: the one it could put in force. problems: of
-- upstreams that it cannot create, by name. proposed_problems: those of the prepared revision.
CREATE TABLE upstream_processes (
    instance_id text PRIMARY KEY,
    role text NOT NULL,
    revision bigint NOT NULL,
    prepared bigint NOT NULL,
    problems jsonb NOT NULL,
    proposed_problems jsonb NOT NULL,
    seen_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
