-- Sums of usage of past days: totals by tenant and by model, and the request log by API key and by
-- upstream.
--
-- They are valid if the day is in `summed_days` and has no row in `changed_days`; see `UsageTotals` in
-- store/statistics.py. Processes of this version fill them; the triggers record the writes of every
-- version.

CREATE TABLE summed_days (
    day date PRIMARY KEY,
    summed_at timestamptz NOT NULL DEFAULT now()
);

-- Past days whose usage was added, corrected or deleted, by transaction. Rows are only inserted, so that
-- writers do not wait for each other; a process that sums up a day first deletes the rows that it sees.
CREATE TABLE changed_days (
    day date NOT NULL,
    xid xid8 NOT NULL DEFAULT pg_current_xact_id(),
    PRIMARY KEY (day, xid)
);

-- `level` names the grouping; columns that are not part of it are ''. Of `usage_days`: tenant; model. Of
-- the calls in `audit` that were received on `day` and count for `ended_day`: key (tenant_id, key_id);
-- upstream; tenant_upstream.
CREATE TABLE usage_sums (
    day date NOT NULL,
    level text NOT NULL
        CHECK (level IN ('tenant', 'model', 'key', 'upstream', 'tenant_upstream')),
    ended_day date NOT NULL,
    tenant_id text NOT NULL DEFAULT '',
    model text NOT NULL DEFAULT '',
    key_id text NOT NULL DEFAULT '',
    upstream text NOT NULL DEFAULT '',
    requests bigint NOT NULL,
    input_tokens bigint NOT NULL,
    output_tokens bigint NOT NULL,
    cached_tokens bigint NOT NULL,
    thoughts_tokens bigint NOT NULL,
    images bigint NOT NULL,
    cost_micros bigint NOT NULL,
    unpriced bigint NOT NULL,
    partial bigint NOT NULL,
    estimated bigint NOT NULL,
    unknown bigint NOT NULL,
    cache_write_tokens bigint NOT NULL,
    input_audio_tokens bigint NOT NULL,
    input_image_tokens bigint NOT NULL,
    input_video_tokens bigint NOT NULL,
    output_audio_tokens bigint NOT NULL,
    output_image_tokens bigint NOT NULL,
    output_video_tokens bigint NOT NULL,
    searches bigint NOT NULL,
    provider_cost_micros bigint NOT NULL
);
CREATE INDEX usage_sums_day ON usage_sums (day, level);

CREATE FUNCTION audit_day_changed() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        INSERT INTO changed_days (day)
        VALUES ((coalesce(NEW.created_at, OLD.created_at) AT TIME ZONE 'UTC')::date)
        ON CONFLICT DO NOTHING;
        RETURN NULL;
    END
    $$;
CREATE FUNCTION usage_day_changed() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        INSERT INTO changed_days (day) VALUES (coalesce(NEW.day, OLD.day)) ON CONFLICT DO NOTHING;
        RETURN NULL;
    END
    $$;
-- Only for a day that was over when the transaction began: a row of today costs just this comparison.
CREATE TRIGGER audit_day_gets_more AFTER INSERT ON audit FOR EACH ROW
    WHEN (NEW.created_at < date_trunc('day', now(), 'UTC'))
    EXECUTE FUNCTION audit_day_changed();
CREATE TRIGGER audit_day_changes AFTER UPDATE OR DELETE ON audit FOR EACH ROW
    WHEN (OLD.created_at < date_trunc('day', now(), 'UTC'))
    EXECUTE FUNCTION audit_day_changed();
CREATE TRIGGER usage_day_gets_more AFTER INSERT OR UPDATE ON usage_days FOR EACH ROW
    WHEN (NEW.day < (now() AT TIME ZONE 'UTC')::date)
    EXECUTE FUNCTION usage_day_changed();
CREATE TRIGGER usage_day_goes AFTER DELETE ON usage_days FOR EACH ROW
    WHEN (OLD.day < (now() AT TIME ZONE 'UTC')::date)
    EXECUTE FUNCTION usage_day_changed();
