-- Budgets, their books, their reservations, and the alerts that they raise.
--
-- The budgets of tenants become rows of `budgets`, with their spend so far. Their columns in `tenants`
-- stay for processes of the previous version, and are no longer read.

-- The scope of a budget: each of tenant, key, model, subject and conversation that is not null must
-- match; `model` is a pattern. Each value of the dimensions in `each` has a book of its own. `amount` is
-- in micro-dollars or tokens. `doubt`: a call of uncertain cost is charged its bound or an estimate.
CREATE TABLE budgets (
    name text PRIMARY KEY CHECK (length(name) BETWEEN 1 AND 200),
    tenant text,
    key text,
    model text,
    subject text,
    conversation text,
    each text[] NOT NULL DEFAULT '{}'
        CHECK (each <@ ARRAY['tenant', 'key', 'subject', 'conversation']),
    unit text NOT NULL CHECK (unit IN ('usd', 'tokens')),
    amount bigint NOT NULL CHECK (amount >= 0),
    period text NOT NULL CHECK (period IN ('day', 'week', 'month', 'rolling')),
    zone text NOT NULL DEFAULT 'UTC',
    window_s bigint CHECK ((period = 'rolling') = (window_s IS NOT NULL) AND window_s > 0),
    at_end text NOT NULL DEFAULT 'refuse' CHECK (at_end IN ('refuse', 'pause', 'fall_back')),
    fallback text CHECK ((at_end = 'fall_back') = (fallback IS NOT NULL)),
    doubt text NOT NULL DEFAULT 'bound' CHECK (doubt IN ('bound', 'estimate')),
    alerts smallint[] NOT NULL DEFAULT '{}',
    created_at timestamptz NOT NULL DEFAULT now()
);

-- One row, incremented by every change of a budget in the same transaction.
CREATE TABLE budget_revision (
    id integer PRIMARY KEY DEFAULT 1 CHECK (id = 1),
    revision bigint NOT NULL DEFAULT 1
);

INSERT INTO budget_revision DEFAULT VALUES;

-- The API key that submitted a job.
ALTER TABLE requests ADD COLUMN key_id text;

-- The spend and the reservations of a budget in one period, for one `scope`: the values of `each`, as a
-- JSON array. `estimated` is a part of `spent`. A rolling budget has its reservations in the row of the
-- period `-infinity`, which is the one that is locked; its other rows have the spend by spans.
CREATE TABLE budget_books (
    budget text NOT NULL,
    scope text NOT NULL,
    period timestamptz NOT NULL,
    spent bigint NOT NULL DEFAULT 0,
    estimated bigint NOT NULL DEFAULT 0,
    held bigint NOT NULL DEFAULT 0,
    extra bigint NOT NULL DEFAULT 0,
    alerted smallint NOT NULL DEFAULT 0,
    PRIMARY KEY (budget, scope, period)
) WITH (fillfactor = 50);

CREATE TABLE budget_pauses (
    budget text NOT NULL,
    scope text NOT NULL,
    since timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (budget, scope)
);

-- What one attempt of a call has reserved of each budget that applies to it. A row with `estimated_at`
-- is charged, and stays until the actual cost is known.
CREATE TABLE budget_holds (
    id uuid NOT NULL,
    budget text NOT NULL,
    scope text NOT NULL,
    period timestamptz NOT NULL,
    request_id uuid,
    amount bigint NOT NULL,
    instance text NOT NULL,
    held_at timestamptz NOT NULL DEFAULT now(),
    estimated_at timestamptz,
    PRIMARY KEY (id, budget)
);

CREATE INDEX budget_holds_open ON budget_holds (instance) WHERE estimated_at IS NULL;

CREATE INDEX budget_holds_request ON budget_holds (request_id) WHERE estimated_at IS NOT NULL;

-- Processes with reservations, and when they were last seen.
CREATE TABLE budget_instances (
    instance text PRIMARY KEY,
    seen_at timestamptz NOT NULL DEFAULT now()
);

-- Alerts to be delivered by webhook.
CREATE TABLE alerts (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    created_at timestamptz NOT NULL DEFAULT now(),
    kind text NOT NULL,
    data jsonb NOT NULL,
    state text NOT NULL DEFAULT 'pending' CHECK (state IN ('pending', 'delivered', 'given_up')),
    tries integer NOT NULL DEFAULT 0,
    due_at timestamptz NOT NULL DEFAULT now(),
    problem text
);

CREATE INDEX alerts_due ON alerts (due_at) WHERE state = 'pending';

CREATE FUNCTION budget_period(period text, zone text, at timestamptz)
RETURNS timestamptz LANGUAGE sql STABLE AS $$
    SELECT CASE WHEN period = 'rolling' THEN '-infinity'::timestamptz
        ELSE date_trunc(period, at, zone) END
$$;

-- The end of a calendar period in its time zone, including changes of daylight saving time.
CREATE FUNCTION budget_reset(period text, zone text, at timestamptz)
RETURNS timestamptz LANGUAGE sql STABLE AS $$
    SELECT CASE WHEN period <> 'rolling' THEN
        (date_trunc(period, at AT TIME ZONE zone) + ('1 ' || period)::interval)
            AT TIME ZONE zone
    END
$$;

-- The width of the spans in which a rolling budget counts: 60 per window, at least one second.
CREATE FUNCTION budget_span_s(window_s bigint) RETURNS bigint LANGUAGE sql IMMUTABLE AS $$
    SELECT greatest(1, window_s / 60)
$$;

CREATE FUNCTION budget_span(window_s bigint, at timestamptz)
RETURNS timestamptz LANGUAGE sql STABLE AS $$
    SELECT to_timestamp(floor(extract(epoch FROM at) / budget_span_s(window_s))
        * budget_span_s(window_s))
$$;

-- The start of the oldest span that counts: this extends the window by at most one span.
CREATE FUNCTION budget_oldest_span(window_s bigint, at timestamptz)
RETURNS timestamptz LANGUAGE sql STABLE AS $$
    SELECT budget_span(window_s, at - window_s * interval '1 second')
$$;

-- Reserves the maximum cost of calls. `asked` is {"books": [[budget, scope], ...], "calls": [{"id",
-- "request", "binds": [[book, amount], ...]}, ...]}. Each call gets all that it requests or nothing, in
-- their order. Returns a row for each refused call, with the book that refuses it. A repeated
-- reservation changes nothing.
CREATE FUNCTION reserve_budgets(asked jsonb, by text)
RETURNS TABLE (call integer, book integer, why text, amount bigint, spent bigint, held bigint,
    reset_at timestamptz, paused_since timestamptz)
LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    rooms bigint[]; takens bigint[]; helds bigint[]; resets timestamptz[]; ends text[];
    stops timestamptz[]; windows bigint[]; names text[]; scopes text[]; times timestamptz[];
    added bigint[]; known uuid[]; free_at timestamptz; one record; bind record; bad integer; reason text; need bigint;
    kept_ids uuid[] := '{}'; kept_requests uuid[] := '{}';
    kept_books integer[] := '{}'; kept_amounts bigint[] := '{}';
BEGIN
    INSERT INTO budget_books AS made (budget, scope, period)
    SELECT b.name, pair.value->>1, budget_period(b.period, b.zone, now())
    FROM jsonb_array_elements(asked->'books') AS pair (value)
    JOIN budgets b ON b.name = pair.value->>0
    WHERE NOT EXISTS (
        SELECT 1 FROM budget_books k WHERE k.budget = b.name AND k.scope = pair.value->>1
            AND k.period = budget_period(b.period, b.zone, now()))
    ORDER BY 1, 2, 3
    ON CONFLICT DO NOTHING;
    PERFORM 1 FROM budget_books k
    JOIN (SELECT b.name, pair.value->>1 AS scope, budget_period(b.period, b.zone, now()) AS period
        FROM jsonb_array_elements(asked->'books') AS pair (value)
        JOIN budgets b ON b.name = pair.value->>0) AS w
        ON k.budget = w.name AND k.scope = w.scope AND k.period = w.period
    ORDER BY k.budget, k.scope, k.period FOR NO KEY UPDATE OF k;
    -- Read after the lock: by a snapshot that has what those before us have committed.
    SELECT array_agg(b.amount + k.extra ORDER BY n), array_agg(CASE WHEN b.period = 'rolling'
            THEN coalesce((SELECT sum(r.spent) FROM budget_books r WHERE r.budget = b.name
                AND r.scope = k.scope AND r.period > '-infinity'
                AND r.period >= budget_oldest_span(b.window_s, now())), 0)::bigint
            ELSE k.spent END ORDER BY n),
        array_agg(k.held ORDER BY n),
        array_agg(budget_reset(b.period, b.zone, now()) ORDER BY n), array_agg(b.at_end ORDER BY n),
        array_agg(p.since ORDER BY n), array_agg(b.window_s ORDER BY n),
        array_agg(b.name ORDER BY n), array_agg(k.scope ORDER BY n),
        array_agg(k.period ORDER BY n), array_agg(0::bigint ORDER BY n)
    INTO rooms, takens, helds, resets, ends, stops, windows, names, scopes, times, added
    FROM jsonb_array_elements(asked->'books') WITH ORDINALITY AS pair (value, n)
    LEFT JOIN budgets b ON b.name = pair.value->>0
    LEFT JOIN budget_books k ON k.budget = b.name AND k.scope = pair.value->>1
        AND k.period = budget_period(b.period, b.zone, now())
    LEFT JOIN budget_pauses p ON p.budget = b.name AND p.scope = pair.value->>1;
    SELECT array_agg(h.id) INTO known FROM budget_holds h WHERE h.id IN (
        SELECT (c.value->>'id')::uuid FROM jsonb_array_elements(asked->'calls') AS c (value));
    FOR one IN SELECT c.value, c.n FROM jsonb_array_elements(asked->'calls')
        WITH ORDINALITY AS c (value, n) ORDER BY c.n
    LOOP
        CONTINUE WHEN (one.value->>'id')::uuid = ANY (known);
        bad := NULL; reason := NULL; need := 0;
        FOR bind IN SELECT (b.value->>0)::integer + 1 AS n, (b.value->>1)::bigint AS m
            FROM jsonb_array_elements(one.value->'binds') AS b (value)
        LOOP
            CONTINUE WHEN rooms[bind.n] IS NULL;
            IF stops[bind.n] IS NOT NULL THEN
                bad := bind.n; reason := 'paused'; EXIT;
            ELSIF takens[bind.n] + bind.m > rooms[bind.n] THEN
                bad := bind.n; reason := 'spent'; need := bind.m;
            ELSIF reason IS NULL AND takens[bind.n] + helds[bind.n] + bind.m > rooms[bind.n] THEN
                bad := bind.n; reason := 'held';
            END IF;
        END LOOP;
        IF reason IS NOT NULL THEN
            IF reason = 'spent' AND windows[bad] IS NOT NULL THEN
                SELECT min(f.period) + (windows[bad] + budget_span_s(windows[bad]))
                    * interval '1 second'
                INTO free_at FROM (
                    SELECT r.period, sum(r.spent) OVER (ORDER BY r.period) AS freed
                    FROM budget_books r WHERE r.budget = names[bad] AND r.scope = scopes[bad]
                        AND r.period > '-infinity'
                        AND r.period >= budget_oldest_span(windows[bad], now())
                ) AS f WHERE f.freed >= takens[bad] + need - rooms[bad];
                resets[bad] := free_at;
            END IF;
            IF reason = 'spent' AND ends[bad] = 'pause' THEN
                INSERT INTO budget_pauses (budget, scope) VALUES (names[bad], scopes[bad]);
                stops[bad] := now(); reason := 'paused';
                INSERT INTO alerts (kind, data) VALUES ('budget_paused', jsonb_build_object(
                    'budget', names[bad], 'scope', scopes[bad], 'amount', rooms[bad],
                    'spent', takens[bad]));
            ELSIF reason = 'spent' THEN
                INSERT INTO alerts (kind, data)
                SELECT 'budget_out', jsonb_build_object('budget', names[bad], 'scope', scopes[bad],
                    'amount', rooms[bad], 'spent', takens[bad], 'reset_at', resets[bad])
                FROM budget_books k WHERE k.budget = names[bad] AND k.scope = scopes[bad]
                    AND k.period = times[bad] AND k.alerted < 1000;
                UPDATE budget_books k SET alerted = 1000 WHERE k.budget = names[bad]
                    AND k.scope = scopes[bad] AND k.period = times[bad] AND k.alerted < 1000;
            END IF;
            call := one.n - 1; book := bad - 1; why := reason; amount := rooms[bad];
            spent := takens[bad]; held := helds[bad]; reset_at := resets[bad];
            paused_since := stops[bad];
            RETURN NEXT;
            CONTINUE;
        END IF;
        FOR bind IN SELECT (b.value->>0)::integer + 1 AS n, (b.value->>1)::bigint AS m
            FROM jsonb_array_elements(one.value->'binds') AS b (value)
        LOOP
            CONTINUE WHEN rooms[bind.n] IS NULL;
            helds[bind.n] := helds[bind.n] + bind.m;
            added[bind.n] := added[bind.n] + bind.m;
            kept_ids := kept_ids || (one.value->>'id')::uuid;
            kept_requests := kept_requests || (one.value->>'request')::uuid;
            kept_books := kept_books || bind.n;
            kept_amounts := kept_amounts || bind.m;
        END LOOP;
    END LOOP;
    UPDATE budget_books k SET held = k.held + w.more
    FROM unnest(names, scopes, times, added) AS w (name, scope, period, more)
    WHERE k.budget = w.name AND k.scope = w.scope AND k.period = w.period AND w.more <> 0;
    INSERT INTO budget_holds (id, budget, scope, period, request_id, amount, instance)
    SELECT w.id, names[w.book], scopes[w.book], times[w.book], w.request, w.amount, by
    FROM unnest(kept_ids, kept_requests, kept_books, kept_amounts)
        AS w (id, request, book, amount);
END
$$;

-- Charges calls that have ended, and releases the rest of their reservations. `given` is [{"id",
-- "micros", "tokens", "doubt"}, ...] with null micros if unknown. With `doubt`, a budget that keeps
-- bounds is charged the whole reservation as an estimate, which a later call of this function with the
-- same id corrects. An id without a reservation changes nothing.
CREATE FUNCTION settle_budgets(given jsonb) RETURNS void LANGUAGE plpgsql AS $$
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
        WHERE h.id = p.id AND h.budget = p.budget AND NOT p.keeps
    ), kept AS (
        UPDATE budget_holds h SET estimated_at = coalesce(h.estimated_at, now()), amount = p.pays,
            period = p.place
        FROM paid p WHERE h.id = p.id AND h.budget = p.budget AND p.keeps
    )
    INSERT INTO budget_books AS k (budget, scope, period, spent, estimated, held)
    SELECT * FROM sums
    ON CONFLICT (budget, scope, period) DO UPDATE SET spent = k.spent + excluded.spent,
        estimated = k.estimated + excluded.estimated, held = k.held + excluded.held;
    -- Shares that are reached for the first time.
    WITH reached AS (
        SELECT k.budget, k.scope, k.period, k.spent, b.amount + k.extra AS amount,
            (SELECT max(s) FROM unnest(b.alerts) AS s
                WHERE k.spent * 100 >= s * (b.amount + k.extra)) AS share
        FROM unnest(names, scopes, times) AS w (budget, scope, period)
        JOIN budget_books k ON k.budget = w.budget AND k.scope = w.scope AND k.period = w.period
        JOIN budgets b ON b.name = k.budget
        WHERE b.alerts <> '{}'
    ), raised AS (
        UPDATE budget_books k SET alerted = r.share FROM reached r
        WHERE k.budget = r.budget AND k.scope = r.scope AND k.period = r.period
            AND r.share > k.alerted
        RETURNING k.budget, k.scope, r.spent, r.amount, r.share
    )
    INSERT INTO alerts (kind, data)
    SELECT 'budget_share', jsonb_build_object('budget', budget, 'scope', scope, 'share', share,
        'amount', amount, 'spent', spent) FROM raised;
END
$$;

-- The budgets of tenants, with their spend so far.
INSERT INTO budgets (name, tenant, unit, amount, period, doubt)
SELECT id || '/budget_day_money', id, 'usd', (budget_day_money * 1000000)::bigint,
    'day', 'estimate'
FROM tenants WHERE budget_day_money IS NOT NULL;

INSERT INTO budgets (name, tenant, unit, amount, period, doubt)
SELECT id || '/budget_day_tokens', id, 'tokens', budget_day_tokens,
    'day', 'estimate'
FROM tenants WHERE budget_day_tokens IS NOT NULL;

INSERT INTO budgets (name, tenant, unit, amount, period, doubt)
SELECT id || '/budget_month_money', id, 'usd', (budget_month_money * 1000000)::bigint,
    'month', 'estimate'
FROM tenants WHERE budget_month_money IS NOT NULL;

INSERT INTO budgets (name, tenant, unit, amount, period, doubt)
SELECT id || '/budget_month_tokens', id, 'tokens', budget_month_tokens,
    'month', 'estimate'
FROM tenants WHERE budget_month_tokens IS NOT NULL;

INSERT INTO budget_books (budget, scope, period, spent)
SELECT b.name, '', budget_period(b.period, b.zone, now()),
    sum(CASE WHEN b.unit = 'usd' THEN u.cost_micros
        ELSE u.input_tokens + u.output_tokens + u.thoughts_tokens END)::bigint
FROM budgets b JOIN usage_days u ON u.tenant_id = b.tenant
    AND u.day >= (budget_period(b.period, b.zone, now()) AT TIME ZONE 'UTC')::date
GROUP BY b.name, b.period, b.zone;
