-- Actions of operators. An older version neither reads nor writes them.

-- action_id: identifies the request or command, which may cause several actions. was, is_now: what was
-- changed, without secrets; both null if a history has the change under `revision`.
CREATE TABLE operator_actions (
    number bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    action_id uuid NOT NULL,
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    operator text NOT NULL,
    role text NOT NULL,
    address text NOT NULL,
    what text NOT NULL,
    target text NOT NULL,
    was jsonb,
    is_now jsonb,
    revision bigint,
    UNIQUE (action_id, what, target)
);
CREATE INDEX operator_actions_at ON operator_actions (at);

-- Rows are inserted and, once they are old, deleted: the product's own user cannot change them by
-- mistake.
CREATE FUNCTION keep_operator_actions() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'DELETE' AND OLD.at < clock_timestamp() - interval '30 days' THEN
        RETURN OLD;
    END IF;
    RAISE EXCEPTION 'actions of operators are never changed, and kept for 30 days at least';
END $$;
CREATE TRIGGER keep_operator_actions BEFORE UPDATE OR DELETE ON operator_actions
    FOR EACH ROW EXECUTE FUNCTION keep_operator_actions();
