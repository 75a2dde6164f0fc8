"""Decides what a prompt asks for: text, text about files, or a picture.

Files decide between text and multi-modal. A picture is wanted when the prompt asks for one and
there is no file, or an image file among the files. Pure, bounded in time whatever the prompt, and
the same answer for the same input.
"""

from __future__ import annotations

from collections.abc import Sequence

from tidegate.call import Classification, ClassifiedBy, Kind
from tidegate.classify.verdict import judge


def by_rules(prompt: str, mime_types: Sequence[str], *, image_uri: bool = False) -> Classification:
    """Decides only when sure; otherwise `kind` is None and the reason says why."""
    kind, sure, reason = _decide(prompt, mime_types, image_uri)
    if not sure:
        return Classification(None, ClassifiedBy.RULES, f"not sure: {reason}")
    return Classification(kind, ClassifiedBy.RULES, reason)


def by_keywords(
    prompt: str, mime_types: Sequence[str], *, image_uri: bool = False
) -> Classification:
    """Always decides: the likelier kind."""
    kind, _, reason = _decide(prompt, mime_types, image_uri)
    return Classification(kind, ClassifiedBy.KEYWORDS, reason)


def _decide(prompt: str, mime_types: Sequence[str], image_uri: bool) -> tuple[Kind, bool, str]:
    images = [m for m in mime_types if m.strip().lower().startswith("image/")]
    with_image = image_uri or bool(images)
    if mime_types and not with_image:
        return Kind.MULTI_MODAL, True, "files are attached, and none is an image"
    rest = Kind.MULTI_MODAL if with_image else Kind.TEXT_ONLY
    verdict = judge(prompt, with_image=with_image)
    if not verdict.wants_image:
        return rest, verdict.sure, verdict.reason
    mixed = len(images) < len(mime_types)
    return Kind.IMAGE_GENERATION, verdict.sure and not mixed, verdict.reason
