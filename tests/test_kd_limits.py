"""Rate limits: what headers say, by a clock that stands still, and the spacing of requests."""

from __future__ import annotations

import time
from types import SimpleNamespace

import httpx
import pytest
from faulty_server import good
from test_kd_client import BODY, QUICK, call, replies

from kd.kd_client import TeacherClient
from kd.limits import Gate, Patience, reset_s, retry_after_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that stands still, for the limits."""
    clock = SimpleNamespace(monotonic=lambda: 1000.0, time=lambda: 1.75e9)
    monkeypatch.setattr("kd.limits.time", clock)
    return clock


def test_reset_headers(clock: SimpleNamespace) -> None:
    assert reset_s("12") == 12 and reset_s("6m0s") == 360 and reset_s("20ms") == pytest.approx(0.02) and reset_s("soon") == 0
    assert (
        reset_s("1.5s") == 1.5 and 0 <= reset_s("1.2.3s") < 10 and retry_after_s("Mon, 30 Nov 2026 00:00:00 +9999999999") == 0
    )
    assert reset_s(str(clock.time() + 30)) == reset_s(str(clock.time() * 1000 + 30_000)) == 30
    assert retry_after_s("Wed, 21 Oct 2015 07:28:00 GMT") == 0 and retry_after_s("2.5") == 2.5
    assert retry_after_s("x") == retry_after_s(None) == 0
    gate = Gate(None, None, QUICK)
    gate.note({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": str(clock.time() + 5)})  # as on Venice
    assert gate.wait_s() == 5
    gate.note({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "9"})  # Venice: seconds
    assert gate.wait_s() == 9
    gate.note({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "999999"})
    assert gate.wait_s() == 300


def test_limits_follow_headers(clock: SimpleNamespace) -> None:
    gate = Gate(600, 60_000, QUICK)
    gate.take(1000)
    assert gate.wait_s() == pytest.approx(1.0)  # 1000 tokens at 1000 a second
    gate.correct(900)
    assert gate.wait_s() == pytest.approx(0.1)  # one request at 10 a second
    gate.note({"x-ratelimit-limit-requests": "60", "x-ratelimit-limit-tokens": "90000"})
    assert (gate.rpm, gate.tpm) == (60, 60_000)
    for unlimited in ("-1", "0", "nan", "none"):
        gate.note({"x-ratelimit-limit-requests": unlimited, "x-ratelimit-limit-tokens": unlimited})
    assert (gate.rpm, gate.tpm) == (60, 60_000)


def test_limits_space_requests() -> None:
    start = time.monotonic()

    async def three(client: TeacherClient) -> None:
        for _ in range(3):
            await client.ask(BODY)

    call(replies(httpx.Response(200, json=good())), three, rpm=300)
    assert time.monotonic() - start >= 0.4


def test_a_shorter_pause_does_not_end_a_longer_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kd.limits.time", SimpleNamespace(monotonic=lambda: 1000.0, time=lambda: 1.75e9))
    gate = Gate(None, None, Patience())
    gate.pause(300)
    gate.pause(1)  # of another worker, which was told less
    assert gate.wait_s() == 300 and reset_s("1h0m0s") == 3600 and reset_s("1d") == 86400
