-- Makers of keys, and the spent one-time codes of the dashboard.

-- NULL: nobody was asked for a key when it was made, or it was not recorded who made it.
ALTER TABLE keys ADD COLUMN made_by text;

CREATE TABLE spent_codes (
    nonce bytea PRIMARY KEY,
    ends_at timestamptz NOT NULL,
    spender bytea NOT NULL
);
