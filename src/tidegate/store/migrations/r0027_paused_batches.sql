-- Batches that an operator has paused: none of their lines begins. The version before works them on.
ALTER TABLE batches ADD COLUMN paused_at timestamptz, ADD COLUMN paused_by text,
    ADD COLUMN pause_reason text;
