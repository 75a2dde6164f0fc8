-- Replays: what an operator had made again, and at which upstream. The version before makes them at any.
ALTER TABLE requests ADD COLUMN repeats uuid, ADD COLUMN bound_upstream text;
