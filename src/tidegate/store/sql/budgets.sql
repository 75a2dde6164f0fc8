-- Budgets, their books, and their reservations.

-- name: budget_revision
-- Return the number that grows with every change of a budget.
SELECT revision FROM budget_revision

-- name: count_budget_change
-- Notify all processes of a changed budget; lock the revision until the change is committed.
WITH raised AS (UPDATE budget_revision SET revision = revision + 1)
SELECT pg_notify('tidegate_budgets', '')

-- name: list_budgets
-- List at most $1 budgets by name.
SELECT name, tenant, key, model, subject, conversation, each, unit, amount, period, zone, window_s,
    at_end, fallback, doubt, alerts, created_at
FROM budgets ORDER BY name LIMIT $1

-- name: get_budget
-- Return one budget, locked against changes until this transaction ends.
SELECT name, tenant, key, model, subject, conversation, each, unit, amount, period, zone, window_s,
    at_end, fallback, doubt, alerts, created_at
FROM budgets WHERE name = $1 FOR UPDATE

-- name: set_budget
-- Create or update the budget $1, all of whose columns are given; return whether it is new.
INSERT INTO budgets AS b (name, tenant, key, model, subject, conversation, each, unit, amount,
    period, zone, window_s, at_end, fallback, doubt, alerts)
SELECT name, tenant, key, model, subject, conversation, each, unit, amount, period, zone, window_s,
    at_end, fallback, doubt, alerts
FROM json_to_record($1::json) AS row (name text, tenant text, key text, model text, subject text,
    conversation text, each text[], unit text, amount bigint, period text, zone text,
    window_s bigint, at_end text, fallback text, doubt text, alerts smallint[])
ON CONFLICT (name) DO UPDATE SET amount = excluded.amount, at_end = excluded.at_end,
    fallback = excluded.fallback, doubt = excluded.doubt, alerts = excluded.alerts
RETURNING b.xmax = 0 AS is_new

-- name: read_clock_of_zone
-- Return the local time in zone $1, which fails if PostgreSQL does not know it.
SELECT now() AT TIME ZONE $1

-- name: drop_budget
-- Delete a budget.
DELETE FROM budgets WHERE name = $1 RETURNING name, unit

-- name: drop_tenant_budgets
-- Delete the budgets that are bound to one tenant by its name.
DELETE FROM budgets WHERE tenant = $1 RETURNING name, unit

-- name: lock_budget_books
-- Wait for all transactions that reserve, and have others wait until this one ends.
-- Else they reserve under a budget that this one removes.
LOCK TABLE budget_books IN SHARE ROW EXCLUSIVE MODE

-- name: drop_budget_books
-- Delete the books, pauses and reservations of deleted budgets $1, whose alerts keep their units $2.
WITH books AS (DELETE FROM budget_books WHERE budget = ANY($1::text[])),
    pauses AS (DELETE FROM budget_pauses WHERE budget = ANY($1::text[])),
    units AS (UPDATE alerts a SET data = a.data || jsonb_build_object('unit', w.unit)
        FROM unnest($1::text[], $2::text[]) AS w (name, unit)
        WHERE a.data->>'budget' = w.name AND NOT a.data ? 'unit')
DELETE FROM budget_holds WHERE budget = ANY($1::text[])

-- name: models_with_usage
-- Return the names of all models with recorded usage.
SELECT DISTINCT model FROM usage_days

-- name: seed_budget_by_days
-- Create the books of budget $1 from daily totals.
-- For budgets of tenants or models whose periods are UTC days.
INSERT INTO budget_books (budget, scope, period, spent)
SELECT b.name, CASE WHEN 'tenant' = ANY(b.each) THEN json_build_array(u.tenant_id)::text ELSE '' END,
    budget_period(b.period, b.zone, now()),
    sum(CASE WHEN b.unit = 'usd' THEN u.cost_micros
        ELSE u.input_tokens + u.output_tokens + u.thoughts_tokens END)::bigint
FROM budgets b JOIN usage_days u
    ON u.day >= (budget_period(b.period, b.zone, now()) AT TIME ZONE 'UTC')::date
WHERE b.name = $1 AND (b.tenant IS NULL OR u.tenant_id = b.tenant)
    AND (b.model IS NULL OR u.model = ANY($2::text[]))
GROUP BY 1, 2, 3
ON CONFLICT (budget, scope, period) DO NOTHING

-- name: seed_budget_by_calls
-- Create the books of budget $1 from the recorded calls of its period.
INSERT INTO budget_books (budget, scope, period, spent)
SELECT b.name, CASE WHEN b.each = '{}' THEN '' ELSE (SELECT json_agg(CASE one
        WHEN 'tenant' THEN a.tenant_id WHEN 'key' THEN a.key_id WHEN 'subject' THEN a.subject END
        ORDER BY n)::text FROM unnest(b.each) WITH ORDINALITY AS e (one, n)) END,
    CASE WHEN b.window_s IS NULL THEN budget_period(b.period, b.zone, now())
        ELSE budget_span(b.window_s, a.finished_at) END,
    sum(CASE WHEN b.unit = 'usd' THEN coalesce(a.cost_micros, 0)
        ELSE coalesce(a.input_tokens, 0) + coalesce(a.output_tokens, 0)
            + coalesce(a.thoughts_tokens, 0) END)::bigint
FROM budgets b JOIN audit a ON a.finished_at >= CASE WHEN b.window_s IS NULL
        THEN budget_start(b.period, b.zone, now()) ELSE budget_oldest_span(b.window_s, now()) END
    AND a.created_at >= CASE WHEN b.window_s IS NULL
        THEN budget_period(b.period, b.zone, now()) - interval '1 day'
        ELSE budget_oldest_span(b.window_s, now()) - interval '1 day' END
WHERE b.name = $1 AND (b.tenant IS NULL OR a.tenant_id = b.tenant)
    AND (b.key IS NULL OR a.key_id = b.key) AND (b.subject IS NULL OR a.subject = b.subject)
    AND (b.model IS NULL OR a.model = ANY($2::text[]))
GROUP BY 1, 2, 3
ON CONFLICT (budget, scope, period) DO NOTHING

-- name: reserve_budgets
-- Reserve the maximum cost of calls for process $2; return a row for each refused call.
SELECT * FROM reserve_budgets($1::jsonb, $2)

-- name: reserve_budgets_whole
-- The same in one message, with the values in hexadecimal; return only the number of refused calls.
SELECT 1 FROM reserve_budgets(convert_from(decode('{asked}', 'hex'), 'UTF8')::jsonb,
    convert_from(decode('{instance}', 'hex'), 'UTF8'))

-- name: warm_budgets
-- Have this connection plan what refuses a call, so that its first refusal does not wait for that.
SELECT warm_budgets()

-- name: settle_budgets
-- Charge the actual cost of calls that have ended.
SELECT settle_budgets($1::jsonb)

-- name: see_budget_instance
-- Record that process $1 is alive.
INSERT INTO budget_instances (instance) VALUES ($1)
ON CONFLICT (instance) DO UPDATE SET seen_at = now()

-- name: orphaned_budget_holds
-- Return at most $2 reservations of processes not seen for $1 seconds, without batches at providers.
SELECT DISTINCT h.id FROM budget_holds h LEFT JOIN budget_instances i USING (instance)
WHERE h.estimated_at IS NULL AND h.instance <> 'provider batches'
    AND coalesce(i.seen_at, h.held_at) < now() - $1::double precision * interval '1 second'
LIMIT $2

-- name: forget_budget_instances
-- Delete processes that are gone and hold nothing, estimates older than 100 days, and old alerts.
WITH old AS (DELETE FROM budget_holds WHERE estimated_at < now() - interval '100 days'),
    told AS (DELETE FROM alerts WHERE created_at < now() - interval '30 days')
DELETE FROM budget_instances i WHERE seen_at < now() - interval '1 hour'
    AND NOT EXISTS (SELECT 1 FROM budget_holds h WHERE h.instance = i.instance
        AND h.estimated_at IS NULL)

-- name: forget_budget_books
-- Delete old and empty books.
-- A book is old if its period began over 100 days ago, or if a rolling window left its span a window
-- ago.
DELETE FROM budget_books WHERE ctid = ANY(ARRAY(
    SELECT k.ctid FROM budget_books k JOIN budgets b ON b.name = k.budget
    WHERE k.held = 0 AND (k.period > '-infinity' AND k.period < CASE WHEN b.window_s IS NULL
            THEN now() - interval '100 days'
            ELSE budget_oldest_span(b.window_s, now() - b.window_s * interval '1 second') END
        OR k.spent = 0 AND k.estimated = 0 AND k.extra = 0 AND CASE WHEN b.window_s IS NULL
            THEN k.alerted = 0 OR k.period < budget_period(b.period, b.zone, now())
            ELSE k.period > '-infinity' OR NOT EXISTS (SELECT 1 FROM budget_books s
                WHERE s.budget = k.budget AND s.scope = k.scope AND s.period > '-infinity') END)
    LIMIT 10000 FOR UPDATE OF k SKIP LOCKED))

-- name: stray_budget_holds
-- Return reservations of process $1 that are older than $3 seconds and not among $2.
SELECT DISTINCT id FROM budget_holds
WHERE instance = $1 AND estimated_at IS NULL AND NOT (id = ANY($2::uuid[]))
    AND held_at < now() - $3::double precision * interval '1 second'

-- name: budget_books
-- Return at most $3 books of current periods, of budget $1 and scope $2 if given, most spent first.
-- A paused scope without a call in the current period is one of them.
SELECT b.name AS budget, coalesce(n.scope, '') AS scope, b.unit, b.amount + coalesce(k.extra, 0) AS amount,
    coalesce(u.spent, 0) AS spent, coalesce(u.estimated, 0) AS estimated, coalesce(k.held, 0) AS held,
    budget_reset(b.period, b.zone, now()) AS reset_at, p.since AS paused_since
FROM budgets b LEFT JOIN LATERAL (
    SELECT scope FROM budget_books o WHERE o.budget = b.name AND ($2::text IS NULL OR o.scope = $2)
        AND o.period = budget_period(b.period, b.zone, now())
    UNION SELECT scope FROM budget_pauses o WHERE o.budget = b.name AND ($2::text IS NULL OR o.scope = $2)
) AS n ON true
LEFT JOIN budget_books k
    ON k.budget = b.name AND k.scope = n.scope AND k.period = budget_period(b.period, b.zone, now())
LEFT JOIN budget_pauses p ON p.budget = b.name AND p.scope = n.scope
CROSS JOIN LATERAL (
    SELECT k.spent, k.estimated WHERE b.window_s IS NULL
    UNION ALL
    SELECT sum(r.spent)::bigint, sum(r.estimated)::bigint FROM budget_books r
    WHERE b.window_s IS NOT NULL AND r.budget = b.name AND r.scope = k.scope
        AND r.period > '-infinity' AND r.period >= budget_oldest_span(b.window_s, now())
    HAVING b.window_s IS NOT NULL
) AS u
WHERE ($1::text IS NULL OR b.name = $1) AND ($2::text IS NULL OR coalesce(n.scope, '') = $2)
ORDER BY coalesce(u.spent, 0)::double precision / greatest(b.amount, 1) DESC, 1, 2 LIMIT $3

-- name: rolling_budget_reset
-- Return when $3 of the spend of rolling budget $1 in scope $2 has left its window.
SELECT min(f.period) + (f.window_s + budget_span_s(f.window_s)) * interval '1 second'
FROM (
    SELECT r.period, b.window_s, sum(r.spent - r.extra) OVER (ORDER BY r.period) AS freed
    FROM budgets b JOIN budget_books r ON r.budget = b.name AND r.period > '-infinity'
        AND r.period >= budget_oldest_span(b.window_s, now())
    WHERE b.name = $1 AND r.scope = $2 AND b.window_s IS NOT NULL
) AS f WHERE f.freed >= $3 GROUP BY f.window_s

-- name: resume_budget
-- End the pauses of budget $1, in scope $2 if given.
DELETE FROM budget_pauses WHERE budget = $1 AND ($2::text IS NULL OR scope = $2) RETURNING scope

-- name: extend_budget
-- Add $3 to the amount of budget $1 in the current period or window, in scope $2 if given.
-- A book is created if there was no call yet.
WITH more AS (
    INSERT INTO budget_books AS k (budget, scope, period, extra)
    SELECT b.name, s.scope, budget_period(b.period, b.zone, now()), $3 FROM budgets b CROSS JOIN LATERAL (
        SELECT o.scope FROM budget_books o WHERE o.budget = b.name AND ($2::text IS NULL OR o.scope = $2)
            AND o.period = budget_period(b.period, b.zone, now())
        UNION SELECT coalesce($2, '') WHERE cardinality(b.each) = CASE WHEN coalesce($2, '') = '' THEN 0
            ELSE json_array_length($2::json) END
    ) AS s WHERE b.name = $1
    ON CONFLICT (budget, scope, period) DO UPDATE SET extra = k.extra + excluded.extra, alerted = 0
    RETURNING k.scope
), spans AS (
    INSERT INTO budget_books AS s (budget, scope, period, extra)
    SELECT b.name, m.scope, budget_span(b.window_s, now()), $3 FROM more m CROSS JOIN budgets b
    WHERE b.name = $1 AND b.window_s IS NOT NULL
    ON CONFLICT (budget, scope, period) DO UPDATE SET extra = s.extra + excluded.extra
)
SELECT scope FROM more

-- name: lock_ended_extras
-- Lock the books of rolling budgets with an extension that is older than the window.
SELECT 1 FROM budgets b JOIN budget_books k ON k.budget = b.name AND k.period = '-infinity'
WHERE b.window_s IS NOT NULL AND k.extra > 0 AND k.extra > (
    SELECT coalesce(sum(r.extra), 0) FROM budget_books r WHERE r.budget = k.budget
        AND r.scope = k.scope AND r.period > '-infinity'
        AND r.period >= budget_oldest_span(b.window_s, now()))
ORDER BY k.budget, k.scope FOR NO KEY UPDATE OF k

-- name: end_extras
-- Reduce the extensions of rolling budgets to those within the window.
UPDATE budget_books k SET extra = u.extra
FROM budgets b JOIN budget_books w ON w.budget = b.name AND w.period = '-infinity' AND w.extra > 0
CROSS JOIN LATERAL (
    SELECT coalesce(sum(r.extra), 0) AS extra FROM budget_books r WHERE r.budget = w.budget
        AND r.scope = w.scope AND r.period > '-infinity'
        AND r.period >= budget_oldest_span(b.window_s, now())) AS u
WHERE b.window_s IS NOT NULL AND k.budget = w.budget AND k.scope = w.scope AND k.period = w.period
    AND k.extra = w.extra AND k.extra > u.extra

-- name: estimated_holds_of
-- Return the estimates that budgets were charged for the requests $1.
SELECT id, request_id, budget, scope, amount FROM budget_holds
WHERE estimated_at IS NOT NULL AND request_id = ANY($1::uuid[])

-- name: lock_books_of_erased
-- Lock the books of subject $2, of tenant $1 if given.
-- Without a subject, lock the books of tenant $1 that are kept by subject or conversation.
SELECT 1 FROM budget_books k JOIN budgets b ON b.name = k.budget
CROSS JOIN LATERAL (SELECT nullif(k.scope, '')::json AS scope) AS n
WHERE CASE WHEN $2::text IS NULL THEN coalesce(n.scope->>(array_position(b.each, 'subject') - 1),
        n.scope->>(array_position(b.each, 'conversation') - 1)) IS NOT NULL
        ELSE n.scope->>(array_position(b.each, 'subject') - 1) = $2 END
    AND ($1::text IS NULL OR b.tenant = $1 OR b.tenant IS NULL AND coalesce(n.scope->>(
        array_position(b.each, 'tenant') - 1), CASE WHEN $2 IS NULL THEN '' ELSE $1 END) = $1)
ORDER BY k.budget, k.scope, k.period FOR UPDATE OF k

-- name: forget_books_of_erased
-- Delete these books with their reservations, pauses and alerts.
-- Alerts of deleted budgets are found by the name alone.
WITH named AS (
    SELECT budget, scope FROM budget_books UNION SELECT budget, scope FROM budget_pauses UNION
    SELECT budget, scope FROM budget_holds UNION SELECT data->>'budget', data->>'scope' FROM alerts
), whose AS (
    SELECT k.budget, k.scope FROM named k LEFT JOIN budgets b ON b.name = k.budget
    CROSS JOIN LATERAL (SELECT nullif(k.scope, '')::json AS scope) AS n
    WHERE CASE WHEN b.name IS NULL THEN n.scope::jsonb ? coalesce($2, $1)
            WHEN $2::text IS NULL THEN coalesce(n.scope->>(array_position(b.each, 'subject') - 1),
                n.scope->>(array_position(b.each, 'conversation') - 1)) IS NOT NULL
            ELSE n.scope->>(array_position(b.each, 'subject') - 1) = $2 END
        AND ($1::text IS NULL OR b.name IS NULL OR b.tenant = $1 OR b.tenant IS NULL AND coalesce(
            n.scope->>(array_position(b.each, 'tenant') - 1),
            CASE WHEN $2 IS NULL THEN '' ELSE $1 END) = $1)
), holds AS (
    DELETE FROM budget_holds h USING whose w WHERE h.budget = w.budget AND h.scope = w.scope
), pauses AS (
    DELETE FROM budget_pauses p USING whose w WHERE p.budget = w.budget AND p.scope = w.scope
), told AS (
    DELETE FROM alerts a USING whose w
    WHERE a.data->>'budget' = w.budget AND a.data->>'scope' = w.scope
)
DELETE FROM budget_books k USING whose w WHERE k.budget = w.budget AND k.scope = w.scope

-- name: use_of_budgets
-- Return the usage of at most $1 budgets: the ratio of a single book, and the number of pauses.
SELECT b.name, CASE WHEN b.each = '{}' THEN (coalesce(k.held, 0) + CASE WHEN b.window_s IS NULL
            THEN coalesce(k.spent, 0) ELSE coalesce((SELECT sum(r.spent) FROM budget_books r
                WHERE r.budget = b.name AND r.scope = '' AND r.period > '-infinity'
                    AND r.period >= budget_oldest_span(b.window_s, now())), 0) END)::double precision
        / greatest(b.amount + coalesce(k.extra, 0), 1) END AS used_ratio,
    (SELECT count(*) FROM budget_pauses p WHERE p.budget = b.name) AS paused
FROM budgets b LEFT JOIN budget_books k ON k.budget = b.name AND k.scope = ''
    AND k.period = budget_period(b.period, b.zone, now())
ORDER BY b.name LIMIT $1
