"""Paths are split before their segments are decoded: a name with an encoded slash is one name."""

from urllib.parse import unquote

from aiohttp import web


def segments_of(request: web.Request) -> list[str]:
    """The path's segments as they were sent, without the empty one behind a last slash."""
    segments = request.rel_url.raw_path.split("/")[1:] or [""]
    return segments[:-1] if len(segments) > 1 and not segments[-1] else segments


def decoded(segment: str) -> str:
    """What a segment names; one that is not UTF-8 names nothing, and is told back as it came."""
    try:
        return unquote(segment, errors="strict")
    except UnicodeDecodeError:
        return segment
