"""Where the teacher is: its address, its name and the key, from the environment or .env."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass, field

import httpx
from dotenv import dotenv_values

from configs.errors import UserError


@dataclass(frozen=True)
class Settings:
    """Where the teacher is. The key is left out of the repr."""

    base_url: str
    model: str
    api_key: str = field(default="", repr=False)

    @classmethod
    def load(
        cls, base_url: str | None = None, model: str | None = None, allow_http: bool = False, env_file: str = ".env"
    ) -> Settings:
        """VENICE_BASE_URL, VENICE_API_KEY and VENICE_MODEL from the environment, else from `env_file`; arguments win.

        Raises UserError for what is missing or unsafe, without naming the key.
        """
        try:
            values = {**dotenv_values(env_file, encoding="utf-8-sig"), **os.environ}
        except UnicodeDecodeError:
            raise UserError(f"{env_file} is not UTF-8 text; save it again as UTF-8") from None
        url = (base_url or values.get("VENICE_BASE_URL") or "").strip().rstrip("/")
        name = (model or values.get("VENICE_MODEL") or "").strip()
        key = (values.get("VENICE_API_KEY") or "").strip()
        if not url or not name:
            raise UserError(
                "which teacher? Set VENICE_BASE_URL (such as https://api.venice.ai/api/v1 or http://127.0.0.1:8001/v1) and "
                "VENICE_MODEL in the environment or in .env (see .env.example), or give --base_url and --model"
            )
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise UserError("VENICE_API_KEY has a space, a control character or a character outside ASCII; paste it again")
        if "@" in url:  # nothing of it is shown: the key may have been put there
            raise UserError("VENICE_BASE_URL holds a user name or password; put the key into VENICE_API_KEY instead")
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL:
            parsed = httpx.URL()
        if parsed.scheme not in ("http", "https") or not parsed.host or parsed.query or parsed.fragment:
            raise UserError(
                "VENICE_BASE_URL (or --base_url): expected https://host/path, or http:// on this machine, without ? and #; "
                "what it holds is not shown, as it may be a secret"
            )
        if parsed.scheme == "http" and not _is_loopback(parsed.host) and not allow_http:
            raise UserError(
                f"{url} is plain http to another machine: key and text could be read on the way. Use https, or --allow_http "
                "on a network you trust"
            )
        return cls(url, name, key)

    @property
    def host(self) -> str:
        return httpx.URL(self.base_url).host

    @property
    def is_local(self) -> bool:
        """This machine."""
        return _is_loopback(self.host)

    @property
    def is_venice(self) -> bool:
        return _belongs_to(self.host, "venice.ai")

    @property
    def is_hosted(self) -> bool:
        """Venice or OpenAI, which refuse the fields of vLLM."""
        return self.is_venice or _belongs_to(self.host, "openai.com")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _belongs_to(host: str, domain: str) -> bool:
    return host == domain or host.endswith("." + domain)
