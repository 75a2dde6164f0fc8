-- Authors of keys, and the spent one-time codes of the dashboard.

-- NULL: created without authentication, or before authors were recorded.
ALTER TABLE keys ADD COLUMN made_by text;

CREATE TABLE spent_codes (
    nonce bytea PRIMARY KEY,
    ends_at timestamptz NOT NULL,
    spender bytea NOT NULL
);
