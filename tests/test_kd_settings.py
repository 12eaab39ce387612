"""Where the teacher is: environment, .env and flags; what is refused, without naming the key."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.errors import UserError
from kd.settings import Settings

KEY = "sk-a-very-secret-key-0123456789"


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VENICE_BASE_URL", "VENICE_MODEL", "VENICE_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "VENICE_BASE_URL"),
        ({"VENICE_BASE_URL": "https://x/v1"}, "VENICE_MODEL"),
        ({"VENICE_BASE_URL": "http://example.com/v1", "VENICE_MODEL": "m"}, "plain http to another machine"),
        ({"VENICE_BASE_URL": "ftp://x", "VENICE_MODEL": "m"}, "expected https://"),
        ({"VENICE_BASE_URL": f"https://me:{KEY}@x/v1", "VENICE_MODEL": "m"}, "user name or password"),
        ({"VENICE_BASE_URL": f"me:{KEY}@x/v1", "VENICE_MODEL": "m"}, "user name or password"),
        ({"VENICE_BASE_URL": f"https://me:{KEY}", "VENICE_MODEL": "m"}, "expected https://"),
        ({"VENICE_BASE_URL": f"https://x/v1?key={KEY}", "VENICE_MODEL": "m"}, "expected https://"),
        ({"VENICE_BASE_URL": KEY, "VENICE_MODEL": "m"}, "expected https://"),
        ({"VENICE_BASE_URL": "https://x/v1", "VENICE_MODEL": "m", "VENICE_API_KEY": KEY + "\u2026"}, "outside ASCII"),
        ({"VENICE_BASE_URL": "https://x/v1", "VENICE_MODEL": "m", "VENICE_API_KEY": f"a\n{KEY}"}, "control character"),
    ],
)
def test_settings_that_are_refused(monkeypatch: pytest.MonkeyPatch, values: dict[str, str], message: str) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message) as caught:
        Settings.load(env_file="/nowhere")
    assert KEY not in str(caught.value)


def test_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    env = tmp_path / ".env"
    env.write_text(f"VENICE_BASE_URL=https://api.venice.ai/api/v1/\nVENICE_API_KEY= {KEY} \nVENICE_MODEL=from-file\n")
    monkeypatch.setenv("VENICE_MODEL", "from-environment")
    settings = Settings.load(env_file=str(env))
    assert (settings.base_url, settings.model, settings.api_key) == ("https://api.venice.ai/api/v1", "from-environment", KEY)
    assert settings.is_venice and Settings.load(model="mine", env_file=str(env)).model == "mine"
    for url in ("http://127.0.0.1:1/v1", "http://localhost:1/v1", "http://[::1]:1/v1"):
        assert not Settings.load(base_url=url, env_file=str(env)).is_venice
    assert Settings.load(base_url="http://10.0.0.2/v1", allow_http=True, env_file=str(env)).host == "10.0.0.2"


def test_an_env_file_of_another_encoding(tmp_path: Path) -> None:
    """As editors on Windows save it: UTF-16 is refused in one line, UTF-8 with its mark in front is read."""
    env = tmp_path / ".env"
    content = f"VENICE_BASE_URL=https://x/v1\nVENICE_API_KEY={KEY}\nVENICE_MODEL=m\n"
    env.write_text(content, encoding="utf-16")
    with pytest.raises(UserError, match=r"\.env is not UTF-8 text"):
        Settings.load(env_file=str(env))
    env.write_text(content, encoding="utf-8-sig")
    assert Settings.load(env_file=str(env)) == Settings("https://x/v1", "m", KEY)


@pytest.mark.parametrize(
    ("host", "venice", "hosted", "local"),
    [
        ("api.venice.ai", True, True, False),
        ("api.openai.com", False, True, False),
        ("notopenai.com", False, False, False),
        ("venice.ai.example.com", False, False, False),
        ("127.0.0.1:8001", False, False, True),
        ("[::1]:8001", False, False, True),
        ("localhost", False, False, True),
    ],
)
def test_which_server_it_is(host: str, venice: bool, hosted: bool, local: bool) -> None:
    settings = Settings(f"https://{host}/v1", "m")
    assert (settings.is_venice, settings.is_hosted, settings.is_local) == (venice, hosted, local)
