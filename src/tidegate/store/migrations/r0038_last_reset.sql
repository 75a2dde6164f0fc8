-- Fixes: the refusal of a call by several budgets named the last of them by name, though another is reset
-- later; a rolling budget stated a time at which it has room only with an extra amount that has ended by
-- then; and a day that repeats its first hour (Havana, the Azores) was stated to begin an hour late.

-- The end of a calendar period in its time zone: the first moment of the next one, including changes of
-- daylight saving time.
CREATE OR REPLACE FUNCTION budget_reset(period text, zone text, at timestamptz)
RETURNS timestamptz LANGUAGE sql STABLE AS $$
    SELECT CASE WHEN (ends - interval '1 hour') AT TIME ZONE zone >= local THEN ends - interval '1 hour'
        ELSE ends END
    FROM (
        SELECT local, local AT TIME ZONE zone AS ends FROM (
            SELECT CASE WHEN period <> 'rolling' THEN
                date_trunc(period, at AT TIME ZONE zone) + ('1 ' || period)::interval END AS local
        ) AS l
    ) AS e
$$;

-- Reserves the maximum cost of calls. `asked` is {"books": [[budget, scope], ...], "calls": [{"id",
-- "request", "binds": [[book, amount], ...]}, ...]}. Each call gets all that it requests or nothing, in
-- their order. Returns a row for each refused call, with the book that refuses it. A repeated
-- reservation changes nothing. If all calls fit, none is checked by itself. Alerts of a rolling budget
-- are raised again once its usage is below four fifths of the lowest share with an alert, or below 40 %
-- if it has none. A budget with `pause` is paused once at most a hundredth of it is left: until then, a
-- call that needs more than the rest is refused, and others still fit. If a book is deleted while this
-- waits for its lock, or was created by another transaction since, the whole transaction fails as
-- retryable, because locking the book now would violate the lock order. Of several books without enough
-- left, the one that has room last is returned: one that a person must resume or that is too small for the
-- call, else the one that is reset last.
CREATE OR REPLACE FUNCTION reserve_budgets(asked jsonb, by text)
RETURNS TABLE (call integer, book integer, why text, amount bigint, spent bigint, held bigint,
    reset_at timestamptz, paused_since timestamptz)
LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    rooms bigint[]; sizes bigint[]; takens bigint[]; helds bigint[]; resets timestamptz[];
    ends text[]; stops timestamptz[]; windows bigint[]; names text[]; scopes text[]; times timestamptz[];
    added bigint[]; calm boolean[]; fits boolean; known uuid[]; free_at timestamptz; last_at timestamptz;
    one record; bind record; bad integer; reason text;
    locked bigint; kept_ids uuid[]; kept_requests uuid[]; kept_books integer[]; kept_amounts bigint[];
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
    GET DIAGNOSTICS locked = ROW_COUNT;
    -- Read after the lock: by a snapshot that has what those before us have committed.
    SELECT array_agg(u.room ORDER BY n), array_agg(u.amount ORDER BY n),
        array_agg(u.taken ORDER BY n), array_agg(u.held ORDER BY n),
        array_agg(budget_reset(u.period, u.zone, now()) ORDER BY n),
        array_agg(u.at_end ORDER BY n), array_agg(u.since ORDER BY n),
        array_agg(u.window_s ORDER BY n), array_agg(u.name ORDER BY n),
        array_agg(u.scope ORDER BY n), array_agg(u.place ORDER BY n),
        array_agg(u.window_s IS NOT NULL AND u.taken * 100 < 0.8 * u.room * coalesce(
            (SELECT min(s) FROM unnest(u.alerts) AS s), 50) ORDER BY n)
    INTO rooms, sizes, takens, helds, resets, ends, stops, windows, names, scopes, times, calm
    FROM (
        SELECT pair.n, b.name, b.period, b.zone, b.window_s, b.at_end, b.alerts, b.amount,
            k.scope, k.period AS place, k.held, p.since, b.amount + k.extra AS room,
            CASE WHEN b.period = 'rolling' THEN coalesce((
                SELECT sum(r.spent) FROM budget_books r WHERE r.budget = b.name
                    AND r.scope = k.scope AND r.period > '-infinity'
                    AND r.period >= budget_oldest_span(b.window_s, now())), 0)::bigint
                ELSE k.spent END AS taken
        FROM jsonb_array_elements(asked->'books') WITH ORDINALITY AS pair (value, n)
        LEFT JOIN budgets b ON b.name = pair.value->>0
        LEFT JOIN budget_books k ON k.budget = b.name AND k.scope = pair.value->>1
            AND k.period = budget_period(b.period, b.zone, now())
        LEFT JOIN budget_pauses p ON p.budget = b.name AND p.scope = pair.value->>1
    ) AS u;
    IF locked < cardinality(array_remove(names, NULL)) THEN
        RAISE EXCEPTION 'a book was deleted while its lock was waited for'
            USING ERRCODE = 'serialization_failure';
    END IF;
    SELECT array_agg(w.id), array_agg(w.request), array_agg(w.place), array_agg(w.need)
    INTO kept_ids, kept_requests, kept_books, kept_amounts
    FROM (
        SELECT (c.value->>'id')::uuid AS id, (c.value->>'request')::uuid AS request,
            (b.value->>0)::integer + 1 AS place, (b.value->>1)::bigint AS need
        FROM jsonb_array_elements(asked->'calls') AS c (value),
            jsonb_array_elements(c.value->'binds') AS b (value)
    ) AS w
    WHERE rooms[w.place] IS NOT NULL AND NOT EXISTS (SELECT 1 FROM budget_holds h WHERE h.id = w.id);
    SELECT array_agg(coalesce(s.more, 0) ORDER BY n), bool_and(rooms[n] IS NULL
        OR stops[n] IS NULL AND takens[n] + helds[n] + coalesce(s.more, 0) <= rooms[n])
    INTO added, fits
    FROM generate_series(1, jsonb_array_length(asked->'books')) AS n LEFT JOIN (
        SELECT w.place, sum(w.need)::bigint AS more
        FROM unnest(kept_books, kept_amounts) AS w (place, need) GROUP BY 1
    ) AS s ON s.place = n;
    IF NOT fits THEN
        kept_ids := '{}'; kept_requests := '{}'; kept_books := '{}'; kept_amounts := '{}';
        SELECT array_agg(0::bigint) INTO added FROM generate_series(1, cardinality(rooms));
        SELECT array_agg(h.id) INTO known FROM budget_holds h WHERE h.id IN (
            SELECT (c.value->>'id')::uuid FROM jsonb_array_elements(asked->'calls') AS c (value));
        FOR one IN SELECT c.value, c.n FROM jsonb_array_elements(asked->'calls')
            WITH ORDINALITY AS c (value, n) ORDER BY c.n
        LOOP
            CONTINUE WHEN (one.value->>'id')::uuid = ANY (coalesce(known, '{}'));
            bad := NULL; reason := NULL; last_at := '-infinity';
            FOR bind IN SELECT (b.value->>0)::integer + 1 AS n, (b.value->>1)::bigint AS m
                FROM jsonb_array_elements(one.value->'binds') AS b (value)
            LOOP
                CONTINUE WHEN rooms[bind.n] IS NULL;
                IF stops[bind.n] IS NOT NULL THEN
                    bad := bind.n; reason := 'paused'; EXIT;
                ELSIF takens[bind.n] + bind.m > rooms[bind.n] THEN
                    IF windows[bind.n] IS NOT NULL THEN
                        SELECT min(f.period) + (windows[bind.n] + budget_span_s(windows[bind.n]))
                            * interval '1 second'
                        INTO free_at FROM (
                            SELECT r.period, sum(r.spent - r.extra) OVER (ORDER BY r.period) AS freed
                            FROM budget_books r WHERE r.budget = names[bind.n]
                                AND r.scope = scopes[bind.n] AND r.period > '-infinity'
                                AND r.period >= budget_oldest_span(windows[bind.n], now())
                        ) AS f WHERE f.freed >= takens[bind.n] + bind.m - rooms[bind.n];
                        resets[bind.n] := free_at;
                    END IF;
                    free_at := resets[bind.n];
                    IF bind.m > sizes[bind.n]
                        OR ends[bind.n] = 'pause' AND takens[bind.n] * 100 >= rooms[bind.n] * 99
                    THEN
                        free_at := 'infinity';
                    END IF;
                    IF reason IS DISTINCT FROM 'spent' OR coalesce(free_at, 'infinity') >= last_at THEN
                        bad := bind.n; reason := 'spent'; last_at := coalesce(free_at, 'infinity');
                    END IF;
                ELSIF reason IS NULL AND takens[bind.n] + helds[bind.n] + bind.m > rooms[bind.n] THEN
                    bad := bind.n; reason := 'held';
                END IF;
            END LOOP;
            IF reason IS NOT NULL THEN
                IF reason = 'spent' AND ends[bad] = 'pause' AND takens[bad] * 100 >= rooms[bad] * 99
                THEN
                    INSERT INTO budget_pauses (budget, scope) VALUES (names[bad], scopes[bad]);
                    stops[bad] := now(); reason := 'paused';
                    INSERT INTO alerts (kind, data) VALUES ('budget_paused', jsonb_build_object(
                        'budget', names[bad], 'scope', scopes[bad], 'amount', rooms[bad],
                        'spent', takens[bad]));
                ELSIF reason = 'spent' AND ends[bad] <> 'pause' THEN
                    INSERT INTO alerts (kind, data)
                    SELECT 'budget_out', jsonb_build_object('budget', names[bad], 'scope', scopes[bad],
                        'amount', rooms[bad], 'spent', takens[bad], 'reset_at', resets[bad])
                    FROM budget_books k WHERE k.budget = names[bad] AND k.scope = scopes[bad]
                        AND k.period = times[bad] AND k.alerted < 1000;
                    UPDATE budget_books k SET alerted = k.alerted + 1000 WHERE k.budget = names[bad]
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
    END IF;
    UPDATE budget_books k SET held = k.held + w.more,
        alerted = CASE WHEN w.calm THEN 0 ELSE k.alerted END
    FROM unnest(names, scopes, times, added, calm) AS w (name, scope, period, more, calm)
    WHERE k.budget = w.name AND k.scope = w.scope AND k.period = w.period AND w.more <> 0;
    INSERT INTO budget_holds (id, budget, scope, period, request_id, amount, instance)
    SELECT w.id, names[w.book], scopes[w.book], times[w.book], w.request, w.amount, by
    FROM unnest(kept_ids, kept_requests, kept_books, kept_amounts)
        AS w (id, request, book, amount);
END
$$;
