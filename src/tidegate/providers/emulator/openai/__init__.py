"""OpenAI's dialect: chat completions, responses, embeddings, images, models.

Invariant: whatever is refused or goes wrong is worded as OpenAI words it, and counted as Gemini's
calls are.
"""

from tidegate.providers.emulator.openai.front import OpenAIFront

__all__ = ["OpenAIFront"]
