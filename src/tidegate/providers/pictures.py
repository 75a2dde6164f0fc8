"""What kind of picture some bytes are, by content alone. Pure.

Invariant: a type is named only on a signature that no other supported type shares; everything
else, a page or a text included, is None.
"""

from __future__ import annotations

PICTURE_TYPES = ("image/png", "image/jpeg", "image/webp", "image/gif", "image/heic", "image/heif")

_HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}
_HEIF_BRANDS = {b"mif1", b"msf1", b"mif2"}


def picture_type(head: bytes) -> str | None:
    """The MIME type of the picture that begins with `head` (32 bytes are enough), or None."""
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if head.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "image/gif"
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "image/webp"
    return _iso_picture(head)


def iso_brands(head: bytes) -> list[bytes]:
    """The brands of an ISO base media file (MP4, HEIF, ...), major first; empty for others."""
    if head[4:8] != b"ftyp" or len(head) < 12:
        return []
    end = min(int.from_bytes(head[:4], "big"), len(head), 256)
    return [head[8:12], *(head[at : at + 4] for at in range(16, end - 3, 4))]


def _iso_picture(head: bytes) -> str | None:
    brands = iso_brands(head)
    if not brands:
        return None
    if brands[0] in _HEIC_BRANDS:
        return "image/heic"
    if brands[0] in _HEIF_BRANDS:
        # AVIF files may lead with the general brand too, and we do not take those.
        return None if b"avif" in brands or b"avis" in brands else "image/heif"
    return None
