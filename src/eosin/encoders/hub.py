"""Files of the Hugging Face hub: the cache first, and no waiting for a network that is not there."""

from __future__ import annotations

import http.client
import os
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

from eosin.encoders.registry import REGISTRY
from eosin.errors import WeightsUnavailableError

PROBE_S = 2.0
"""Longest wait for a first answer of the hub, name look-up included."""
ETAG_S = 3.0
"""Longest wait for the hub's answer about one file."""
_REMEMBER_S = 60.0
_seen: dict[str, tuple[float, bool]] = {}


def fetch(repo: str, filename: str, *, name: str) -> Path:
    """Return the local path of a hub file, downloaded unless it is in the hub's cache.

    Args:
        repo: "owner/name".
        filename: file in the repository.
        name: what the user asked for; it is in the message of an error.

    Raises:
        WeightsUnavailableError: offline, gated or not found; within five seconds where the hub cannot be reached.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    cached = try_to_load_from_cache(repo, filename)
    if isinstance(cached, str):
        return Path(cached)
    endpoint = hub_endpoint()
    if not reachable(endpoint):
        raise unavailable(name, repo, f"offline: {endpoint} cannot be reached")
    try:
        return Path(hf_hub_download(repo, filename, endpoint=endpoint, etag_timeout=ETAG_S))
    except GatedRepoError:
        raise unavailable(
            name, repo, f"gated: accept the terms at {endpoint}/{repo} and log in (hf auth login)"
        ) from None
    except LocalEntryNotFoundError as error:
        raise unavailable(name, repo, f"offline: {endpoint} does not answer") from error
    except (RepositoryNotFoundError, EntryNotFoundError):
        raise unavailable(name, repo, f"not found: {repo} has no {filename}, or it is private") from None
    except (HfHubHTTPError, OSError) as error:
        raise unavailable(name, repo, f"the hub refused: {str(error).splitlines()[0]}") from error


def unavailable(name: str, repo: str, why: str) -> WeightsUnavailableError:
    """Return the one-line error: what, why, and the way out."""
    way = f"eosin encoders import FILE --name {name}" if name in REGISTRY else "give its path instead of the name"
    return WeightsUnavailableError(
        f"weights of {name} ({repo}) are not here; {why}. Get the file elsewhere, then: {way}"
    )


def hub_endpoint() -> str:
    """Return the address of the hub, $HF_ENDPOINT or the public one."""
    from huggingface_hub import constants

    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or constants.ENDPOINT


def reachable(endpoint: str) -> bool:
    """Return whether the hub, or the proxy in front of it, answers; remembered for a minute."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    known = _seen.get(endpoint)
    if known is None or time.monotonic() - known[0] > _REMEMBER_S:
        known = _seen[endpoint] = (time.monotonic(), _answers(endpoint))
    return known[1]


def _answers(endpoint: str) -> bool:
    """Return whether the hub answers a request within `PROBE_S`, through the proxy where one is set.

    A connection alone is no proof: a host that takes connections and stays silent would cost
    huggingface_hub minutes of retries. A thread bounds the name look-up, which has no timeout.
    """
    answered = threading.Event()

    def attempt() -> None:
        request = urllib.request.Request(endpoint, method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=PROBE_S).close()
        except urllib.error.HTTPError as error:
            error.close()
            if error.code >= 500:
                return
        except (OSError, http.client.HTTPException, ValueError):
            return
        answered.set()

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(PROBE_S)
    return answered.is_set()
