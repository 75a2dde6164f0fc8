-- Usage is read by one statement: from sums of weeks and of days, and of the current day from sums of its
-- hours that are over.
--
-- The version before reads none of this: it replaces the sums of the current day, which is not in
-- `summed_days`, when it sums the day up, and gives a day whose sums it replaces another time.

-- The sum of whole numbers as a whole number: sum(bigint) computes a numeric, at three times the cost.
-- Null for no rows; an overflow is an error.
CREATE AGGREGATE usage_total(bigint) (sfunc = int8pl, stype = bigint, combinefunc = int8pl, parallel = safe);

-- Days that are not in `summed_days`, of which `usage_sums` has the calls that came before `until`, at the
-- levels of the request log. Valid while no row of `changed_days` is of the day.
CREATE TABLE partial_days (
    day date PRIMARY KEY,
    until timestamptz NOT NULL
);

-- Weeks, by their Mondays, whose sums are those that their days had when they were summed up at these times.
-- Valid while the days are, and have the same times.
CREATE TABLE summed_weeks (
    week date PRIMARY KEY,
    summed_at timestamptz[] NOT NULL
);

-- As `usage_sums`, of the calls that came in a week. What ended in the week itself has its first day as
-- `ended_day`. Sums of 0 are null, which costs readers nothing.
CREATE TABLE usage_weeks (
    week date NOT NULL,
    level text NOT NULL,
    ended_day date NOT NULL,
    tenant_id text NOT NULL,
    model text NOT NULL,
    key_id text NOT NULL,
    upstream text NOT NULL,
    requests bigint,
    input_tokens bigint,
    output_tokens bigint,
    cached_tokens bigint,
    thoughts_tokens bigint,
    images bigint,
    cost_micros bigint,
    unpriced bigint,
    partial bigint,
    estimated bigint,
    unknown bigint,
    cache_write_tokens bigint,
    input_audio_tokens bigint,
    input_image_tokens bigint,
    input_video_tokens bigint,
    output_audio_tokens bigint,
    output_image_tokens bigint,
    output_video_tokens bigint,
    searches bigint,
    provider_cost_micros bigint
);
CREATE INDEX usage_weeks_level ON usage_weeks (level, week, upstream, tenant_id);

CREATE INDEX usage_sums_ended ON usage_sums (level, ended_day, upstream, tenant_id);

-- A day so far is summed up to the start of an hour that was over an hour before. A transaction that began up
-- to ten minutes earlier and writes a call from before that hour is one that this marks.
CREATE OR REPLACE FUNCTION audit_day_changed() RETURNS trigger LANGUAGE plpgsql AS $$
    DECLARE
        came timestamptz := coalesce(NEW.created_at, OLD.created_at);
    BEGIN
        IF came < greatest(date_trunc('day', now(), 'UTC'),
            date_trunc('hour', now() - interval '50 minutes', 'UTC'))
        THEN
            INSERT INTO changed_days (day) VALUES ((came AT TIME ZONE 'UTC')::date)
            ON CONFLICT DO NOTHING;
        END IF;
        RETURN NULL;
    END
    $$;
-- The condition is cheap, and true of all calls that the function looks for.
CREATE OR REPLACE TRIGGER audit_day_gets_more AFTER INSERT ON audit FOR EACH ROW
    WHEN (NEW.created_at < date_trunc('hour', now(), 'UTC'))
    EXECUTE FUNCTION audit_day_changed();
CREATE OR REPLACE TRIGGER audit_day_changes AFTER UPDATE OR DELETE ON audit FOR EACH ROW
    WHEN (OLD.created_at < date_trunc('hour', now(), 'UTC'))
    EXECUTE FUNCTION audit_day_changed();
