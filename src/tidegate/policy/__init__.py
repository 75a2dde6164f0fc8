"""Policy of a pool: its formats, its rollout, its inspection."""
