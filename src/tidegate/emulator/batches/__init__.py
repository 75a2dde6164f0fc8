"""Batch APIs of the providers: OpenAI's, Anthropic's and Gemini's."""
