"""Say at once when a hub cannot be reached, where its client would try again for a minute."""

from __future__ import annotations

import os
import socket
import threading
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

import huggingface_hub
from huggingface_hub import constants

from inlay.messages import similar_paths

WAIT = 4.0  # seconds for the hub's machine to take a connection


@cache
def reachable(endpoint: str) -> bool:
    """Return whether the machine of a hub takes a connection; through a proxy, which asks itself, that is not tried."""
    parts = urlsplit(endpoint)
    if parts.scheme in getproxies():
        return True
    answers: list[bool] = []

    def connect() -> None:
        try:
            port = parts.port or {"http": 80}.get(parts.scheme, 443)
            socket.create_connection((parts.hostname or "", port), WAIT).close()
        except OSError:
            return
        answers.append(True)

    asking = threading.Thread(target=connect, daemon=True)  # looking up a name has no limit of time of its own
    asking.start()
    asking.join(WAIT)
    return bool(answers)


def offline() -> bool:
    """Return whether hubs are not asked: HF_HUB_OFFLINE says so, or the hub was just found out of reach.

    Its client is then told the same, so that what the cache holds is taken without asking.
    """
    if not constants.HF_HUB_OFFLINE and not reachable(constants.ENDPOINT):
        constants.HF_HUB_OFFLINE = True
    return constants.HF_HUB_OFFLINE


def why_offline() -> str:
    """Return why hubs are not asked, and what helps, as the end of an error's line."""
    host = urlsplit(constants.ENDPOINT).hostname
    set_so = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE")
    cause = "HF_HUB_OFFLINE is set" if set_so else f"{host} cannot be reached"
    return f"{cause}; give a local folder, or a mirror in HF_ENDPOINT (HF_HUB_OFFLINE=1 does not even ask)"


def check_hub_model(name: str, revision: str | None) -> None:
    """Raise a ValueError where a hub's model is neither in the cache nor to be had."""
    if offline() and not isinstance(
        huggingface_hub.try_to_load_from_cache(name, "config.json", revision=revision), str
    ):
        near = similar_paths(Path(name))
        raise ValueError(f"model {name!r} is no folder here{near} and is not in the cache, and {why_offline()}")
