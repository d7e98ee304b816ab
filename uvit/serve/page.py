"""The page for a browser, page.html, and what the browser lets it do."""

import base64
import hashlib
import re
from pathlib import Path

PAGE = Path(__file__).with_name("page.html")


def read_page() -> tuple[bytes, dict[str, str]]:
    """(the file, its headers). The browser runs the file's own script and style, and nothing else, on this page.

    So a text that someone slips into the page, such as a prompt, cannot become code, and nothing is loaded from or sent
    to another address.
    """
    page = PAGE.read_bytes()
    policy = [
        "default-src 'none'",
        *(f"{kind}-src '{hash_of(page, tag)}'" for kind, tag in (("script", b"script"), ("style", b"style"))),
        "img-src blob: data:",  # images come by fetch
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
    return page, {
        "Content-Security-Policy": "; ".join(policy),
        "Cache-Control": "no-cache",  # after an update of the server, its page too
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }


def hash_of(page: bytes, tag: bytes) -> str:
    """Of the content of the page's only element with this tag, as a Content-Security-Policy names it."""
    (content,) = re.findall(rb"<%s>(.*?)</%s>" % (tag, tag), page, re.DOTALL)
    return f"sha256-{base64.b64encode(hashlib.sha256(content).digest()).decode()}"
