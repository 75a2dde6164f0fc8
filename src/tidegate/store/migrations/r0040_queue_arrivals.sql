-- Jobs that a cap on their tenant's queue has admitted and that are not stored yet, over all processes. A row ends in
-- the transaction that stores its jobs. Its loss has no effect but on jobs that are stored at that moment.
CREATE UNLOGGED TABLE queue_arrivals (
    id uuid PRIMARY KEY,
    tenant_id text NOT NULL,
    pool text NOT NULL,
    jobs bigint NOT NULL,
    size_bytes bigint NOT NULL,
    admitted_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX queue_arrivals_of_tenant ON queue_arrivals (tenant_id, pool);
