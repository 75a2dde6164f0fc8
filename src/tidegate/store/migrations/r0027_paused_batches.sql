-- Batches paused by an operator: none of their lines begins. The previous version processes them
-- nevertheless.
ALTER TABLE batches ADD COLUMN paused_at timestamptz, ADD COLUMN paused_by text,
    ADD COLUMN pause_reason text;
