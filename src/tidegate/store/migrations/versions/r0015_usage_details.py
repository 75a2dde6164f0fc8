"""Details of usage that providers report beside LLM tokens, on the audit and in the totals.

Nothing that is there is rewritten: the column is null in what an older version writes, and totals
begin with the first request after this step.
"""

from __future__ import annotations

from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None

COUNTS = (
    *("cache_write_tokens", "input_audio_tokens", "input_image_tokens", "input_video_tokens"),
    *("output_audio_tokens", "output_image_tokens", "output_video_tokens"),
    *("searches", "provider_cost_micros"),
)
STEPS = (
    # An object of whole numbers; what is not reported, or 0, is not in it.
    "ALTER TABLE audit ADD COLUMN usage_details jsonb",
    f"""
    ALTER TABLE usage_days
        {", ".join(f"ADD COLUMN {name} bigint NOT NULL DEFAULT 0" for name in COUNTS)}
    """,
)


def upgrade() -> None:
    for step in STEPS:
        op.execute(step)
