-- Details of usage that providers report besides LLM tokens, in the audit and in the totals.
--
-- Existing rows are not rewritten: the column is null in rows of an older version, and totals begin with
-- the first request after this step.

-- An object of whole numbers; unreported values and zeros are left out.
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
