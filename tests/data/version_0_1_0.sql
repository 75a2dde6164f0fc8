-- A database of version 0.1.0, as `pg_dump --inserts` writes it: made by the migrations and
-- processes of that version, commit ee32f61, with rows in every table. Of the partitions by day only
-- that of the rows is kept. SET lines and comments are left out, and the condition of the trigger is
-- worded as the migration worded it: pg_dump nests it otherwise.

CREATE FUNCTION public.requests_became_ready() RETURNS trigger
    LANGUAGE plpgsql
    AS $$
    BEGIN
        NEW.ready_xid := pg_current_xact_id()::text::bigint;
        RETURN NEW;
    END
    $$;

CREATE TABLE public.access (
    id integer DEFAULT 1 NOT NULL,
    version bigint DEFAULT 1 NOT NULL,
    CONSTRAINT access_id_check CHECK ((id = 1))
);

CREATE TABLE public.alembic_version (
    version_num character varying(32) NOT NULL
);

CREATE TABLE public.attempts (
    id uuid NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    request_id uuid NOT NULL,
    tenant_id text DEFAULT 'default'::text NOT NULL,
    pool text NOT NULL,
    kind text,
    number integer NOT NULL,
    claim bigint NOT NULL,
    instance_id text NOT NULL,
    model text NOT NULL,
    fence_epoch bigint NOT NULL,
    fence_sequence bigint NOT NULL,
    outcome text NOT NULL,
    admitted_at timestamp with time zone,
    finished_at timestamp with time zone,
    queue_ms double precision,
    upstream_ms double precision,
    input_tokens bigint,
    output_tokens bigint,
    thoughts_tokens bigint,
    cached_tokens bigint,
    total_tokens bigint,
    finish_reason text,
    model_version text,
    response_id text,
    failure jsonb,
    first_byte_ms double precision
)
PARTITION BY RANGE (created_at);

CREATE TABLE public.attempts_20261128 (
    id uuid CONSTRAINT attempts_id_not_null NOT NULL,
    created_at timestamp with time zone DEFAULT now() CONSTRAINT attempts_created_at_not_null NOT NULL,
    request_id uuid CONSTRAINT attempts_request_id_not_null NOT NULL,
    tenant_id text DEFAULT 'default'::text CONSTRAINT attempts_tenant_id_not_null NOT NULL,
    pool text CONSTRAINT attempts_pool_not_null NOT NULL,
    kind text,
    number integer CONSTRAINT attempts_number_not_null NOT NULL,
    claim bigint CONSTRAINT attempts_claim_not_null NOT NULL,
    instance_id text CONSTRAINT attempts_instance_id_not_null NOT NULL,
    model text CONSTRAINT attempts_model_not_null NOT NULL,
    fence_epoch bigint CONSTRAINT attempts_fence_epoch_not_null NOT NULL,
    fence_sequence bigint CONSTRAINT attempts_fence_sequence_not_null NOT NULL,
    outcome text CONSTRAINT attempts_outcome_not_null NOT NULL,
    admitted_at timestamp with time zone,
    finished_at timestamp with time zone,
    queue_ms double precision,
    upstream_ms double precision,
    input_tokens bigint,
    output_tokens bigint,
    thoughts_tokens bigint,
    cached_tokens bigint,
    total_tokens bigint,
    finish_reason text,
    model_version text,
    response_id text,
    failure jsonb,
    first_byte_ms double precision
)
WITH (fillfactor='40');

CREATE TABLE public.attempts_default (
    id uuid CONSTRAINT attempts_id_not_null NOT NULL,
    created_at timestamp with time zone DEFAULT now() CONSTRAINT attempts_created_at_not_null NOT NULL,
    request_id uuid CONSTRAINT attempts_request_id_not_null NOT NULL,
    tenant_id text DEFAULT 'default'::text CONSTRAINT attempts_tenant_id_not_null NOT NULL,
    pool text CONSTRAINT attempts_pool_not_null NOT NULL,
    kind text,
    number integer CONSTRAINT attempts_number_not_null NOT NULL,
    claim bigint CONSTRAINT attempts_claim_not_null NOT NULL,
    instance_id text CONSTRAINT attempts_instance_id_not_null NOT NULL,
    model text CONSTRAINT attempts_model_not_null NOT NULL,
    fence_epoch bigint CONSTRAINT attempts_fence_epoch_not_null NOT NULL,
    fence_sequence bigint CONSTRAINT attempts_fence_sequence_not_null NOT NULL,
    outcome text CONSTRAINT attempts_outcome_not_null NOT NULL,
    admitted_at timestamp with time zone,
    finished_at timestamp with time zone,
    queue_ms double precision,
    upstream_ms double precision,
    input_tokens bigint,
    output_tokens bigint,
    thoughts_tokens bigint,
    cached_tokens bigint,
    total_tokens bigint,
    finish_reason text,
    model_version text,
    response_id text,
    failure jsonb,
    first_byte_ms double precision
);

CREATE TABLE public.audit (
    id uuid NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    request_id uuid NOT NULL,
    tenant_id text DEFAULT 'default'::text NOT NULL,
    pool text NOT NULL,
    source text NOT NULL,
    status text NOT NULL,
    kind text,
    classified_by text NOT NULL,
    classified_reason text NOT NULL,
    priority integer NOT NULL,
    model text,
    model_version text,
    response_id text,
    attempts integer NOT NULL,
    lapses integer NOT NULL,
    instance_id text NOT NULL,
    submitted_at timestamp with time zone NOT NULL,
    admitted_at timestamp with time zone,
    finished_at timestamp with time zone NOT NULL,
    queue_ms double precision,
    upstream_ms double precision,
    input_tokens bigint,
    output_tokens bigint,
    thoughts_tokens bigint,
    cached_tokens bigint,
    total_tokens bigint,
    finish_reason text,
    failure jsonb,
    endpoint text,
    http_status integer,
    streamed boolean,
    key_id text,
    subject text,
    usage_state text,
    cost_micros bigint,
    images integer,
    first_byte_ms double precision
)
PARTITION BY RANGE (created_at);

CREATE TABLE public.audit_20261128 (
    id uuid CONSTRAINT audit_id_not_null NOT NULL,
    created_at timestamp with time zone DEFAULT now() CONSTRAINT audit_created_at_not_null NOT NULL,
    request_id uuid CONSTRAINT audit_request_id_not_null NOT NULL,
    tenant_id text DEFAULT 'default'::text CONSTRAINT audit_tenant_id_not_null NOT NULL,
    pool text CONSTRAINT audit_pool_not_null NOT NULL,
    source text CONSTRAINT audit_source_not_null NOT NULL,
    status text CONSTRAINT audit_status_not_null NOT NULL,
    kind text,
    classified_by text CONSTRAINT audit_classified_by_not_null NOT NULL,
    classified_reason text CONSTRAINT audit_classified_reason_not_null NOT NULL,
    priority integer CONSTRAINT audit_priority_not_null NOT NULL,
    model text,
    model_version text,
    response_id text,
    attempts integer CONSTRAINT audit_attempts_not_null NOT NULL,
    lapses integer CONSTRAINT audit_lapses_not_null NOT NULL,
    instance_id text CONSTRAINT audit_instance_id_not_null NOT NULL,
    submitted_at timestamp with time zone CONSTRAINT audit_submitted_at_not_null NOT NULL,
    admitted_at timestamp with time zone,
    finished_at timestamp with time zone CONSTRAINT audit_finished_at_not_null NOT NULL,
    queue_ms double precision,
    upstream_ms double precision,
    input_tokens bigint,
    output_tokens bigint,
    thoughts_tokens bigint,
    cached_tokens bigint,
    total_tokens bigint,
    finish_reason text,
    failure jsonb,
    endpoint text,
    http_status integer,
    streamed boolean,
    key_id text,
    subject text,
    usage_state text,
    cost_micros bigint,
    images integer,
    first_byte_ms double precision
);

CREATE TABLE public.audit_default (
    id uuid CONSTRAINT audit_id_not_null NOT NULL,
    created_at timestamp with time zone DEFAULT now() CONSTRAINT audit_created_at_not_null NOT NULL,
    request_id uuid CONSTRAINT audit_request_id_not_null NOT NULL,
    tenant_id text DEFAULT 'default'::text CONSTRAINT audit_tenant_id_not_null NOT NULL,
    pool text CONSTRAINT audit_pool_not_null NOT NULL,
    source text CONSTRAINT audit_source_not_null NOT NULL,
    status text CONSTRAINT audit_status_not_null NOT NULL,
    kind text,
    classified_by text CONSTRAINT audit_classified_by_not_null NOT NULL,
    classified_reason text CONSTRAINT audit_classified_reason_not_null NOT NULL,
    priority integer CONSTRAINT audit_priority_not_null NOT NULL,
    model text,
    model_version text,
    response_id text,
    attempts integer CONSTRAINT audit_attempts_not_null NOT NULL,
    lapses integer CONSTRAINT audit_lapses_not_null NOT NULL,
    instance_id text CONSTRAINT audit_instance_id_not_null NOT NULL,
    submitted_at timestamp with time zone CONSTRAINT audit_submitted_at_not_null NOT NULL,
    admitted_at timestamp with time zone,
    finished_at timestamp with time zone CONSTRAINT audit_finished_at_not_null NOT NULL,
    queue_ms double precision,
    upstream_ms double precision,
    input_tokens bigint,
    output_tokens bigint,
    thoughts_tokens bigint,
    cached_tokens bigint,
    total_tokens bigint,
    finish_reason text,
    failure jsonb,
    endpoint text,
    http_status integer,
    streamed boolean,
    key_id text,
    subject text,
    usage_state text,
    cost_micros bigint,
    images integer,
    first_byte_ms double precision
);

CREATE TABLE public.batch_files (
    id uuid NOT NULL,
    tenant_id text NOT NULL,
    purpose text NOT NULL,
    name text NOT NULL,
    size_bytes bigint NOT NULL,
    lines integer NOT NULL,
    blob_key text NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    CONSTRAINT batch_files_purpose_check CHECK ((purpose = ANY (ARRAY['batch'::text, 'batch_output'::text])))
);

CREATE TABLE public.batch_lines (
    batch_id uuid NOT NULL,
    line integer NOT NULL,
    id uuid NOT NULL,
    tenant_id text NOT NULL,
    custom_id text NOT NULL,
    body text NOT NULL,
    size_bytes integer NOT NULL,
    state text DEFAULT 'queued'::text NOT NULL,
    claim bigint DEFAULT 0 NOT NULL,
    claimed_by text,
    attempts integer DEFAULT 0 NOT NULL,
    lapses integer DEFAULT 0 NOT NULL,
    not_before timestamp with time zone,
    status_code integer,
    answer text,
    failure jsonb,
    CONSTRAINT batch_lines_state_check CHECK ((state = ANY (ARRAY['queued'::text, 'claimed'::text, 'calling'::text, 'succeeded'::text, 'failed'::text])))
)
WITH (fillfactor='85', autovacuum_vacuum_scale_factor='0.02');

CREATE TABLE public.batches (
    id uuid NOT NULL,
    tenant_id text NOT NULL,
    endpoint text NOT NULL,
    input_file_id uuid NOT NULL,
    input_blob text NOT NULL,
    input_bytes bigint NOT NULL,
    completion_window text NOT NULL,
    metadata jsonb,
    models text[],
    key_id text,
    status text DEFAULT 'validating'::text NOT NULL,
    ends_as text DEFAULT 'completed'::text NOT NULL,
    total integer NOT NULL,
    completed integer DEFAULT 0 NOT NULL,
    failed integer DEFAULT 0 NOT NULL,
    errors jsonb,
    output_file_id uuid,
    error_file_id uuid,
    claim bigint DEFAULT 0 NOT NULL,
    claimed_by text,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    expires_at timestamp with time zone NOT NULL,
    in_progress_at timestamp with time zone,
    finalizing_at timestamp with time zone,
    completed_at timestamp with time zone,
    failed_at timestamp with time zone,
    expired_at timestamp with time zone,
    cancelling_at timestamp with time zone,
    cancelled_at timestamp with time zone,
    CONSTRAINT batches_status_check CHECK ((status = ANY (ARRAY['validating'::text, 'failed'::text, 'in_progress'::text, 'finalizing'::text, 'completed'::text, 'expired'::text, 'cancelling'::text, 'cancelled'::text])))
);

CREATE TABLE public.bodies (
    id uuid NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    role text NOT NULL,
    tenant_id text DEFAULT 'default'::text NOT NULL,
    pool text NOT NULL,
    encoding text NOT NULL,
    size_bytes bigint NOT NULL,
    data bytea,
    blob_key text,
    content_type text,
    omitted_bytes bigint DEFAULT 0 NOT NULL,
    CONSTRAINT bodies_check CHECK (((data IS NULL) <> (blob_key IS NULL))),
    CONSTRAINT bodies_role_check CHECK ((role = ANY (ARRAY['request'::text, 'response'::text])))
)
PARTITION BY RANGE (created_at);
ALTER TABLE ONLY public.bodies ALTER COLUMN data SET STORAGE EXTERNAL;

CREATE TABLE public.bodies_20261128 (
    id uuid CONSTRAINT bodies_id_not_null NOT NULL,
    created_at timestamp with time zone DEFAULT now() CONSTRAINT bodies_created_at_not_null NOT NULL,
    role text CONSTRAINT bodies_role_not_null NOT NULL,
    tenant_id text DEFAULT 'default'::text CONSTRAINT bodies_tenant_id_not_null NOT NULL,
    pool text CONSTRAINT bodies_pool_not_null NOT NULL,
    encoding text CONSTRAINT bodies_encoding_not_null NOT NULL,
    size_bytes bigint CONSTRAINT bodies_size_bytes_not_null NOT NULL,
    data bytea,
    blob_key text,
    content_type text,
    omitted_bytes bigint DEFAULT 0 CONSTRAINT bodies_omitted_bytes_not_null NOT NULL,
    CONSTRAINT bodies_check CHECK (((data IS NULL) <> (blob_key IS NULL))),
    CONSTRAINT bodies_role_check CHECK ((role = ANY (ARRAY['request'::text, 'response'::text])))
);
ALTER TABLE ONLY public.bodies_20261128 ALTER COLUMN data SET STORAGE EXTERNAL;

CREATE TABLE public.bodies_default (
    id uuid CONSTRAINT bodies_id_not_null NOT NULL,
    created_at timestamp with time zone DEFAULT now() CONSTRAINT bodies_created_at_not_null NOT NULL,
    role text CONSTRAINT bodies_role_not_null NOT NULL,
    tenant_id text DEFAULT 'default'::text CONSTRAINT bodies_tenant_id_not_null NOT NULL,
    pool text CONSTRAINT bodies_pool_not_null NOT NULL,
    encoding text CONSTRAINT bodies_encoding_not_null NOT NULL,
    size_bytes bigint CONSTRAINT bodies_size_bytes_not_null NOT NULL,
    data bytea,
    blob_key text,
    content_type text,
    omitted_bytes bigint DEFAULT 0 CONSTRAINT bodies_omitted_bytes_not_null NOT NULL,
    CONSTRAINT bodies_check CHECK (((data IS NULL) <> (blob_key IS NULL))),
    CONSTRAINT bodies_role_check CHECK ((role = ANY (ARRAY['request'::text, 'response'::text])))
);
ALTER TABLE ONLY public.bodies_default ALTER COLUMN data SET STORAGE EXTERNAL;

CREATE TABLE public.erased (
    id uuid NOT NULL,
    tenant_id text,
    subject_digest bytea,
    erased_at timestamp with time zone DEFAULT now() NOT NULL,
    CONSTRAINT erased_check CHECK (((tenant_id IS NOT NULL) OR (subject_digest IS NOT NULL)))
);

CREATE TABLE public.files (
    id uuid NOT NULL,
    request_id uuid NOT NULL,
    tenant_id text DEFAULT 'default'::text NOT NULL,
    role text NOT NULL,
    "position" integer NOT NULL,
    name text NOT NULL,
    mime_type text NOT NULL,
    size_bytes bigint NOT NULL,
    blob_key text NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    CONSTRAINT files_role_check CHECK ((role = ANY (ARRAY['input'::text, 'output'::text])))
);

CREATE TABLE public.history (
    step_s integer NOT NULL,
    at timestamp with time zone NOT NULL,
    pool text NOT NULL,
    instance_id text NOT NULL,
    counts jsonb NOT NULL,
    apart jsonb NOT NULL,
    waits bytea NOT NULL,
    lengths bytea NOT NULL
)
WITH (fillfactor='50');

CREATE TABLE public.keys (
    prefix text NOT NULL,
    tenant_id text NOT NULL,
    digest bytea NOT NULL,
    name text DEFAULT ''::text NOT NULL,
    scopes text[] NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    expires_at timestamp with time zone,
    revoked_at timestamp with time zone,
    last_used_at timestamp with time zone,
    CONSTRAINT keys_digest_check CHECK ((octet_length(digest) = 32))
);

CREATE TABLE public.native_keys (
    tenant_id text NOT NULL,
    idempotency_key text NOT NULL,
    digest bytea NOT NULL,
    request_id uuid NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    ended_at timestamp with time zone,
    http_status integer,
    content_type text,
    answer bytea
);

CREATE TABLE public.policies (
    pool text NOT NULL,
    revision bigint NOT NULL,
    origin text NOT NULL,
    digest text NOT NULL,
    policy jsonb NOT NULL,
    set_by text NOT NULL,
    reason text DEFAULT ''::text NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    CONSTRAINT policies_origin_check CHECK ((origin = ANY (ARRAY['deployment'::text, 'live'::text])))
);

CREATE UNLOGGED TABLE public.queued (
    tenant_id text NOT NULL,
    pool text NOT NULL,
    jobs bigint NOT NULL,
    size_bytes bigint NOT NULL,
    counted_at timestamp with time zone NOT NULL,
    count_ms double precision NOT NULL
)
WITH (fillfactor='50');

CREATE TABLE public.requests (
    id uuid NOT NULL,
    tenant_id text DEFAULT 'default'::text NOT NULL,
    pool text NOT NULL,
    source text NOT NULL,
    status text NOT NULL,
    kind text,
    lane text GENERATED ALWAYS AS (COALESCE(kind, 'unsure'::text)) STORED,
    classified_by text NOT NULL,
    classified_reason text NOT NULL,
    prompt text NOT NULL,
    image_uri text,
    model text,
    used_model text,
    priority integer DEFAULT 0 NOT NULL,
    idempotency_key text,
    created_at timestamp with time zone NOT NULL,
    deadline_at timestamp with time zone,
    not_before timestamp with time zone,
    admitted_at timestamp with time zone,
    finished_at timestamp with time zone,
    claim bigint DEFAULT 0 NOT NULL,
    claimed_by text,
    lapses integer DEFAULT 0 NOT NULL,
    attempts integer DEFAULT 0 NOT NULL,
    attempt_id uuid,
    attempt_at timestamp with time zone,
    queue_ms double precision,
    upstream_ms double precision,
    result text,
    input_tokens bigint,
    output_tokens bigint,
    thoughts_tokens bigint,
    cached_tokens bigint,
    total_tokens bigint,
    finish_reason text,
    failure jsonb,
    version bigint DEFAULT 1 NOT NULL,
    idempotency_digest bytea,
    cancel_asked_at timestamp with time zone,
    webhook_url text,
    endpoint text,
    subject text,
    ready_xid bigint DEFAULT ((pg_current_xact_id())::text)::bigint NOT NULL,
    first_byte_ms double precision,
    traceparent text,
    CONSTRAINT requests_source_check CHECK ((source = ANY (ARRAY['job'::text, 'stream'::text]))),
    CONSTRAINT requests_status_check CHECK ((status = ANY (ARRAY['queued'::text, 'running'::text, 'succeeded'::text, 'failed'::text, 'cancelled'::text, 'expired'::text, 'dead'::text])))
)
WITH (fillfactor='85', autovacuum_vacuum_scale_factor='0.02', autovacuum_vacuum_insert_scale_factor='0.05');

CREATE TABLE public.tenants (
    id text NOT NULL,
    most_priority integer DEFAULT 100 NOT NULL,
    models text[],
    most_queued_jobs bigint,
    most_queued_bytes bigint,
    most_streams integer,
    most_long_polls integer,
    budget_day_money numeric(20,6),
    budget_month_money numeric(20,6),
    budget_day_tokens bigint,
    budget_month_tokens bigint,
    retention_days integer,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    disabled_at timestamp with time zone,
    CONSTRAINT tenants_budget_day_money_check CHECK ((budget_day_money >= (0)::numeric)),
    CONSTRAINT tenants_budget_day_tokens_check CHECK ((budget_day_tokens >= 0)),
    CONSTRAINT tenants_budget_month_money_check CHECK ((budget_month_money >= (0)::numeric)),
    CONSTRAINT tenants_budget_month_tokens_check CHECK ((budget_month_tokens >= 0)),
    CONSTRAINT tenants_most_long_polls_check CHECK ((most_long_polls >= 0)),
    CONSTRAINT tenants_most_priority_check CHECK (((most_priority >= '-100'::integer) AND (most_priority <= 100))),
    CONSTRAINT tenants_most_queued_bytes_check CHECK ((most_queued_bytes >= 0)),
    CONSTRAINT tenants_most_queued_jobs_check CHECK ((most_queued_jobs >= 0)),
    CONSTRAINT tenants_most_streams_check CHECK ((most_streams >= 0)),
    CONSTRAINT tenants_retention_days_check CHECK ((retention_days >= 1))
);

CREATE TABLE public.usage_days (
    tenant_id text NOT NULL,
    day date NOT NULL,
    model text NOT NULL,
    pool text NOT NULL,
    requests bigint DEFAULT 0 NOT NULL,
    input_tokens bigint DEFAULT 0 NOT NULL,
    output_tokens bigint DEFAULT 0 NOT NULL,
    cached_tokens bigint DEFAULT 0 NOT NULL,
    thoughts_tokens bigint DEFAULT 0 NOT NULL,
    images bigint DEFAULT 0 NOT NULL,
    cost_micros bigint DEFAULT 0 NOT NULL,
    unpriced bigint DEFAULT 0 NOT NULL,
    partial bigint DEFAULT 0 NOT NULL,
    estimated bigint DEFAULT 0 NOT NULL,
    unknown bigint DEFAULT 0 NOT NULL
)
WITH (fillfactor='50');

CREATE TABLE public.webhooks (
    id uuid NOT NULL,
    request_id uuid NOT NULL,
    tenant_id text DEFAULT 'default'::text NOT NULL,
    pool text NOT NULL,
    event text NOT NULL,
    url text NOT NULL,
    state text DEFAULT 'pending'::text NOT NULL,
    tries integer DEFAULT 0 NOT NULL,
    due_at timestamp with time zone DEFAULT now() NOT NULL,
    answer_status integer,
    problem text,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    ended_at timestamp with time zone,
    CONSTRAINT webhooks_state_check CHECK ((state = ANY (ARRAY['pending'::text, 'delivered'::text, 'given_up'::text])))
);

CREATE TABLE public.workers (
    instance_id text NOT NULL,
    seen_at timestamp with time zone DEFAULT now() NOT NULL
);
ALTER TABLE ONLY public.attempts ATTACH PARTITION public.attempts_20261128 FOR VALUES FROM ('2026-11-28 00:00:00+00') TO ('2026-11-29 00:00:00+00');
ALTER TABLE ONLY public.attempts ATTACH PARTITION public.attempts_default DEFAULT;
ALTER TABLE ONLY public.audit ATTACH PARTITION public.audit_20261128 FOR VALUES FROM ('2026-11-28 00:00:00+00') TO ('2026-11-29 00:00:00+00');
ALTER TABLE ONLY public.audit ATTACH PARTITION public.audit_default DEFAULT;
ALTER TABLE ONLY public.bodies ATTACH PARTITION public.bodies_20261128 FOR VALUES FROM ('2026-11-28 00:00:00+00') TO ('2026-11-29 00:00:00+00');
ALTER TABLE ONLY public.bodies ATTACH PARTITION public.bodies_default DEFAULT;
INSERT INTO public.access VALUES (1, 6);
INSERT INTO public.alembic_version VALUES ('0012');
INSERT INTO public.attempts_20261128 VALUES ('01a21f92-7c54-78d1-bf26-d8188401b7da', '2026-11-28 00:33:43.509147+00', '01a21f92-7c14-72e3-af4d-4bc9665cc2f7', 'default', 'gemini', 'text_only', 1, 1, 'worker-host-19059-6d40f388', 'gemini-2.5-flash', 1795826016703, 5000, 'succeeded', '2026-11-28 00:33:43.508741+00', '2026-11-28 00:33:43.722837+00', 75.986, 196.39706300222315, 5, 40, NULL, NULL, 45, 'STOP', 'gemini-2.5-flash', 'emulated-1', NULL, 8.776524002314545);
INSERT INTO public.attempts_20261128 VALUES ('01a21f92-7d8a-7b8c-9a11-9c0f051a2132', '2026-11-28 00:33:43.821134+00', '01a21f92-7c88-7c2a-b8be-7b669b547389', 'acme', 'gemini', 'multi_modal', 1, 1, 'worker-host-19059-6d40f388', 'gemini-2.5-flash', 1795826016703, 7000, 'succeeded', '2026-11-28 00:33:43.818828+00', '2026-11-28 00:33:43.859923+00', 354.488, 21.136494993697852, 10, 50, NULL, NULL, 60, 'STOP', 'gemini-2.5-flash', 'emulated-3', NULL, 7.993990002432838);
INSERT INTO public.attempts_20261128 VALUES ('01a21f92-7e05-769f-88ed-2f20944ac4cd', '2026-11-28 00:33:43.909583+00', '01a21f92-7d0c-7cbd-822b-50c86c0d49ba', 'default', 'gemini', 'text_only', 1, 0, 'api-host-19058-335811ab', 'gemini-2.5-flash', 1795826016703, 9000, 'succeeded', '2026-11-28 00:33:43.890759+00', '2026-11-28 00:33:43.908399+00', 198.754, 17.44364701153245, 6, 42, NULL, NULL, 48, 'STOP', 'gemini-2.5-flash', 'emulated-5', NULL, 14.135059987893328);
INSERT INTO public.attempts_20261128 VALUES ('01a21f92-7dae-72b1-929b-f4ede11d1ad7', '2026-11-28 00:33:43.855053+00', '01a21f92-7ccb-720f-9fd2-18555383e6fe', 'acme', 'gemini', 'image_generation', 1, 1, 'worker-host-19059-6d40f388', 'gemini-2.5-flash-image', 1795826016703, 8000, 'succeeded', '2026-11-28 00:33:43.85403+00', '2026-11-28 00:33:43.933048+00', 227.145, 50.62321000150405, 8, 1302, NULL, NULL, 1310, 'STOP', 'gemini-2.5-flash-image', 'emulated-4', NULL, 16.285186997265555);
INSERT INTO public.attempts_20261128 VALUES ('01a21f92-7e13-7810-8430-fb236ebd56b5', '2026-11-28 00:33:43.956409+00', '01a21f92-7ce6-77ec-89c8-5d6c0ee7d3aa', 'acme', 'gemini', 'text_only', 1, 1, 'worker-host-19059-6d40f388', 'gemini-2.5-flash', 1795826016703, 10000, 'succeeded', '2026-11-28 00:33:43.955833+00', '2026-11-28 00:33:43.973365+00', 301.82399999999996, 3.7032130057923496, 3, 39, 0, 0, 42, 'stop', NULL, 'chatcmpl-emulated-6', NULL, 1.9882009946741164);
INSERT INTO public.audit_20261128 VALUES ('01a21f92-7d48-7b1e-a975-083ce13c1f34', '2026-11-28 00:33:43.725541+00', '01a21f92-7c14-72e3-af4d-4bc9665cc2f7', 'default', 'gemini', 'job', 'succeeded', 'text_only', 'rules', 'asks for words', 5, 'gemini-2.5-flash', 'gemini-2.5-flash', 'emulated-1', 1, 0, 'worker-host-19059-6d40f388', '2026-11-28 00:33:43.432674+00', '2026-11-28 00:33:43.50866+00', '2026-11-28 00:33:43.722837+00', 75.986, 196.39706300222315, 5, 40, NULL, NULL, 45, 'STOP', NULL, NULL, NULL, NULL, NULL, NULL, 'told', NULL, 0, 8.776524002314545);
INSERT INTO public.audit_20261128 VALUES ('01a21f92-7dc7-7a6e-9fd5-33bb98436738', '2026-11-28 00:33:43.861534+00', '01a21f92-7c88-7c2a-b8be-7b669b547389', 'acme', 'gemini', 'job', 'succeeded', 'multi_modal', 'rules', 'files are attached, and none is an image', 0, 'gemini-2.5-flash', 'gemini-2.5-flash', 'emulated-3', 1, 0, 'worker-host-19059-6d40f388', '2026-11-28 00:33:43.464274+00', '2026-11-28 00:33:43.818762+00', '2026-11-28 00:33:43.859923+00', 354.488, 21.136494993697852, 10, 50, NULL, NULL, 60, 'STOP', NULL, NULL, NULL, NULL, NULL, NULL, 'told', NULL, 0, 7.993990002432838);
INSERT INTO public.audit_20261128 VALUES ('01a21f92-7e08-7d79-a19b-7c614df9206d', '2026-11-28 00:33:43.909583+00', '01a21f92-7d0c-7cbd-822b-50c86c0d49ba', 'default', 'gemini', 'stream', 'succeeded', 'text_only', 'llm', 'Emulated: decided by a few words of the prompt.', 0, 'gemini-2.5-flash', 'gemini-2.5-flash', 'emulated-5', 1, 0, 'api-host-19058-335811ab', '2026-11-28 00:33:43.692005+00', '2026-11-28 00:33:43.890759+00', '2026-11-28 00:33:43.908946+00', 198.754, 17.44364701153245, 6, 42, NULL, NULL, 48, 'STOP', NULL, NULL, NULL, NULL, NULL, NULL, 'told', NULL, 0, 14.135059987893328);
INSERT INTO public.audit_20261128 VALUES ('01a21f92-7e1e-7bcb-b0aa-91d761e819d8', '2026-11-28 00:33:43.956362+00', '01a21f92-7cfb-733e-a1a4-eec33cbfcee0', 'acme', 'gemini', 'job', 'expired', 'text_only', 'rules', 'asks for words', 0, NULL, NULL, NULL, 0, 0, 'worker-host-19059-6d40f388', '2026-11-28 00:33:43.674794+00', NULL, '2026-11-28 00:33:43.953915+00', NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, '{"code": "deadline_exceeded", "message": "its deadline came while it waited", "retryable": false, "retry_after_ms": null, "upstream_status": null}', NULL, NULL, NULL, NULL, NULL, 'none', 0, NULL, NULL);
INSERT INTO public.audit_20261128 VALUES ('01a21f92-7e39-7f6a-8484-3bb82cec8ad2', '2026-11-28 00:33:43.982625+00', '01a21f92-7ccb-720f-9fd2-18555383e6fe', 'acme', 'gemini', 'job', 'succeeded', 'image_generation', 'rules', 'asks for a picture', 0, 'gemini-2.5-flash-image', 'gemini-2.5-flash-image', 'emulated-4', 1, 0, 'worker-host-19059-6d40f388', '2026-11-28 00:33:43.626838+00', '2026-11-28 00:33:43.853983+00', '2026-11-28 00:33:43.933048+00', 227.145, 50.62321000150405, 8, 1302, NULL, NULL, 1310, 'STOP', NULL, NULL, NULL, NULL, NULL, 'patient-1', 'told', NULL, 1, 16.285186997265555);
INSERT INTO public.audit_20261128 VALUES ('01a21f92-7e39-727f-b0c5-0dde0835a89f', '2026-11-28 00:33:43.982625+00', '01a21f92-7ce6-77ec-89c8-5d6c0ee7d3aa', 'acme', 'gemini', 'job', 'succeeded', 'text_only', 'body', '/v1/chat/completions', 0, 'gemini-2.5-flash', NULL, 'chatcmpl-emulated-6', 1, 0, 'worker-host-19059-6d40f388', '2026-11-28 00:33:43.653962+00', '2026-11-28 00:33:43.955786+00', '2026-11-28 00:33:43.973365+00', 301.82399999999996, 3.7032130057923496, 3, 39, 0, 0, 42, 'stop', NULL, NULL, NULL, NULL, NULL, NULL, 'told', NULL, NULL, 1.9882009946741164);
INSERT INTO public.audit_20261128 VALUES ('01a21f92-7e36-71dc-8197-3d040fd1ac65', '2026-11-28 00:33:43.990733+00', '01a21f92-7e36-71dc-8197-3d040fd1ac65', 'default', 'gemini', 'relay', 'succeeded', 'text_only', 'body', '', 0, 'gemini-2.5-flash', NULL, 'chatcmpl-emulated-7', 1, 0, 'api-host-19058-335811ab', '2026-11-28 00:33:43.990733+00', '2026-11-28 00:33:44.010515+00', '2026-11-28 00:33:44.018929+00', 4.136323004961014, 8.377211997867562, 3, 39, 0, 0, 42, 'stop', NULL, '/v1/chat/completions', 200, false, '3ktmxnlp61', NULL, 'told', NULL, NULL, 6.884033005917445);
INSERT INTO public.audit_20261128 VALUES ('01a21f92-7e5b-7fba-8b07-9f0e91829bf2', '2026-11-28 00:33:44.027314+00', '01a21f92-7e5b-7fba-8b07-9f0e91829bf2', 'default', 'gemini', 'relay', 'succeeded', 'text_only', 'body', '', 0, 'no-such-model', NULL, 'chatcmpl-emulated-8', 1, 0, 'api-host-19058-335811ab', '2026-11-28 00:33:44.027314+00', '2026-11-28 00:33:44.028184+00', '2026-11-28 00:33:44.030294+00', 0, 2.087353990646079, 3, 39, 0, 0, 42, 'stop', NULL, '/v1/chat/completions', 200, false, '3ktmxnlp61', NULL, 'told', NULL, NULL, 1.860524993389845);
INSERT INTO public.audit_20261128 VALUES ('01a21f92-7ea2-7bd4-b983-ada72462eec5', '2026-11-28 00:33:44.150016+00', '01a21f92-7ea2-7bd4-b983-ada72462eec5', 'default', 'gemini', 'batch', 'succeeded', 'text_only', 'body', '', -100, 'gemini-2.5-flash', NULL, 'chatcmpl-emulated-10', 1, 0, 'worker-host-19059-6d40f388', '2026-11-28 00:33:44.150016+00', '2026-11-28 00:33:44.136606+00', '2026-11-28 00:33:44.149797+00', 1.2017340064048767, 3.4559330088086426, 3, 40, 0, 0, 43, 'stop', NULL, '/v1/chat/completions', 200, false, '3ktmxnlp61', NULL, 'told', NULL, NULL, 3.0950279906392097);
INSERT INTO public.audit_20261128 VALUES ('01a21f92-7ea2-7448-a4cb-add192744024', '2026-11-28 00:33:44.155977+00', '01a21f92-7ea2-7448-a4cb-add192744024', 'default', 'gemini', 'batch', 'succeeded', 'text_only', 'body', '', -100, 'gemini-2.5-flash', NULL, 'chatcmpl-emulated-11', 1, 0, 'worker-host-19059-6d40f388', '2026-11-28 00:33:44.155977+00', '2026-11-28 00:33:44.136733+00', '2026-11-28 00:33:44.155827+00', 1.0933690071105957, 9.371617008582689, 3, 40, 0, 0, 43, 'stop', NULL, '/v1/chat/completions', 200, false, '3ktmxnlp61', NULL, 'told', NULL, NULL, 8.35502399422694);
INSERT INTO public.batch_files VALUES ('01a21f92-7e6f-733e-b484-49208d58d2f3', 'default', 'batch', 'lines.jsonl', 338, 2, '2026-11-28/01a21f92-7e6f-75aa-9a17-a866758b0ee2', '2026-11-28 00:33:44.0584+00');
INSERT INTO public.batch_files VALUES ('01a21f92-80ea-76e0-b0d4-b6b5fe599730', 'default', 'batch_output', 'batch_01a21f927e84735c9015e16b3644a99e_output.jsonl', 1864, 2, '2026-11-28/01a21f92-80df-7370-8bff-361721b4eae0', '2026-11-28 00:33:44.68252+00');
INSERT INTO public.batch_files VALUES ('01a21f93-0373-7fc3-ba22-2140d6bbed99', 'default', 'batch', 'lines.jsonl', 338, 2, '2026-11-28/01a21f93-0373-7e20-bf4a-6c147a62a94c', '2026-11-28 00:34:18.114472+00');
INSERT INTO public.batch_lines VALUES ('01a21f93-0399-7aa1-8165-4edc266703fc', 1, '01a21f93-03a3-730f-8fc4-d0075720aea1', 'default', 'line-1', '{"model":"gemini-2.5-flash","messages":[{"role":"user","content":"Count to 1"}]}', 80, 'claimed', 1, 'worker-host-19781-a6e15afd', 0, 0, NULL, NULL, NULL, NULL);
INSERT INTO public.batch_lines VALUES ('01a21f93-0399-7aa1-8165-4edc266703fc', 2, '01a21f93-03a3-7d27-a994-1a13d6e27539', 'default', 'line-2', '{"model":"gemini-2.5-flash","messages":[{"role":"user","content":"Count to 2"}]}', 80, 'claimed', 1, 'worker-host-19781-a6e15afd', 0, 0, NULL, NULL, NULL, NULL);
INSERT INTO public.batches VALUES ('01a21f92-7e84-735c-9015-e16b3644a99e', 'default', '/v1/chat/completions', '01a21f92-7e6f-733e-b484-49208d58d2f3', '2026-11-28/01a21f92-7e6f-75aa-9a17-a866758b0ee2', 338, '24h', '{"night": "run"}', NULL, '3ktmxnlp61', 'completed', 'completed', 2, 2, 0, NULL, '01a21f92-80ea-76e0-b0d4-b6b5fe599730', NULL, 2, NULL, '2026-11-28 00:33:44.068245+00', '2026-11-29 00:33:44.068245+00', '2026-11-28 00:33:44.110441+00', '2026-11-28 00:33:44.161692+00', '2026-11-28 00:33:44.68252+00', NULL, NULL, NULL, NULL);
INSERT INTO public.batches VALUES ('01a21f93-0399-7aa1-8165-4edc266703fc', 'default', '/v1/chat/completions', '01a21f93-0373-7fc3-ba22-2140d6bbed99', '2026-11-28/01a21f93-0373-7e20-bf4a-6c147a62a94c', 338, '24h', '{"night": "run"}', NULL, '3ktmxnlp61', 'in_progress', 'completed', 2, 0, 0, NULL, NULL, NULL, 1, NULL, '2026-11-28 00:34:18.137692+00', '2026-11-29 00:34:18.137692+00', '2026-11-28 00:34:18.153896+00', NULL, NULL, NULL, NULL, NULL, NULL);
INSERT INTO public.bodies_20261128 VALUES ('01a21f92-7d48-7b1e-a975-083ce13c1f34', '2026-11-28 00:33:43.725541+00', 'request', 'default', 'gemini', 'zlib', 71, '\x4889ab562a28cacf2d2851b25272ad28c849cccc5328c9485528c94c49d553d251cacc4d4c4f8d2f2dca54b2ca2bcdc9d151cacd4f49cd8171d23273528b95aca2636b0177021885', NULL, NULL, 0);
INSERT INTO public.bodies_20261128 VALUES ('01a21f92-7d48-7b1e-a975-083ce13c1f34', '2026-11-28 00:33:43.725541+00', 'response', 'default', 'gemini', 'zlib', 265, '\x4889258f416ac3400c45aff299b5f101bcebc21453da06924d28c5a8b592193c1e85997127a1147290f6723949e51884f8a0afa7af6f93f99c4d63f63283d2c84383dbf5b73d9f3cb9806c19d90d5cdfae7f3576d6256851004fb3a7cc83ea54383608024fe138d39131c9c01e85d24aacd165242b25298ff21d5aac78ed74419138a60a8728132e1a220b08a7285f7a362a7ec0077d8ed5e25379f72b71cb198fed73f7d2f50f9bae7f6af7cba2658a2b891099fc9aa436953938cfc9346fef8b0c2ed95ee749827ebeddbd6ecccf3f99e95cd9', NULL, NULL, 0);
INSERT INTO public.bodies_20261128 VALUES ('01a21f92-7dc7-7a6e-9fd5-33bb98436738', '2026-11-28 00:33:43.861534+00', 'request', 'acme', 'gemini', 'zlib', 194, '\x4889354d4b0a833014bc4ac85adb26d28aae7b8b52424c9eed83fc304fd08a776f2c7433cc8f998da729fa44bce777c866c20118bd31331bcdec2110c3c02c9046c72b8e5ebf40cd13f23eccce55dc470bee2f46749079ffd87e4ca12da317a1a5183b59b7a62970bd357527455bc3d80a6d404aa32f6538680fa51d22c189162a8e470f8ad674d8040b9d93d3184a90f1036a58e9b86af7e7fe0594b83fa0', NULL, NULL, 0);
INSERT INTO public.bodies_20261128 VALUES ('01a21f92-7dc7-7a6e-9fd5-33bb98436738', '2026-11-28 00:33:43.861534+00', 'response', 'acme', 'gemini', 'zlib', 323, '\x48892590d14ac34010457fe5b24f0a21e2939037c122a1a88516a488844976da2cd9ec96dd893188d00fd19feb97b831300c17eeccdcc37c29e14f5185dafb01143bd6052ee79f078e4d3035435a13a17d33f4ec04c641b390b197f36f8eddeca52207ee074bc23ae9387228e03c2cb9e3404746ef355b8c1497801caf465a1841433de3160763b9c0cc7173b29432aeee504fc2f13a472988ad1f630221498d31b6dea64e13461fba98e1107c8f29e18b07e114fc87d11c1289464d4d97cd7349fecfa7f02d0b1e574fe57359dd6fca6abddacf8b2d53582e1102935da07395a9992eaae2ed7d96cec4b64a7ef42efd6cbb7bd9a8ef3f392a70b4', NULL, NULL, 0);
INSERT INTO public.bodies_20261128 VALUES ('01a21f92-7e08-7d79-a19b-7c614df9206d', '2026-11-28 00:33:43.909583+00', 'request', 'default', 'gemini', 'zlib', 89, '\x48890dcb310a80300c05d0ab843fab83e0d26b388a48c058038995560711ef6ef7f75e9c39f9792160e48776314bc48598ca95851d0dd439ca726745386eb3069e56b11aa2b81edaf6ddd06ec665af7653938230cddf0f559d1de0', NULL, NULL, 0);
INSERT INTO public.bodies_20261128 VALUES ('01a21f92-7e08-7d79-a19b-7c614df9206d', '2026-11-28 00:33:43.909583+00', 'response', 'default', 'gemini', 'zlib', 269, '\x4889254fd16ac3300cfc95c3cf211f90b73d9411c6b642fa52c608daacd6218e556c675e19837ec8f673fd92c92b08714877a7d397c9fc994d67f6b282d2ccb6c3f5f233d0198ebd179d819072645aae97df163b37256851002faba7cc56712a1c3b0481a7705ce9c858c4b247a9f2eadaa2cf484e4a427694b5318a13af5d4f1589736a7088b2e0ac41b2dec529cac76439aabdc51bbdcf4de529fce7abe3c019f79bc7fea91fefb6fdf8b0d957a1638a372782a6f6b724ad69cc61f29c4cf7f25a6198921b759f24e8f7c3ee796bbeff00061a5e35', NULL, NULL, 0);
INSERT INTO public.bodies_20261128 VALUES ('01a21f92-7e1e-7bcb-b0aa-91d761e819d8', '2026-11-28 00:33:43.956362+00', 'request', 'acme', 'gemini', 'zlib', 71, '\x4889ab562a28cacf2d2851b25272ad28c849cccc5328c94855c8cdcfcfd353d251cacc4d4c4f8d2f2dca54b2ca2bcdc9d151cacd4f49cd8171d23273528b95aca2636b017a5b1898', NULL, NULL, 0);
INSERT INTO public.bodies_20261128 VALUES ('01a21f92-7e39-7f6a-8484-3bb82cec8ad2', '2026-11-28 00:33:43.982625+00', 'request', 'acme', 'gemini', 'zlib', 85, '\x4889ab562a28cacf2d2851b252724fcd4b2d4a2c495548cc53c8cc4d4c4f55c84f534854c8482c4aca2f2dd253d251028bc69716652a59e595e6e4e828e5e6a7a4e6c038699939a9c54a56d1b1b500f1851d53', NULL, NULL, 0);
INSERT INTO public.bodies_20261128 VALUES ('01a21f92-7e39-7f6a-8484-3bb82cec8ad2', '2026-11-28 00:33:43.982625+00', 'response', 'acme', 'gemini', 'zlib', 208, '\x48891d8d410e82301444afd2742d481b94c00574a789ee8c21bff20b4da090b6242221e1207a394e6261379999373352876f47337a46834459029a60d3d7e0b0209d7ab9dedbb2356499bf27d4687cb076540325925612201518d1f6265ce65f487754aa1a2dcd1ee3a67255f8f188016732e541820c82441622488b431c4860e991895800241e6d5483b91b3af4c876b0ef74e97dab3e988bc1adbb3c8a389f9eeb8f56b6ca0d826db5076ef7cb954e7f337b4592', NULL, NULL, 0);
INSERT INTO public.bodies_20261128 VALUES ('01a21f92-7e39-727f-b0c5-0dde0835a89f', '2026-11-28 00:33:43.982625+00', 'request', 'acme', 'gemini', 'zlib', 138, '\x48891dca410ac3201040d1ab9459279516b2c935baac5d589d44619c09195308c1bb57dcfeff2e400e9b242e3083f93d8c8fae182f79232c49586180af84b3ddcb4296806461b6b0624e9cc6e77d1a17721a2d0c6da3aa5b519b7837bd0b61c787e2de81172ec8a5c7973b6f1189c442fd54a87fac3a2eb1', NULL, NULL, 0);
INSERT INTO public.bodies_20261128 VALUES ('01a21f92-7e39-727f-b0c5-0dde0835a89f', '2026-11-28 00:33:43.982625+00', 'response', 'acme', 'gemini', 'zlib', 870, '\x48897d53c16adc3010fd954167afd96e9ab4d95b0fa12ca5a5905e421d8c561adbeaca92d1c8719660c887b43f972fe9c8ce66b3a52d1823cfbc794ff366fc2022de47b1160f8530ba10eb42a84646d57676816d6f6544bdb828445608bffd812abe4072e51984d17837a555c004e6fc9b7797e7ef5717cbd519875bafd14e4535b6c699c52a3f5f545652335511863ba3b08c06c384d258c9dec639b9a7886d59195763e88271b37ad59587abcdca8d670ae2dcf7d485d378cfe76512472259237f7122788b53bd243214a59b459477119f996f7c0f9276a8d7f0f4f8f35aeea1416bfdd3e3af1cbe3586801fe9e0a0ce671a30acc179b0d2d53d6bc1d4300c9266a61c3611a8f1034164d7f88530347c1586ec61f061471954c1b7b067f1e8414217fc9dd118985ec356aa5d96707c9cf0cc788d113e5e7dde7cd9941fbe6eca4f5737a9b041196626093c0b3bdf249f9a0c58f524d31c5c6fedc811eb6bd6d9d27388236cb3a1a6e4524a23653b28faae10e32d27fba38f5cd676b18c7e872e959f4d261e76e155fc9213d147698fb1b7abec0f82526394c6d2ccada46a501ff16988b2d7c6bf0a8d7fd33ba5997be0b5f93f530a29851d8fb2ec026aa34e3b584ecea5adff17601c4791b1731689b7ef363b35917fab64a1187f034e6f3377', NULL, NULL, 0);
INSERT INTO public.bodies_20261128 VALUES ('01a21f92-7e36-71dc-8197-3d040fd1ac65', '2026-11-28 00:33:43.990733+00', 'request', 'default', 'gemini', 'raw', 85, '\x7b226d6f64656c223a202267656d696e692d322e352d666c617368222c20226d65737361676573223a205b7b22726f6c65223a202275736572222c2022636f6e74656e74223a20225361792068656c6c6f227d5d7d', NULL, 'application/json', 0);
INSERT INTO public.bodies_20261128 VALUES ('01a21f92-7e36-71dc-8197-3d040fd1ac65', '2026-11-28 00:33:43.990733+00', 'response', 'default', 'gemini', 'raw', 757, '\x7b226964223a2263686174636d706c2d656d756c617465642d37222c226f626a656374223a22636861742e636f6d706c6574696f6e222c2263726561746564223a313739353832363032342c226d6f64656c223a2267656d696e692d322e352d666c617368222c22736572766963655f74696572223a2264656661756c74222c2273797374656d5f66696e6765727072696e74223a2266705f656d756c61746564222c2263686f69636573223a5b7b22696e646578223a302c226d657373616765223a7b22726f6c65223a22617373697374616e74222c22636f6e74656e74223a22596f752061736b65643a20e2809c5361792068656c6c6fe2809d2e205468697320697320616e20656d756c6174656420616e737765723a206e6f206c616e6775616765206d6f64656c207761732061736b65642e2049742073686f77732074686174207468652077686f6c652077617920776f726b732c2066726f6d20796f7520746f20612070726f766964657220616e64206261636b2c20776f726420627920776f72642e205365742047454d494e495f4150495f4b455920746f20686561722066726f6d2061207265616c206d6f64656c2e222c227265667573616c223a6e756c6c7d2c226c6f6770726f6273223a6e756c6c2c2266696e6973685f726561736f6e223a2273746f70227d5d2c227573616765223a7b2270726f6d70745f746f6b656e73223a332c22636f6d706c6574696f6e5f746f6b656e73223a33392c22746f74616c5f746f6b656e73223a34322c2270726f6d70745f746f6b656e735f64657461696c73223a7b226361636865645f746f6b656e73223a302c22617564696f5f746f6b656e73223a307d2c22636f6d706c6574696f6e5f746f6b656e735f64657461696c73223a7b22726561736f6e696e675f746f6b656e73223a302c22617564696f5f746f6b656e73223a302c2261636365707465645f70726564696374696f6e5f746f6b656e73223a302c2272656a65637465645f70726564696374696f6e5f746f6b656e73223a307d7d7d', NULL, 'application/json; charset=UTF-8', 0);
INSERT INTO public.bodies_20261128 VALUES ('01a21f92-7e5b-7fba-8b07-9f0e91829bf2', '2026-11-28 00:33:44.027314+00', 'request', 'default', 'gemini', 'raw', 82, '\x7b226d6f64656c223a20226e6f2d737563682d6d6f64656c222c20226d65737361676573223a205b7b22726f6c65223a202275736572222c2022636f6e74656e74223a20225361792068656c6c6f227d5d7d', NULL, 'application/json', 0);
INSERT INTO public.bodies_20261128 VALUES ('01a21f92-7e5b-7fba-8b07-9f0e91829bf2', '2026-11-28 00:33:44.027314+00', 'response', 'default', 'gemini', 'raw', 754, '\x7b226964223a2263686174636d706c2d656d756c617465642d38222c226f626a656374223a22636861742e636f6d706c6574696f6e222c2263726561746564223a313739353832363032342c226d6f64656c223a226e6f2d737563682d6d6f64656c222c22736572766963655f74696572223a2264656661756c74222c2273797374656d5f66696e6765727072696e74223a2266705f656d756c61746564222c2263686f69636573223a5b7b22696e646578223a302c226d657373616765223a7b22726f6c65223a22617373697374616e74222c22636f6e74656e74223a22596f752061736b65643a20e2809c5361792068656c6c6fe2809d2e205468697320697320616e20656d756c6174656420616e737765723a206e6f206c616e6775616765206d6f64656c207761732061736b65642e2049742073686f77732074686174207468652077686f6c652077617920776f726b732c2066726f6d20796f7520746f20612070726f766964657220616e64206261636b2c20776f726420627920776f72642e205365742047454d494e495f4150495f4b455920746f20686561722066726f6d2061207265616c206d6f64656c2e222c227265667573616c223a6e756c6c7d2c226c6f6770726f6273223a6e756c6c2c2266696e6973685f726561736f6e223a2273746f70227d5d2c227573616765223a7b2270726f6d70745f746f6b656e73223a332c22636f6d706c6574696f6e5f746f6b656e73223a33392c22746f74616c5f746f6b656e73223a34322c2270726f6d70745f746f6b656e735f64657461696c73223a7b226361636865645f746f6b656e73223a302c22617564696f5f746f6b656e73223a307d2c22636f6d706c6574696f6e5f746f6b656e735f64657461696c73223a7b22726561736f6e696e675f746f6b656e73223a302c22617564696f5f746f6b656e73223a302c2261636365707465645f70726564696374696f6e5f746f6b656e73223a302c2272656a65637465645f70726564696374696f6e5f746f6b656e73223a307d7d7d', NULL, 'application/json; charset=UTF-8', 0);
INSERT INTO public.bodies_20261128 VALUES ('01a21f92-7ea2-7bd4-b983-ada72462eec5', '2026-11-28 00:33:44.150016+00', 'request', 'default', 'gemini', 'raw', 80, '\x7b226d6f64656c223a2267656d696e692d322e352d666c617368222c226d65737361676573223a5b7b22726f6c65223a2275736572222c22636f6e74656e74223a22436f756e7420746f2031227d5d7d', NULL, NULL, 0);
INSERT INTO public.bodies_20261128 VALUES ('01a21f92-7ea2-7bd4-b983-ada72462eec5', '2026-11-28 00:33:44.150016+00', 'response', 'default', 'gemini', 'raw', 759, '\x7b226964223a2263686174636d706c2d656d756c617465642d3130222c226f626a656374223a22636861742e636f6d706c6574696f6e222c2263726561746564223a313739353832363032342c226d6f64656c223a2267656d696e692d322e352d666c617368222c22736572766963655f74696572223a2264656661756c74222c2273797374656d5f66696e6765727072696e74223a2266705f656d756c61746564222c2263686f69636573223a5b7b22696e646578223a302c226d657373616765223a7b22726f6c65223a22617373697374616e74222c22636f6e74656e74223a22596f752061736b65643a20e2809c436f756e7420746f2031e2809d2e205468697320697320616e20656d756c6174656420616e737765723a206e6f206c616e6775616765206d6f64656c207761732061736b65642e2049742073686f77732074686174207468652077686f6c652077617920776f726b732c2066726f6d20796f7520746f20612070726f766964657220616e64206261636b2c20776f726420627920776f72642e205365742047454d494e495f4150495f4b455920746f20686561722066726f6d2061207265616c206d6f64656c2e222c227265667573616c223a6e756c6c7d2c226c6f6770726f6273223a6e756c6c2c2266696e6973685f726561736f6e223a2273746f70227d5d2c227573616765223a7b2270726f6d70745f746f6b656e73223a332c22636f6d706c6574696f6e5f746f6b656e73223a34302c22746f74616c5f746f6b656e73223a34332c2270726f6d70745f746f6b656e735f64657461696c73223a7b226361636865645f746f6b656e73223a302c22617564696f5f746f6b656e73223a307d2c22636f6d706c6574696f6e5f746f6b656e735f64657461696c73223a7b22726561736f6e696e675f746f6b656e73223a302c22617564696f5f746f6b656e73223a302c2261636365707465645f70726564696374696f6e5f746f6b656e73223a302c2272656a65637465645f70726564696374696f6e5f746f6b656e73223a307d7d7d', NULL, NULL, 0);
INSERT INTO public.bodies_20261128 VALUES ('01a21f92-7ea2-7448-a4cb-add192744024', '2026-11-28 00:33:44.155977+00', 'request', 'default', 'gemini', 'raw', 80, '\x7b226d6f64656c223a2267656d696e692d322e352d666c617368222c226d65737361676573223a5b7b22726f6c65223a2275736572222c22636f6e74656e74223a22436f756e7420746f2032227d5d7d', NULL, NULL, 0);
INSERT INTO public.bodies_20261128 VALUES ('01a21f92-7ea2-7448-a4cb-add192744024', '2026-11-28 00:33:44.155977+00', 'response', 'default', 'gemini', 'raw', 759, '\x7b226964223a2263686174636d706c2d656d756c617465642d3131222c226f626a656374223a22636861742e636f6d706c6574696f6e222c2263726561746564223a313739353832363032342c226d6f64656c223a2267656d696e692d322e352d666c617368222c22736572766963655f74696572223a2264656661756c74222c2273797374656d5f66696e6765727072696e74223a2266705f656d756c61746564222c2263686f69636573223a5b7b22696e646578223a302c226d657373616765223a7b22726f6c65223a22617373697374616e74222c22636f6e74656e74223a22596f752061736b65643a20e2809c436f756e7420746f2032e2809d2e205468697320697320616e20656d756c6174656420616e737765723a206e6f206c616e6775616765206d6f64656c207761732061736b65642e2049742073686f77732074686174207468652077686f6c652077617920776f726b732c2066726f6d20796f7520746f20612070726f766964657220616e64206261636b2c20776f726420627920776f72642e205365742047454d494e495f4150495f4b455920746f20686561722066726f6d2061207265616c206d6f64656c2e222c227265667573616c223a6e756c6c7d2c226c6f6770726f6273223a6e756c6c2c2266696e6973685f726561736f6e223a2273746f70227d5d2c227573616765223a7b2270726f6d70745f746f6b656e73223a332c22636f6d706c6574696f6e5f746f6b656e73223a34302c22746f74616c5f746f6b656e73223a34332c2270726f6d70745f746f6b656e735f64657461696c73223a7b226361636865645f746f6b656e73223a302c22617564696f5f746f6b656e73223a307d2c22636f6d706c6574696f6e5f746f6b656e735f64657461696c73223a7b22726561736f6e696e675f746f6b656e73223a302c22617564696f5f746f6b656e73223a302c2261636365707465645f70726564696374696f6e5f746f6b656e73223a302c2272656a65637465645f70726564696374696f6e5f746f6b656e73223a307d7d7d', NULL, NULL, 0);
INSERT INTO public.erased VALUES ('01a21f92-8e95-71c1-ac0f-69c695da86c5', 'acme', '\x9822c35cfe20d5a81afbec00664b51c9f6b03f872ac95aa5fe50b4b271ebec3d', '2026-11-28 00:33:48.179781+00');
INSERT INTO public.files VALUES ('01a21f92-7c32-7563-9217-ef71ace22ca0', '01a21f92-7c88-7c2a-b8be-7b669b547389', 'acme', 'input', 0, 'note.txt', 'text/plain', 7, '2026-11-28/01a21f92-7c33-7977-b264-7898c0fe1910', '2026-11-28 00:33:43.605697+00');
INSERT INTO public.files VALUES ('01a21f92-7e1a-7fdb-9d54-fa1961b4baa7', '01a21f92-7ccb-720f-9fd2-18555383e6fe', 'acme', 'output', 0, '', 'image/png', 20022, '2026-11-28/01a21f92-7dfd-7671-aa62-a12fff92c772', '2026-11-28 00:33:43.982625+00');
INSERT INTO public.history VALUES (300, '2026-11-28 00:30:00+00', 'gemini', 'worker-host-19059-6d40f388', '{"calls": 7, "expired": 1, "succeeded": 6, "input_tokens": 32, "output_tokens": 1511}', '{"code": {"deadline_exceeded": [1]}, "model": {"(none)": [1, 0, 0, 0, 0, 0], "gemini-2.5-flash": [5, 0, 0, 233, 0, 233], "gemini-2.5-flash-image": [1, 0, 0, 1310, 0, 51]}, "tenant": {"acme": [4, 0, 0, 1412, 0, 76], "default": [3, 0, 0, 131, 0, 208]}, "upstream": {"gemini": [6, 0, 0, 1543, 0, 284]}}', '\x000000000000000001000000000000000100000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000001000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000100000000000000010000000000000001', '\x000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000200000000000000000000000000000000000000000000000000000000000000000000000000000001000000000000000000000000000000000000000000000000000000000000000000000000000000010000000000000000000000000000000000000000000000000000000000000000000000000000000100000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000001');
INSERT INTO public.history VALUES (60, '2026-11-28 00:33:00+00', 'gemini', 'worker-host-19059-6d40f388', '{"calls": 7, "expired": 1, "succeeded": 6, "input_tokens": 32, "output_tokens": 1511}', '{"code": {"deadline_exceeded": [1]}, "model": {"(none)": [1, 0, 0, 0, 0, 0], "gemini-2.5-flash": [5, 0, 0, 233, 0, 233], "gemini-2.5-flash-image": [1, 0, 0, 1310, 0, 51]}, "tenant": {"acme": [4, 0, 0, 1412, 0, 76], "default": [3, 0, 0, 131, 0, 208]}, "upstream": {"gemini": [6, 0, 0, 1543, 0, 284]}}', '\x000000000000000001000000000000000100000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000001000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000100000000000000010000000000000001', '\x000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000200000000000000000000000000000000000000000000000000000000000000000000000000000001000000000000000000000000000000000000000000000000000000000000000000000000000000010000000000000000000000000000000000000000000000000000000000000000000000000000000100000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000001');
INSERT INTO public.history VALUES (10, '2026-11-28 00:33:40+00', 'gemini', 'worker-host-19059-6d40f388', '{"calls": 7, "expired": 1, "succeeded": 6, "input_tokens": 32, "output_tokens": 1511}', '{"code": {"deadline_exceeded": [1]}, "model": {"(none)": [1, 0, 0, 0, 0, 0], "gemini-2.5-flash": [5, 0, 0, 233, 0, 233], "gemini-2.5-flash-image": [1, 0, 0, 1310, 0, 51]}, "tenant": {"acme": [4, 0, 0, 1412, 0, 76], "default": [3, 0, 0, 131, 0, 208]}, "upstream": {"gemini": [6, 0, 0, 1543, 0, 284]}}', '\x000000000000000001000000000000000100000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000001000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000100000000000000010000000000000001', '\x000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000200000000000000000000000000000000000000000000000000000000000000000000000000000001000000000000000000000000000000000000000000000000000000000000000000000000000000010000000000000000000000000000000000000000000000000000000000000000000000000000000100000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000001');
INSERT INTO public.history VALUES (300, '2026-11-28 00:30:00+00', 'gemini', 'api-host-19058-335811ab', '{"calls": 4, "judged": 1, "succeeded": 4, "input_tokens": 201, "judged_tokens": 195, "output_tokens": 168, "judged_cost_micros": 0}', '{"model": {"no-such-model": [1, 0, 0, 42, 0, 2], "gemini-2.5-flash": [3, 0, 0, 132, 0, 30], "gemini-2.5-flash-lite": [1, 0, 0, 195, 0, 170]}, "tenant": {"acme": [1, 0, 0, 42, 0, 5], "default": [3, 0, 0, 132, 0, 27]}, "upstream": {"gemini": [5, 0, 0, 369, 0, 202]}}', '\x010000000000000000000000000000000100000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000010000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000001', '\x0000000000000000000000000000000000000000000000000000000000000000000000000000000001000000000000000000000000000000000000000000000000000000000000000100000000000000000000000000000000000000000000000000000000000000010000000000000000000000000000000000000000000000000000000000000001');
INSERT INTO public.history VALUES (60, '2026-11-28 00:33:00+00', 'gemini', 'api-host-19058-335811ab', '{"calls": 4, "judged": 1, "succeeded": 4, "input_tokens": 201, "judged_tokens": 195, "output_tokens": 168, "judged_cost_micros": 0}', '{"model": {"no-such-model": [1, 0, 0, 42, 0, 2], "gemini-2.5-flash": [3, 0, 0, 132, 0, 30], "gemini-2.5-flash-lite": [1, 0, 0, 195, 0, 170]}, "tenant": {"acme": [1, 0, 0, 42, 0, 5], "default": [3, 0, 0, 132, 0, 27]}, "upstream": {"gemini": [5, 0, 0, 369, 0, 202]}}', '\x010000000000000000000000000000000100000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000010000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000001', '\x0000000000000000000000000000000000000000000000000000000000000000000000000000000001000000000000000000000000000000000000000000000000000000000000000100000000000000000000000000000000000000000000000000000000000000010000000000000000000000000000000000000000000000000000000000000001');
INSERT INTO public.history VALUES (10, '2026-11-28 00:33:40+00', 'gemini', 'api-host-19058-335811ab', '{"calls": 4, "judged": 1, "succeeded": 4, "input_tokens": 201, "judged_tokens": 195, "output_tokens": 168, "judged_cost_micros": 0}', '{"model": {"no-such-model": [1, 0, 0, 42, 0, 2], "gemini-2.5-flash": [3, 0, 0, 132, 0, 30], "gemini-2.5-flash-lite": [1, 0, 0, 195, 0, 170]}, "tenant": {"acme": [1, 0, 0, 42, 0, 5], "default": [3, 0, 0, 132, 0, 27]}, "upstream": {"gemini": [5, 0, 0, 369, 0, 202]}}', '\x010000000000000000000000000000000100000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000010000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000001', '\x0000000000000000000000000000000000000000000000000000000000000000000000000000000001000000000000000000000000000000000000000000000000000000000000000100000000000000000000000000000000000000000000000000000000000000010000000000000000000000000000000000000000000000000000000000000001');
INSERT INTO public.keys VALUES ('1pcmkhoiz7', 'acme', '\x6e097ab0ee7b315a63232c49197515731dfe8ebb7ce916eae6040ae39ebaee75', 'revoked', '{infer,read}', '2026-11-28 00:33:42.219958+00', NULL, '2026-11-28 00:33:43.171847+00', NULL);
INSERT INTO public.keys VALUES ('3ktmxnlp61', 'default', '\xe36eac17f1c76dedc147b581d5945d8b0a133e3ddc22ef3b983fe040ff727fbe', 'ci', '{infer,read}', '2026-11-28 00:33:37.849228+00', NULL, NULL, '2026-11-28 00:33:45.171145+00');
INSERT INTO public.keys VALUES ('c41ks25qu5', 'acme', '\x09358f9458428e36596670e9c1830c456d5da82aa1203c2942b4e2bacf100569', 'acme', '{infer,read}', '2026-11-28 00:33:41.145245+00', '2027-02-26 00:33:41.116963+00', NULL, '2026-11-28 00:33:44.150909+00');
INSERT INTO public.native_keys VALUES ('default', 'native-once', '\x8456e879aac3b5b692a3965b4d3a38ad48605b34fef76064bd8e5c8fedb38cdd', '01a21f92-7e36-71dc-8197-3d040fd1ac65', '2026-11-28 00:33:43.998083+00', '2026-11-28 00:33:44.023143+00', 200, 'application/json; charset=UTF-8', '\x7b226964223a2263686174636d706c2d656d756c617465642d37222c226f626a656374223a22636861742e636f6d706c6574696f6e222c2263726561746564223a313739353832363032342c226d6f64656c223a2267656d696e692d322e352d666c617368222c22736572766963655f74696572223a2264656661756c74222c2273797374656d5f66696e6765727072696e74223a2266705f656d756c61746564222c2263686f69636573223a5b7b22696e646578223a302c226d657373616765223a7b22726f6c65223a22617373697374616e74222c22636f6e74656e74223a22596f752061736b65643a20e2809c5361792068656c6c6fe2809d2e205468697320697320616e20656d756c6174656420616e737765723a206e6f206c616e6775616765206d6f64656c207761732061736b65642e2049742073686f77732074686174207468652077686f6c652077617920776f726b732c2066726f6d20796f7520746f20612070726f766964657220616e64206261636b2c20776f726420627920776f72642e205365742047454d494e495f4150495f4b455920746f20686561722066726f6d2061207265616c206d6f64656c2e222c227265667573616c223a6e756c6c7d2c226c6f6770726f6273223a6e756c6c2c2266696e6973685f726561736f6e223a2273746f70227d5d2c227573616765223a7b2270726f6d70745f746f6b656e73223a332c22636f6d706c6574696f6e5f746f6b656e73223a33392c22746f74616c5f746f6b656e73223a34322c2270726f6d70745f746f6b656e735f64657461696c73223a7b226361636865645f746f6b656e73223a302c22617564696f5f746f6b656e73223a307d2c22636f6d706c6574696f6e5f746f6b656e735f64657461696c73223a7b22726561736f6e696e675f746f6b656e73223a302c22617564696f5f746f6b656e73223a302c2261636365707465645f70726564696374696f6e5f746f6b656e73223a302c2272656a65637465645f70726564696374696f6e5f746f6b656e73223a307d7d7d');
INSERT INTO public.policies VALUES ('gemini', 1, 'deployment', '3ae24224c50971474883c92cf92d2cb5503b0a3b405a8bbadf4107e7768076cb', '{"limits": {"kind:text_only": 5, "kind:classifier": 2, "kind:multi_modal": 3, "kind:image_generation": 2}}', 'worker-host-19059-6d40f388', '', '2026-11-28 00:33:37.094897+00');
INSERT INTO public.policies VALUES ('gemini', 2, 'deployment', '3ae24224c50971474883c92cf92d2cb5503b0a3b405a8bbadf4107e7768076cb', '{"limits": {"kind:text_only": 5, "kind:classifier": 2, "kind:multi_modal": 3, "kind:image_generation": 2}, "weights": {"acme": 4}}', 'root@vm', 'tenant acme', '2026-11-28 00:33:39.804621+00');
INSERT INTO public.policies VALUES ('gemini', 3, 'live', '320bf1fba8bc1be3f6bf1a257c1c587a829b9077b07abd75ba122eef305311aa', '{"limits": {"kind:text_only": 7, "kind:classifier": 2, "kind:multi_modal": 3, "kind:image_generation": 2}, "weights": {"acme": 4}}', 'root@vm', 'a test', '2026-11-28 00:33:47.247222+00');
INSERT INTO public.queued VALUES ('acme', 'gemini', 5, -1, '2026-11-28 00:33:43.598251+00', 12.85303798795212);
INSERT INTO public.requests VALUES ('01a21f92-7c14-72e3-af4d-4bc9665cc2f7', 'default', 'gemini', 'job', 'succeeded', 'text_only', DEFAULT, 'rules', 'asks for words', 'Explain the tide.', NULL, NULL, 'gemini-2.5-flash', 5, 'once', '2026-11-28 00:33:43.432674+00', NULL, NULL, '2026-11-28 00:33:43.50866+00', '2026-11-28 00:33:43.722837+00', 1, NULL, 0, 1, '01a21f92-7c54-78d1-bf26-d8188401b7da', '2026-11-28 00:33:43.509147+00', 75.986, 196.39706300222315, 'You asked: “Explain the tide.”. This is an emulated answer: no language model was asked. It shows that the whole way works, from you to a provider and back, word by word. Set GEMINI_API_KEY to hear from a real model.', 5, 40, NULL, NULL, 45, 'STOP', NULL, 3, '\x1cb61f8b28bdaa47f6765367f201ee3b73675874425afd57e3a8f698aea14298', NULL, 'http://127.0.0.1:39541/hook', NULL, NULL, 766, 8.776524002314545, '00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01');
INSERT INTO public.requests VALUES ('01a21f92-7c88-7c2a-b8be-7b669b547389', 'acme', 'gemini', 'job', 'succeeded', 'multi_modal', DEFAULT, 'rules', 'files are attached, and none is an image', 'Describe this document in detail', NULL, NULL, 'gemini-2.5-flash', 0, NULL, '2026-11-28 00:33:43.464274+00', NULL, NULL, '2026-11-28 00:33:43.818762+00', '2026-11-28 00:33:43.859923+00', 1, NULL, 0, 1, '01a21f92-7d8a-7b8c-9a11-9c0f051a2132', '2026-11-28 00:33:43.821134+00', 354.488, 21.136494993697852, 'You asked: “Describe this document in detail”. This is an emulated answer: no language model was asked. With it came 1 file: text/plain (7 bytes). It shows that the whole way works, from you to a provider and back, word by word. Set GEMINI_API_KEY to hear from a real model.', 10, 50, NULL, NULL, 60, 'STOP', NULL, 3, NULL, NULL, NULL, NULL, NULL, 772, 7.993990002432838, NULL);
INSERT INTO public.requests VALUES ('01a21f92-7d0c-7cbd-822b-50c86c0d49ba', 'default', 'gemini', 'stream', 'succeeded', 'text_only', DEFAULT, 'llm', 'Emulated: decided by a few words of the prompt.', 'Say hello as a stream', NULL, 'gemini-2.5-flash', 'gemini-2.5-flash', 0, NULL, '2026-11-28 00:33:43.692005+00', NULL, NULL, '2026-11-28 00:33:43.890759+00', '2026-11-28 00:33:43.908946+00', 0, NULL, 0, 1, NULL, NULL, 198.754, 17.44364701153245, 'You asked: “Say hello as a stream”. This is an emulated answer: no language model was asked. It shows that the whole way works, from you to a provider and back, word by word. Set GEMINI_API_KEY to hear from a real model.', 6, 42, NULL, NULL, 48, 'STOP', NULL, 1, NULL, NULL, NULL, NULL, NULL, 793, 14.135059987893328, NULL);
INSERT INTO public.requests VALUES ('01a21f92-7cfb-733e-a1a4-eec33cbfcee0', 'acme', 'gemini', 'job', 'expired', 'text_only', DEFAULT, 'rules', 'asks for words', 'Explain the moon.', NULL, NULL, NULL, 0, NULL, '2026-11-28 00:33:43.674794+00', '2026-11-28 00:33:43.675794+00', NULL, NULL, '2026-11-28 00:33:43.953915+00', 1, NULL, 0, 0, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, '{"code": "deadline_exceeded", "message": "its deadline came while it waited", "retryable": false, "retry_after_ms": null, "upstream_status": null}', 2, NULL, NULL, NULL, NULL, NULL, 781, NULL, NULL);
INSERT INTO public.requests VALUES ('01a21f92-7ccb-720f-9fd2-18555383e6fe', 'acme', 'gemini', 'job', 'succeeded', 'image_generation', DEFAULT, 'rules', 'asks for a picture', 'Generate an image of a harbour.', NULL, NULL, 'gemini-2.5-flash-image', 0, NULL, '2026-11-28 00:33:43.626838+00', NULL, NULL, '2026-11-28 00:33:43.853983+00', '2026-11-28 00:33:43.933048+00', 1, NULL, 0, 1, '01a21f92-7dae-72b1-929b-f4ede11d1ad7', '2026-11-28 00:33:43.855053+00', 227.145, 50.62321000150405, 'Here is an emulated picture for “Generate an image of a harbour.”.', 8, 1302, NULL, NULL, 1310, 'STOP', NULL, 3, NULL, NULL, NULL, NULL, 'patient-1', 775, 16.285186997265555, NULL);
INSERT INTO public.requests VALUES ('01a21f92-7ce6-77ec-89c8-5d6c0ee7d3aa', 'acme', 'gemini', 'job', 'succeeded', 'text_only', DEFAULT, 'body', '/v1/chat/completions', '{"model":"gemini-2.5-flash","messages":[{"role":"user","content":"Say hello"}]}', NULL, 'gemini-2.5-flash', 'gemini-2.5-flash', 0, NULL, '2026-11-28 00:33:43.653962+00', NULL, NULL, '2026-11-28 00:33:43.955786+00', '2026-11-28 00:33:43.973365+00', 1, NULL, 0, 1, '01a21f92-7e13-7810-8430-fb236ebd56b5', '2026-11-28 00:33:43.956409+00', 301.82399999999996, 3.7032130057923496, '{"id":"chatcmpl-emulated-6","object":"chat.completion","created":1795826023,"model":"gemini-2.5-flash","service_tier":"default","system_fingerprint":"fp_emulated","choices":[{"index":0,"message":{"role":"assistant","content":"You asked: “Say hello”. This is an emulated answer: no language model was asked. It shows that the whole way works, from you to a provider and back, word by word. Set GEMINI_API_KEY to hear from a real model.","refusal":null},"logprobs":null,"finish_reason":"stop"}],"usage":{"prompt_tokens":3,"completion_tokens":39,"total_tokens":42,"prompt_tokens_details":{"cached_tokens":0,"audio_tokens":0},"completion_tokens_details":{"reasoning_tokens":0,"audio_tokens":0,"accepted_prediction_tokens":0,"rejected_prediction_tokens":0}}}', 3, 39, 0, 0, 42, 'stop', NULL, 3, NULL, NULL, NULL, '/v1/chat/completions', NULL, 778, 1.9882009946741164, NULL);
INSERT INTO public.requests VALUES ('01a21f93-034c-7a27-b855-9d0921122a6b', 'acme', 'gemini', 'job', 'queued', 'text_only', DEFAULT, 'rules', 'asks for words', 'Explain why the queue waits.', NULL, NULL, NULL, 0, NULL, '2026-11-28 00:34:18.051147+00', NULL, NULL, NULL, NULL, 1, 'worker-host-19781-a6e15afd', 0, 0, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, 1, NULL, NULL, NULL, NULL, NULL, 845, NULL, NULL);
INSERT INTO public.tenants VALUES ('default', 100, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, '2026-11-28 00:33:34.083085+00', NULL);
INSERT INTO public.tenants VALUES ('acme', 10, '{gemini-*}', 100, NULL, 50, NULL, NULL, NULL, NULL, NULL, 30, '2026-11-28 00:33:39.811568+00', NULL);
INSERT INTO public.usage_days VALUES ('acme', '2026-11-28', '', 'gemini', 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
INSERT INTO public.usage_days VALUES ('acme', '2026-11-28', 'gemini-2.5-flash-image', 'gemini', 1, 8, 1302, 0, 0, 1, 0, 1, 0, 0, 0);
INSERT INTO public.usage_days VALUES ('acme', '2026-11-28', 'gemini-2.5-flash', 'gemini', 3, 16, 128, 0, 0, 0, 0, 3, 0, 0, 0);
INSERT INTO public.usage_days VALUES ('default', '2026-11-28', 'no-such-model', 'gemini', 1, 3, 39, 0, 0, 0, 0, 1, 0, 0, 0);
INSERT INTO public.usage_days VALUES ('default', '2026-11-28', 'gemini-2.5-flash', 'gemini', 5, 20, 201, 0, 0, 0, 0, 5, 0, 0, 0);
INSERT INTO public.webhooks VALUES ('01a21f92-7d4f-75c9-9bfe-aa9d1668f450', '01a21f92-7c14-72e3-af4d-4bc9665cc2f7', 'default', 'gemini', 'request.succeeded', 'http://127.0.0.1:39541/hook', 'delivered', 1, '2026-11-28 00:33:44.257244+00', 204, NULL, '2026-11-28 00:33:43.725541+00', '2026-11-28 00:33:44.257244+00');
INSERT INTO public.workers VALUES ('worker-host-19781-a6e15afd', '2026-11-28 00:34:26.188689+00');
ALTER TABLE ONLY public.access
    ADD CONSTRAINT access_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.alembic_version
    ADD CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num);
ALTER TABLE ONLY public.attempts
    ADD CONSTRAINT attempts_pkey PRIMARY KEY (id, created_at);
ALTER TABLE ONLY public.attempts_20261128
    ADD CONSTRAINT attempts_20261128_pkey PRIMARY KEY (id, created_at);
ALTER TABLE ONLY public.attempts_default
    ADD CONSTRAINT attempts_default_pkey PRIMARY KEY (id, created_at);
ALTER TABLE ONLY public.audit
    ADD CONSTRAINT audit_pkey PRIMARY KEY (id, created_at);
ALTER TABLE ONLY public.audit_20261128
    ADD CONSTRAINT audit_20261128_pkey PRIMARY KEY (id, created_at);
ALTER TABLE ONLY public.audit_default
    ADD CONSTRAINT audit_default_pkey PRIMARY KEY (id, created_at);
ALTER TABLE ONLY public.batch_files
    ADD CONSTRAINT batch_files_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.batch_lines
    ADD CONSTRAINT batch_lines_pkey PRIMARY KEY (batch_id, line);
ALTER TABLE ONLY public.batches
    ADD CONSTRAINT batches_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.bodies
    ADD CONSTRAINT bodies_pkey PRIMARY KEY (id, created_at, role);
ALTER TABLE ONLY public.bodies_20261128
    ADD CONSTRAINT bodies_20261128_pkey PRIMARY KEY (id, created_at, role);
ALTER TABLE ONLY public.bodies_default
    ADD CONSTRAINT bodies_default_pkey PRIMARY KEY (id, created_at, role);
ALTER TABLE ONLY public.erased
    ADD CONSTRAINT erased_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.files
    ADD CONSTRAINT files_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.history
    ADD CONSTRAINT history_pkey PRIMARY KEY (step_s, at, pool, instance_id);
ALTER TABLE ONLY public.keys
    ADD CONSTRAINT keys_pkey PRIMARY KEY (prefix);
ALTER TABLE ONLY public.native_keys
    ADD CONSTRAINT native_keys_pkey PRIMARY KEY (tenant_id, idempotency_key);
ALTER TABLE ONLY public.policies
    ADD CONSTRAINT policies_pkey PRIMARY KEY (pool, revision);
ALTER TABLE ONLY public.queued
    ADD CONSTRAINT queued_pkey PRIMARY KEY (tenant_id, pool);
ALTER TABLE ONLY public.requests
    ADD CONSTRAINT requests_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.tenants
    ADD CONSTRAINT tenants_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.usage_days
    ADD CONSTRAINT usage_days_pkey PRIMARY KEY (tenant_id, day, model, pool);
ALTER TABLE ONLY public.webhooks
    ADD CONSTRAINT webhooks_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.workers
    ADD CONSTRAINT workers_pkey PRIMARY KEY (instance_id);
CREATE INDEX attempts_request ON ONLY public.attempts USING btree (request_id);
CREATE INDEX attempts_20261128_request_id_idx ON public.attempts_20261128 USING btree (request_id);
CREATE INDEX attempts_default_request_id_idx ON public.attempts_default USING btree (request_id);
CREATE INDEX audit_request ON ONLY public.audit USING btree (request_id);
CREATE INDEX audit_20261128_request_id_idx ON public.audit_20261128 USING btree (request_id);
CREATE INDEX audit_relayed ON ONLY public.audit USING btree (tenant_id, created_at DESC, id DESC) WHERE (source = 'relay'::text);
CREATE INDEX audit_20261128_tenant_id_created_at_id_idx ON public.audit_20261128 USING btree (tenant_id, created_at DESC, id DESC) WHERE (source = 'relay'::text);
CREATE INDEX audit_default_request_id_idx ON public.audit_default USING btree (request_id);
CREATE INDEX audit_default_tenant_id_created_at_id_idx ON public.audit_default USING btree (tenant_id, created_at DESC, id DESC) WHERE (source = 'relay'::text);
CREATE INDEX batch_files_blob ON public.batch_files USING btree (blob_key);
CREATE INDEX batch_files_listed ON public.batch_files USING btree (tenant_id, id);
CREATE INDEX batch_lines_held ON public.batch_lines USING btree (claimed_by) WHERE (state = ANY (ARRAY['claimed'::text, 'calling'::text]));
CREATE INDEX batch_lines_ready ON public.batch_lines USING btree (batch_id, line) WHERE (state = 'queued'::text);
CREATE INDEX batches_listed ON public.batches USING btree (tenant_id, id);
CREATE INDEX batches_open ON public.batches USING btree (status, id) WHERE (status = ANY (ARRAY['validating'::text, 'in_progress'::text, 'finalizing'::text, 'cancelling'::text]));
CREATE INDEX bodies_blob ON ONLY public.bodies USING btree (blob_key) WHERE (blob_key IS NOT NULL);
CREATE INDEX bodies_20261128_blob_key_idx ON public.bodies_20261128 USING btree (blob_key) WHERE (blob_key IS NOT NULL);
CREATE INDEX bodies_default_blob_key_idx ON public.bodies_default USING btree (blob_key) WHERE (blob_key IS NOT NULL);
CREATE INDEX erased_subject ON public.erased USING btree (subject_digest) WHERE (subject_digest IS NOT NULL);
CREATE INDEX erased_tenant ON public.erased USING btree (tenant_id) WHERE (subject_digest IS NULL);
CREATE INDEX files_blob ON public.files USING btree (blob_key);
CREATE INDEX files_request ON public.files USING btree (request_id);
CREATE INDEX keys_tenant ON public.keys USING btree (tenant_id, created_at);
CREATE INDEX native_keys_age ON public.native_keys USING btree (created_at);
CREATE INDEX policies_deployed ON public.policies USING btree (pool, digest) WHERE (origin = 'deployment'::text);
CREATE INDEX requests_called_off ON public.requests USING btree (claimed_by) WHERE COALESCE(((status = ANY (ARRAY['queued'::text, 'running'::text])) AND (cancel_asked_at IS NOT NULL)), false);
CREATE INDEX requests_came ON public.requests USING btree (pool, lane, ready_xid) WHERE COALESCE(((status = 'queued'::text) AND (claimed_by IS NULL) AND (not_before IS NULL) AND (ready_xid >= 0)), false);
CREATE INDEX requests_cancelling ON public.requests USING btree (claimed_by) WHERE ((cancel_asked_at IS NOT NULL) AND (status = ANY (ARRAY['queued'::text, 'running'::text])));
CREATE INDEX requests_claimed ON public.requests USING btree (claimed_by) WHERE ((claimed_by IS NOT NULL) AND (status = ANY (ARRAY['queued'::text, 'running'::text])));
CREATE INDEX requests_dead ON public.requests USING btree (finished_at) WHERE COALESCE((status = 'dead'::text), false);
CREATE INDEX requests_deadline ON public.requests USING btree (deadline_at) WHERE ((status = 'queued'::text) AND (deadline_at IS NOT NULL));
CREATE INDEX requests_due ON public.requests USING btree (deadline_at) WHERE COALESCE(((status = 'queued'::text) AND (deadline_at IS NOT NULL)), false);
CREATE INDEX requests_ended ON public.requests USING btree (finished_at) WHERE (status <> ALL (ARRAY['queued'::text, 'running'::text]));
CREATE INDEX requests_held ON public.requests USING btree (claimed_by) WHERE COALESCE(((status = ANY (ARRAY['queued'::text, 'running'::text])) AND (claimed_by IS NOT NULL)), false);
CREATE UNIQUE INDEX requests_idempotency ON public.requests USING btree (tenant_id, idempotency_key) WHERE (idempotency_key IS NOT NULL);
CREATE INDEX requests_listed ON public.requests USING btree (tenant_id, created_at, id);
CREATE INDEX requests_place ON public.requests USING btree (pool, lane, priority, created_at, id) WHERE (status = 'queued'::text);
CREATE INDEX requests_queue ON public.requests USING btree ((((((pool || '/'::text) || lane) || '/'::text) || tenant_id)), priority, created_at, id) WHERE COALESCE(((status = 'queued'::text) AND (claimed_by IS NULL) AND (not_before IS NULL)), false);
CREATE INDEX requests_ready ON public.requests USING btree (pool, lane, tenant_id, priority DESC, created_at, id) WHERE ((status = 'queued'::text) AND (claimed_by IS NULL) AND (not_before IS NULL));
CREATE INDEX requests_ripe ON public.requests USING btree (not_before) WHERE COALESCE(((status = 'queued'::text) AND (not_before IS NOT NULL)), false);
CREATE INDEX requests_ripening ON public.requests USING btree (not_before) WHERE ((status = 'queued'::text) AND (not_before IS NOT NULL));
CREATE INDEX usage_days_day ON public.usage_days USING btree (day);
CREATE INDEX webhooks_due ON public.webhooks USING btree (due_at) WHERE (state = 'pending'::text);
CREATE INDEX webhooks_given_up ON public.webhooks USING btree (ended_at) WHERE COALESCE((state = 'given_up'::text), false);
CREATE INDEX webhooks_request ON public.webhooks USING btree (request_id);
ALTER INDEX public.attempts_pkey ATTACH PARTITION public.attempts_20261128_pkey;
ALTER INDEX public.attempts_request ATTACH PARTITION public.attempts_20261128_request_id_idx;
ALTER INDEX public.attempts_pkey ATTACH PARTITION public.attempts_default_pkey;
ALTER INDEX public.attempts_request ATTACH PARTITION public.attempts_default_request_id_idx;
ALTER INDEX public.audit_pkey ATTACH PARTITION public.audit_20261128_pkey;
ALTER INDEX public.audit_request ATTACH PARTITION public.audit_20261128_request_id_idx;
ALTER INDEX public.audit_relayed ATTACH PARTITION public.audit_20261128_tenant_id_created_at_id_idx;
ALTER INDEX public.audit_pkey ATTACH PARTITION public.audit_default_pkey;
ALTER INDEX public.audit_request ATTACH PARTITION public.audit_default_request_id_idx;
ALTER INDEX public.audit_relayed ATTACH PARTITION public.audit_default_tenant_id_created_at_id_idx;
ALTER INDEX public.bodies_blob ATTACH PARTITION public.bodies_20261128_blob_key_idx;
ALTER INDEX public.bodies_pkey ATTACH PARTITION public.bodies_20261128_pkey;
ALTER INDEX public.bodies_blob ATTACH PARTITION public.bodies_default_blob_key_idx;
ALTER INDEX public.bodies_pkey ATTACH PARTITION public.bodies_default_pkey;
CREATE TRIGGER requests_became_ready BEFORE UPDATE ON public.requests FOR EACH ROW
    WHEN (NEW.status = 'queued' AND NEW.claimed_by IS NULL AND NEW.not_before IS NULL
        AND NOT (OLD.status = 'queued' AND OLD.claimed_by IS NULL AND OLD.not_before IS NULL
            AND (OLD.pool, OLD.kind, OLD.tenant_id, OLD.priority, OLD.created_at)
                IS NOT DISTINCT FROM
                (NEW.pool, NEW.kind, NEW.tenant_id, NEW.priority, NEW.created_at)))
    EXECUTE FUNCTION public.requests_became_ready();
ALTER TABLE ONLY public.batch_lines
    ADD CONSTRAINT batch_lines_batch_id_fkey FOREIGN KEY (batch_id) REFERENCES public.batches(id) ON DELETE CASCADE;
ALTER TABLE ONLY public.files
    ADD CONSTRAINT files_request_id_fkey FOREIGN KEY (request_id) REFERENCES public.requests(id) ON DELETE CASCADE;
ALTER TABLE ONLY public.keys
    ADD CONSTRAINT keys_tenant_id_fkey FOREIGN KEY (tenant_id) REFERENCES public.tenants(id) ON DELETE CASCADE;
ALTER TABLE ONLY public.webhooks
    ADD CONSTRAINT webhooks_request_id_fkey FOREIGN KEY (request_id) REFERENCES public.requests(id) ON DELETE CASCADE;
