-- Replays by operators, and the upstream of each. The previous version makes them at any upstream.
ALTER TABLE requests ADD COLUMN repeats uuid, ADD COLUMN bound_upstream text;
