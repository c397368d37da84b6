"""Owns the live page as it is served: one file, and the policy that lets it load nothing else.

It holds no data: its script asks for `/status.json`. Called by `app`.
"""

from __future__ import annotations

import re
from base64 import b64encode
from hashlib import sha256
from pathlib import Path

HTML = (Path(__file__).parent / "page.html").read_bytes()


def _hashes(element: str) -> str:
    """Return the sources that allow what is written within the page's elements of that name, and no more."""
    found = re.findall(rf"<{element}>(.*?)</{element}>".encode(), HTML, re.DOTALL)
    return " ".join(f"'sha256-{b64encode(sha256(each).digest()).decode()}'" for each in found)


#: The page's Content-Security-Policy.
POLICY = (
    f"default-src 'none'; script-src {_hashes('script')}; style-src {_hashes('style')}; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
