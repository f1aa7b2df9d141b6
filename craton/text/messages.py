"""Messages as they are before a chat template: a role, and content in parts that stay apart until the last moment.

A part is {"type": "text", "text": ...} or {"type": "image", "url": "data:image/..."}; content that is a plain string is
one text. The shapes that the APIs send are turned into these by `parts_of`.
"""

import base64
import binascii
import io
from typing import Any

from PIL import Image

from craton.base import UserError

Content = str | list[dict[str, Any]]


def parts_of(content: Any) -> Content:
    """Content of a message of OpenAI's, Open Responses' or Anthropic's API in our parts. UserError for a picture that
    is none."""
    if content is None or isinstance(content, str):
        return content or ""
    out: list[dict[str, Any]] = []
    for part in content:
        kind = part["type"]
        if kind in ("text", "input_text", "output_text", "reasoning_text", "summary_text"):
            out.append({"type": "text", "text": part["text"]})
        elif kind == "refusal":
            out.append({"type": "text", "text": part["refusal"]})
        elif kind == "image_url":
            out.append(picture(part["image_url"]["url"]))
        elif kind == "input_image":
            out.append(picture(part["image_url"]))
        elif kind == "image":
            source = part["source"]
            out.append(picture(f"data:{source['media_type']};base64,{source['data']}"))
    return out


def joined(*contents: Content) -> Content:
    """One content after another."""
    kept = [c for c in contents if c]
    if len(kept) < 2:
        return kept[0] if kept else ""
    parts: list[dict[str, Any]] = []
    for content in kept:
        parts += [{"type": "text", "text": content}] if isinstance(content, str) else content
    return parts


def picture(url: str) -> dict[str, Any]:
    """A picture given as a data: URL. UserError if it is none; addresses are not fetched."""
    with _opened(url):
        return {"type": "image", "url": url}


def text_of(content: Content) -> str:
    """All parts as text, for a model that knows no others. UserError for a picture."""
    if isinstance(content, str):
        return content
    if any(part["type"] == "image" for part in content):
        raise UserError("messages: this model cannot see pictures; leave them out", field="messages")
    return "\n".join(part["text"] for part in content)


def _opened(url: str) -> Any:
    """The picture of a data: URL; only its header is read."""
    head, comma, data = url.partition(",")
    if not (head.startswith("data:image/") and head.endswith(";base64") and comma):
        raise UserError("image: give it as data:image/...;base64,...; addresses are not fetched", field="image")
    try:
        return Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
    except (binascii.Error, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise UserError("image: not a picture that can be read", field="image") from None
