"""Gemini through Google's own SDK: the product's `/submit` and `/stream` end here.

processor.py  what the spine calls: run, judge, count_tokens
wire.py       the SDK's HTTP transport: which responses are open, phase timeouts, size bound
request.py    Call -> the request's content and settings (pure)
reading.py    response chunks -> events and the answer (pure)
faults.py     whatever went wrong -> one of our UpstreamErrors
uploads.py    input files through the Files API
"""

from tidegate.providers.gemini.processor import GeminiProcessor
from tidegate.providers.gemini.timeouts import Timeouts

__all__ = ["GeminiProcessor", "Timeouts"]
