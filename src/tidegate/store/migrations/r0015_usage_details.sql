-- Details of usage that providers report beside LLM tokens, on the audit and in the totals.
--
-- Nothing that is there is rewritten: the column is null in what an older version writes, and totals
-- begin with the first request after this step.

-- An object of whole numbers; what is not reported, or 0, is not in it.
ALTER TABLE audit ADD COLUMN usage_details jsonb;
ALTER TABLE usage_days
    ADD COLUMN cache_write_tokens bigint NOT NULL DEFAULT 0,
    ADD COLUMN input_audio_tokens bigint NOT NULL DEFAULT 0,
    ADD COLUMN input_image_tokens bigint NOT NULL DEFAULT 0,
    ADD COLUMN input_video_tokens bigint NOT NULL DEFAULT 0,
    ADD COLUMN output_audio_tokens bigint NOT NULL DEFAULT 0,
    ADD COLUMN output_image_tokens bigint NOT NULL DEFAULT 0,
    ADD COLUMN output_video_tokens bigint NOT NULL DEFAULT 0,
    ADD COLUMN searches bigint NOT NULL DEFAULT 0,
    ADD COLUMN provider_cost_micros bigint NOT NULL DEFAULT 0;
