"""Anthropic's dialect: messages, counting, models.

Invariant: whatever is refused or goes wrong is worded as Anthropic words it, and counted as
Gemini's calls are.
"""

from tidegate.providers.emulator.anthropic.front import AnthropicFront

__all__ = ["AnthropicFront"]
