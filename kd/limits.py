"""When the next request may go out: limits, pauses and a breaker, shared by all workers of a client."""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

LONGEST_WAIT_S = 300.0  # reset headers are believed that far; a longer Retry-After ends the run


@dataclass(frozen=True)
class Patience:
    """When to wait, how long, and when to give up."""

    timeout_s: float = 300.0  # for a whole answer
    attempts: int = 8  # for a prompt
    backoff_s: float = 0.5  # the first delay's upper end; it doubles
    longest_s: float = 60.0  # the last delay's upper end
    failures: int = 9  # within window_s pause everything
    window_s: float = 30.0


class Gate:
    """When the next request may go out: evenly spaced under both limits, not in a pause, not while the breaker is open."""

    def __init__(self, rpm: float | None, tpm: float | None, patience: Patience) -> None:
        self.rpm, self.tpm, self.patience = rpm or float("inf"), tpm or float("inf"), patience
        self.pauses = 0  # times that the breaker opened
        self._next_request = self._next_tokens = self._paused_until = 0.0  # monotonic seconds
        self._failures: deque[float] = deque()

    def wait_s(self) -> float:
        """Seconds until the next request may go out; at most 0: now."""
        return max(self._next_request, self._next_tokens, self._paused_until) - time.monotonic()

    def take(self, tokens: float) -> None:
        """Count a request of so many tokens, which goes out now."""
        now = time.monotonic()
        self._next_request = max(now, self._next_request) + 60 / self.rpm
        self._next_tokens = max(now, self._next_tokens) + tokens * 60 / self.tpm

    def correct(self, tokens: float) -> None:
        """Give back tokens that a request was expected to use and did not."""
        self._next_tokens -= tokens * 60 / self.tpm

    def pause(self, seconds: float) -> None:
        """Let nothing out for so long."""
        self._paused_until = max(self._paused_until, time.monotonic() + seconds)

    def failed(self) -> None:
        """Count a failure; open the breaker where there are too many."""
        now = time.monotonic()
        self._failures.append(now)
        while self._failures[0] <= now - self.patience.window_s:
            self._failures.popleft()
        if len(self._failures) >= self.patience.failures:
            self.pauses += len(self._failures) == self.patience.failures
            self.pause(self.patience.window_s)

    def note(self, headers: Mapping[str, str]) -> None:
        """Correct the limits from a response's headers."""
        for kind in ("requests", "tokens"):
            limit = number_in(headers.get(f"x-ratelimit-limit-{kind}"))
            if limit is not None and limit > 0:  # 0 or -1 says that there is none
                if kind == "requests":
                    self.rpm = min(self.rpm, limit)
                else:
                    self.tpm = min(self.tpm, limit)
            reset = headers.get(f"x-ratelimit-reset-{kind}")
            if reset and number_in(headers.get(f"x-ratelimit-remaining-{kind}")) == 0:
                self.pause(min(reset_s(reset), LONGEST_WAIT_S))


def number_in(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None


def reset_s(text: str) -> float:
    """Seconds that a reset header means: a UNIX timestamp (s or ms), seconds, or OpenAI's "6m0s" and "20ms"; 0 if unknown."""
    value = number_in(text)
    if value is None:
        units = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
        return sum(float(n) * units[unit] for n, unit in re.findall(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)", text))
    if value > 1e12:
        value /= 1000
    return max(0.0, value - time.time() if value > 1e9 else value)


def retry_after_s(text: str | None) -> float:
    """Seconds that a Retry-After header means: seconds or an HTTP date; 0 if there is none."""
    value = number_in(text)
    if value is not None:
        return max(0.0, value)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time()) if text else 0.0
    except (ValueError, OverflowError):
        return 0.0
