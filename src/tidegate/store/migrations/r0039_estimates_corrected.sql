-- Fixes: estimates of a budget with `doubt = estimate` could not be corrected once the actual cost was
-- known; and a budget whose period begins with an hour that is repeated (Havana, the Azores) started
-- without the recorded spending of the first of the two.

-- The start of a calendar period in its time zone: its first moment, including changes of daylight saving
-- time. `budget_period` names the period of a book, and may be an hour later.
CREATE FUNCTION budget_start(period text, zone text, at timestamptz)
RETURNS timestamptz LANGUAGE sql STABLE AS $$
    SELECT CASE WHEN (named - interval '1 hour') AT TIME ZONE zone >= named AT TIME ZONE zone
        THEN named - interval '1 hour' ELSE named END
    FROM (SELECT budget_period(period, zone, at) AS named) AS p
$$;

-- Charges calls that have ended, and releases the rest of their reservations. `given` is [{"id",
-- "micros", "tokens", "doubt"}, ...] with null micros if unknown. With `doubt`, the charge is an estimate,
-- which a later call of this function with the same id corrects: the whole reservation for a budget that
-- keeps bounds, else what is known, or the reservation. An id without a reservation changes nothing.
CREATE OR REPLACE FUNCTION settle_budgets(given jsonb) RETURNS void LANGUAGE plpgsql AS $$
DECLARE ids uuid[]; names text[]; scopes text[]; times timestamptz[];
BEGIN
    SELECT array_agg((g.value->>'id')::uuid) INTO ids FROM jsonb_array_elements(given) AS g (value);
    SELECT array_agg(w.budget), array_agg(w.scope), array_agg(w.period) INTO names, scopes, times
    FROM (SELECT DISTINCT h.budget, h.scope, h.period FROM budget_holds h
        WHERE h.id = ANY (ids)) AS w;
    IF names IS NULL THEN RETURN; END IF;
    PERFORM 1 FROM budget_books k
    JOIN (SELECT DISTINCT h.budget, h.scope,
            CASE WHEN b.period = 'rolling' THEN '-infinity' ELSE h.period END AS period
        FROM budget_holds h JOIN budgets b ON b.name = h.budget WHERE h.id = ANY (ids)) AS w
        ON k.budget = w.budget AND k.scope = w.scope AND k.period = w.period
    ORDER BY k.budget, k.scope, k.period FOR NO KEY UPDATE OF k;
    WITH ends AS (
        SELECT h.id, h.budget, h.scope, h.period, h.amount, h.estimated_at IS NULL AS is_open,
            b.window_s, g.doubt, g.doubt AND b.doubt = 'bound' AS keeps,
            CASE WHEN b.unit = 'usd' THEN g.micros ELSE g.tokens END AS charge
        FROM jsonb_to_recordset(given) AS g (id uuid, micros bigint, tokens bigint, doubt boolean)
        JOIN budget_holds h ON h.id = g.id JOIN budgets b ON b.name = h.budget
    ), paid AS (
        SELECT *, CASE WHEN keeps THEN greatest(amount, coalesce(charge, 0))
                ELSE coalesce(charge, amount) END AS pays,
            CASE WHEN window_s IS NULL OR NOT is_open THEN period
                ELSE budget_span(window_s, now()) END AS place
        FROM ends
    ), changes AS (
        SELECT budget, scope, place AS period, pays - CASE WHEN is_open THEN 0 ELSE amount END AS spent,
            CASE WHEN doubt THEN pays ELSE 0 END - CASE WHEN is_open THEN 0 ELSE amount END
                AS estimated, 0::bigint AS held
        FROM paid
        UNION ALL
        SELECT budget, scope, period, 0, 0, -amount FROM paid WHERE is_open
    ), sums AS (
        SELECT budget, scope, period, sum(spent)::bigint AS spent,
            sum(estimated)::bigint AS estimated, sum(held)::bigint AS held
        FROM changes GROUP BY 1, 2, 3 ORDER BY 1, 2, 3
    ), gone AS (
        DELETE FROM budget_holds h USING paid p
        WHERE h.id = p.id AND h.budget = p.budget AND NOT p.doubt
    ), kept AS (
        UPDATE budget_holds h SET estimated_at = coalesce(h.estimated_at, now()), amount = p.pays,
            period = p.place
        FROM paid p WHERE h.id = p.id AND h.budget = p.budget AND p.doubt
    )
    INSERT INTO budget_books AS k (budget, scope, period, spent, estimated, held)
    SELECT * FROM sums
    ON CONFLICT (budget, scope, period) DO UPDATE SET spent = k.spent + excluded.spent,
        estimated = k.estimated + excluded.estimated, held = k.held + excluded.held;
    -- Shares that are reached for the first time.
    WITH reached AS (
        SELECT k.budget, k.scope, k.period, u.spent, b.amount + k.extra AS amount,
            (SELECT max(s) FROM unnest(b.alerts) AS s
                WHERE u.spent * 100 >= s * (b.amount + k.extra)) AS share
        FROM (SELECT DISTINCT w.budget, w.scope,
                CASE WHEN b.period = 'rolling' THEN '-infinity' ELSE w.period END AS period
            FROM unnest(names, scopes, times) AS w (budget, scope, period)
            JOIN budgets b ON b.name = w.budget WHERE b.alerts <> '{}') AS w
        JOIN budget_books k ON k.budget = w.budget AND k.scope = w.scope AND k.period = w.period
        JOIN budgets b ON b.name = k.budget
        CROSS JOIN LATERAL (SELECT CASE WHEN b.period <> 'rolling' THEN k.spent ELSE coalesce((
            SELECT sum(r.spent) FROM budget_books r WHERE r.budget = k.budget AND r.scope = k.scope
                AND r.period > '-infinity' AND r.period >= budget_oldest_span(b.window_s, now())),
            0)::bigint END AS spent) AS u
    ), raised AS (
        UPDATE budget_books k SET alerted = k.alerted - k.alerted % 1000 + r.share FROM reached r
        WHERE k.budget = r.budget AND k.scope = r.scope AND k.period = r.period
            AND r.share > k.alerted % 1000
        RETURNING k.budget, k.scope, r.spent, r.amount, r.share
    )
    INSERT INTO alerts (kind, data)
    SELECT 'budget_share', jsonb_build_object('budget', budget, 'scope', scope, 'share', share,
        'amount', amount, 'spent', spent) FROM raised;
END
$$;

-- Plans what reserves, refuses and settles a call under a budget, and undoes all of that.
CREATE FUNCTION warm_budgets() RETURNS void LANGUAGE plpgsql AS $$
DECLARE named text = gen_random_uuid(); hold text = gen_random_uuid();
BEGIN
    INSERT INTO budgets (name, unit, amount, period) VALUES (named, 'usd', 2, 'day');
    PERFORM reserve_budgets(jsonb_build_object(
        'books', jsonb_build_array(jsonb_build_array(named, '')),
        'calls', (SELECT jsonb_agg(jsonb_build_object('id', hold, 'request', hold,
            'binds', jsonb_build_array(jsonb_build_array(0, need)))) FROM unnest(needs) AS n (need))
        ), named) FROM (VALUES (ARRAY[3]), (ARRAY[1])) AS v (needs);
    PERFORM settle_budgets(jsonb_build_array(jsonb_build_object(
        'id', hold, 'micros', 1, 'tokens', 1, 'doubt', false)));
    RAISE EXCEPTION 'undone';
EXCEPTION WHEN raise_exception THEN NULL;
END
$$;
