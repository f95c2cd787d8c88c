"""Small files that are there whole or not at all, whatever ends the process meanwhile."""

import os
import secrets
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Puts a file in its place, over an older one. Raises OSError, which leaves that as it was."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        draft.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
