-- Lineage of calls: their conversation, the call that they continue, and their trace.
--
-- Null in rows of an older version.

-- opening: digest of the beginning of a conversation's calls. parent_id: the call whose answer is
-- continued. trace_id, parent_span: of the client's own trace, in hexadecimal digits.
ALTER TABLE audit ADD COLUMN conversation text, ADD COLUMN opening text,
    ADD COLUMN parent_id uuid, ADD COLUMN trace_id text, ADD COLUMN parent_span text;
CREATE INDEX audit_conversation ON audit (conversation, submitted_at)
    WHERE conversation IS NOT NULL;
CREATE INDEX audit_trace ON audit (trace_id, submitted_at) WHERE trace_id IS NOT NULL;

-- The conversation of the call that created the resource, for calls that continue it.
ALTER TABLE provider_resources ADD COLUMN conversation text;
ALTER TABLE background_calls ADD COLUMN lineage jsonb;
