-- Makes the application's role in a cluster of version 0.1.0, where the superuser owned the record,
-- and gives it all of it. Single-user mode ends a statement at a semicolon and an empty line.
DO $$
DECLARE
    statement text;
BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'tidegate_app') THEN
        CREATE ROLE tidegate_app LOGIN;
    END IF;
    ALTER ROLE tidegate_app PASSWORD '{password}';
    ALTER DATABASE tidegate OWNER TO tidegate_app;
    FOR statement IN
        SELECT format('ALTER TABLE %s OWNER TO tidegate_app', oid::regclass)
        FROM pg_class
        WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p', 'v', 'm')
        UNION ALL
        -- Those of a column follow their table.
        SELECT format('ALTER SEQUENCE %s OWNER TO tidegate_app', sequence.oid::regclass)
        FROM pg_class AS sequence
        WHERE relnamespace = 'public'::regnamespace AND relkind = 'S' AND NOT EXISTS (
            SELECT FROM pg_depend
            WHERE classid = 'pg_class'::regclass AND objid = sequence.oid AND deptype IN ('a', 'i')
        )
        UNION ALL
        SELECT format('ALTER ROUTINE %s OWNER TO tidegate_app', oid::regprocedure)
        FROM pg_proc
        WHERE pronamespace = 'public'::regnamespace
    LOOP
        EXECUTE statement;
    END LOOP;
END $$;

