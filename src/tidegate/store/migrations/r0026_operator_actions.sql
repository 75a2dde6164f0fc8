-- What operators did. An older version neither reads nor writes it.

-- action_id: of the request or the command, which may do several things. was, is_now: what was
-- changed, without secrets; both null where a history has it under `revision`.
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

-- Rows are added and, once they are old, deleted: the product's own user can do no more by mistake.
CREATE FUNCTION keep_operator_actions() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'DELETE' AND OLD.at < clock_timestamp() - interval '30 days' THEN
        RETURN OLD;
    END IF;
    RAISE EXCEPTION 'actions of operators are never changed, and kept for 30 days at least';
END $$;
CREATE TRIGGER keep_operator_actions BEFORE UPDATE OR DELETE ON operator_actions
    FOR EACH ROW EXECUTE FUNCTION keep_operator_actions();
