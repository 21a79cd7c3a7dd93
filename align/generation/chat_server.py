"""Requests to an OpenAI-compatible server, over the standard library: what fails for the moment is tried again."""

import http.client
import json
import os
import random
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from align.config.errors import UserError
from align.generation.speakers import Failed

T = TypeVar("T")
LONGEST_BACKOFF_SECONDS = 60.0
LONGEST_WAIT_SECONDS = 600.0
"""A server that asks for more (Retry-After) is asked again after this long."""
FOR_EVERY_ROW = {
    401: "does not take the key",
    402: "wants to be paid first",
    404: "knows no such path or model",
}
"""Statuses that would meet every other request too, so that the run stops instead of failing row by row."""


class Malformed(ValueError):
    """The server's answer is not what the interface says."""


@dataclass(frozen=True)
class Setback:
    """Why one try came to nothing, and how long the server wants to be left alone (seconds)."""

    failed: Failed
    again: bool
    wait_seconds: float = 0.0


class ChatServer:
    """One server, one model's worth of settings. Threads may share it."""

    def __init__(self, url: str, *, key_env: str | None, timeout_seconds: float, retries: int, backoff_seconds: float):
        """url: `http(s)://host[:port]`, with or without `/v1` or `/v1/chat/completions`. key_env: the environment
        variable that holds the key; None: the server wants none. timeout_seconds: for one answer. retries: tries after
        the first. backoff_seconds: the longest pause before the second try; it doubles with each.

        Raises: UserError if the URL is none, or the variable holds no usable key.
        """
        self.url = _chat_url(url)
        self._key = _key_of(key_env)
        self._key_env, self._timeout, self._retries, self._backoff = key_env, timeout_seconds, retries, backoff_seconds
        self._opener = urllib.request.build_opener(_NoRedirect)
        self.stopped = threading.Event()
        """Set to end all waiting: what is under way fails, and nobody reads it."""

    def post(self, body: Mapping[str, Any], read: Callable[[dict[str, Any]], T], *, seed: int) -> T | Failed:
        """What `read` makes of the server's answer; it raises Malformed, KeyError, IndexError or TypeError for one that
        it cannot read. Pauses between tries are drawn from the seed (full jitter), and no shorter than Retry-After.

        Raises: UserError for what would meet every other request too: a key, a path or a model that is refused.
        """
        for attempt in range(self._retries + 1):
            result = self._try(body, read)
            if not isinstance(result, Setback):
                return result
            if not result.again or attempt == self._retries or self.stopped.is_set():
                break
            jitter = random.Random(f"{seed} {attempt}").random()
            pause = jitter * min(LONGEST_BACKOFF_SECONDS, self._backoff * 2**attempt)
            self._pause(min(LONGEST_WAIT_SECONDS, max(pause, result.wait_seconds)))
        return result.failed

    def _pause(self, seconds: float) -> None:
        self.stopped.wait(seconds)

    def _try(self, body: Mapping[str, Any], read: Callable[[dict[str, Any]], T]) -> T | Setback:
        text = b""
        try:
            text = self._answer(body)
            return read(json.loads(text))
        except urllib.error.HTTPError as error:
            with error:
                return self._refused(error)
        # TimeoutError is an OSError, and urllib wraps it in another.
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                return Setback(Failed("timeout", f"no answer from {self.url} in {self._timeout:g} s"), True)
            return Setback(Failed("unreachable", self._clean(f"{self.url}: {type(reason).__name__}: {reason}")), True)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            shown = text[:200].decode("utf-8", "replace")
            detail = f"{self.url} answered what cannot be read ({type(error).__name__}: {error}): {shown}"
            return Setback(Failed("malformed", self._clean(detail)), True)

    def _answer(self, body: Mapping[str, Any]) -> bytes:
        """The body of an answer. Raises: HTTPError unless it is a 2xx; TimeoutError, OSError, HTTPException."""
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "align"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers, method="POST")
        deadline = time.monotonic() + self._timeout
        with self._opener.open(request, timeout=self._timeout) as response:
            # The socket's timeout is for each piece: a server that sends one byte a minute would never end.
            pieces = []
            while piece := response.read1(1 << 16):
                pieces.append(piece)
                if time.monotonic() > deadline:
                    raise TimeoutError
            return b"".join(pieces)

    def _refused(self, error: urllib.error.HTTPError) -> Setback:
        """Raises: UserError for a status that would meet every other request too."""
        try:
            said = _message(error.read(1 << 16))
        except (OSError, http.client.HTTPException):
            said = ""
        detail = self._clean(f"HTTP {error.code} from {self.url}: {said or error.reason}")
        if error.code in FOR_EVERY_ROW:
            what = FOR_EVERY_ROW[error.code]
            key = f" (from the environment variable {self._key_env})" if self._key_env else " (none was given: key_env)"
            raise UserError(f"the server {what}{key if error.code == 401 else ''}: {detail}")
        if 300 <= error.code < 400:
            target = self._clean(str(error.headers.get("Location")))
            raise UserError(f"{self.url} redirects to {target}; give that URL")
        wait = _seconds_of(error.headers.get("Retry-After"))
        if error.code == 429:
            return Setback(Failed("rate_limited", detail), True, wait)
        if error.code >= 500 or error.code == 408:
            return Setback(Failed("server_error", detail), True, wait)
        return Setback(Failed("refused_by_server", detail), False)

    def _clean(self, text: str) -> str:
        """One short line without the key, which servers like to repeat."""
        if self._key:
            text = text.replace(self._key, "<key>")
        text = " ".join(text.split())
        return text if len(text) <= 400 else text[:397] + "..."


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """urllib would follow with a GET, and take the key to another host."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _chat_url(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"{url}: not the URL of a server; give one such as http://127.0.0.1:8000/v1")
    if parts.username or parts.password:
        raise UserError("the server's URL holds a password; give the key in an environment variable (key_env)")
    path = parts.path.rstrip("/")
    if not path.endswith("/chat/completions"):
        path = (path or "/v1") + "/chat/completions"
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))


def _key_of(key_env: str | None) -> str:
    if key_env is None:
        return ""
    key = os.environ.get(key_env, "").strip()
    if not key:
        raise UserError(f"the environment variable {key_env} is to hold the server's key, and is not set")
    # http.client would show such a header in its error.
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(f"the environment variable {key_env} holds blanks or signs that no key has; set it again")
    return key


def _message(body: bytes) -> str:
    """What an error's body says, by the interface or as it is."""
    text = body.decode("utf-8", "replace")
    try:
        error = json.loads(text)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return text


def _seconds_of(retry_after: str | None) -> float:
    """Retry-After in seconds, which may be given as a date; 0 if it says nothing."""
    if not retry_after:
        return 0.0
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(retry_after) - datetime.now(timezone.utc)).total_seconds()
        except (ValueError, TypeError):
            return 0.0
    return max(0.0, seconds) if seconds == seconds else 0.0
