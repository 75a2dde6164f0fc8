-- Beginnings of prompts, by which operators search for requests.
--
-- The index covers the partitions of today, if that is small, and later, so that no large partition is
-- read under the lock. Earlier requests are not found by their text; see store/requests.py.

-- Null in rows of an older version. The first 500 characters of the last user message.
ALTER TABLE audit ADD COLUMN prompt_head text;
CREATE INDEX audit_words ON ONLY audit USING gin (
    (setweight(to_tsvector('simple'::regconfig,
        coalesce(subject, '') || ' ' || coalesce(key_id, '')), 'A')
    || to_tsvector('simple'::regconfig, coalesce(prompt_head, ''))));
DO $$
DECLARE
    part regclass;
    today text := 'audit_' || to_char(now() AT TIME ZONE 'UTC', 'YYYYMMDD');
BEGIN
    FOR part IN
        SELECT c.oid::regclass FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
        WHERE i.inhparent = 'audit'::regclass AND (c.relname = 'audit_default'
            OR c.relname > today OR (c.relname = today AND pg_relation_size(c.oid) < 268435456))
    LOOP
        EXECUTE format($of$CREATE INDEX %I ON %s USING gin (
            (setweight(to_tsvector('simple'::regconfig,
                coalesce(subject, '') || ' ' || coalesce(key_id, '')), 'A')
            || to_tsvector('simple'::regconfig, coalesce(prompt_head, ''))))$of$,
            part::text || '_words', part);
        EXECUTE format('ALTER INDEX audit_words ATTACH PARTITION %I', part::text || '_words');
    END LOOP;
END
$$;
