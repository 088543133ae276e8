"""A small text from a URL, once the user has said that it may be read."""

from __future__ import annotations

import hashlib
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import urlopen

from inlay.files.untrusted import LENGTH, DamagedFileError

WAIT = 20.0  # seconds


def is_url(path: str | None) -> bool:
    """Return whether a path is the address of something elsewhere."""
    return path is not None and "://" in path


def fetch(url: str, folder: Path) -> tuple[Path, str]:
    """Write the text at an https address to a file in `folder`, and return the file and the text's SHA-256.

    Raises:
        ValueError: the address, or one that it leads to, is not https, nothing is there, or it is too long or no text.
    """
    if urlsplit(url).scheme != "https":
        raise ValueError(f"{url}: recipes are read from https addresses alone")
    try:
        with urlopen(url, timeout=WAIT) as answer:
            if urlsplit(answer.url).scheme != "https":
                raise ValueError(f"{url} leads to {answer.url}, which is not https")
            content = answer.read(LENGTH + 1)
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        raise DamagedFileError(f"{url} is no text in UTF-8") from None
    except OSError as error:
        raise ValueError(f"{url} cannot be read: {error}") from None
    if len(content) > LENGTH:
        raise DamagedFileError(f"{url} has more than {LENGTH:,} bytes")
    file = folder / (Path(urlsplit(url).path).name or "recipe.yaml")
    file.write_text(text, encoding="utf-8")
    return file, hashlib.sha256(content).hexdigest()
