"""Can this server be a teacher, and of which kind? Asks it what it offers, then makes one real call (a fraction of a cent).

    python tools/verify_api.py --tokenizer data/tokenizer

The server is VENICE_BASE_URL, VENICE_API_KEY and VENICE_MODEL, from the environment or .env. Exit code 0: all is well;
1: usable, with a restriction that is stated (text alone, say); 2: not usable. What to do is said in both cases.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from ae.tokenizer_adapter import TokenizerAdapter
from configs.errors import EXIT_USER_ERROR, UserError, run_cli
from configs.schema import opt, parse_config
from kd.harvest import IF_NO_TEXT, NO_TEXT
from kd.kd_client import Answer, Dropped, ModelInfo, TeacherClient
from kd.limits import Patience
from kd.prompts import HarvestConfig, Job, request_of, uses_chat
from kd.records import MISSING, Misaligned, TokenTable, parse_answer, text_of_answer
from kd.settings import Settings

PROMPT = "Write a short sentence about a caf\u00e9 in \u6771\u4eac, with an emoji."  # tokens that split characters
ATTEMPTS = 3


@dataclass
class VerifyConfig:
    """Settings of the check; each is a flag."""

    tokenizer: str | None = opt(
        None, "folder, tokenizer.json or hub name that the student uses; unset: alignment is not checked"
    )
    base_url: str | None = opt(None, "server, up to /v1; unset: VENICE_BASE_URL")
    model: str | None = opt(None, "teacher; unset: VENICE_MODEL")
    mode: str = opt("auto", "chat, completions, or auto: chat on Venice and OpenAI", choices=("auto", "chat", "completions"))
    top_logprobs: int = opt(20, "most probable tokens to ask for", low=1)
    max_new_tokens: int = opt(32, "tokens of the call", low=1)
    timeout_s: float = opt(60.0, "seconds that an answer may take", low=1e-9)
    allow_http: bool = opt(False, "allow plain http to another machine")
    allow_other_model: bool = opt(False, "accept an answer of another model than asked for")


class Report:
    """A table that is printed as it grows, and what restricts the teacher's use."""

    def __init__(self) -> None:
        self.restrictions: list[str] = []

    def row(self, what: str, found: str, restriction: str = "") -> None:
        """One line; `restriction`: what the finding means and what to do about it."""
        print(f"{'!!' if restriction else 'ok'}  {what:<12}  {found}")
        if restriction:
            self.restrictions.append(restriction)


async def verify(cfg: VerifyConfig, client: TeacherClient, tokenizer: TokenizerAdapter | None, report: Report) -> None:
    """Fill the report. Raises UserError where the server cannot be used."""
    settings = client.settings
    models = await client.models()
    kind = "Venice" if settings.is_venice else "OpenAI" if settings.is_hosted else "OpenAI-like"
    report.row("server", f"{settings.base_url} ({kind}), {len(models)} models listed")
    describe(client, models, report)

    chat = uses_chat(cfg.mode, settings)
    asked = HarvestConfig(max_new_tokens=cfg.max_new_tokens, text_prompts=tokenizer is None)
    job = request_of(asked, settings, tokenizer, chat, 0, {"prompt": PROMPT})
    try:
        answer, fields, top = await client.probe(job.body, cfg.top_logprobs)
    except Dropped as error:
        raise UserError(f"the call failed: {error}") from None
    job.body |= fields
    path = "/chat/completions" if chat else "/completions"
    cost = f"${answer.cost:.6f}" if answer.cost else client.dollars  # a cent buys hundreds of such calls
    report.row("call", f"{path}: {answer.completion_tokens} tokens in {answer.seconds:.2f} s, {cost}")
    await limits(client, report)
    if not text_of_answer(answer.body):
        report.row("text", "none", f"{NO_TEXT} in {answer.completion_tokens} tokens: {IF_NO_TEXT}")
    told = answer.body.get("model")
    if told is not None and told != settings.model:
        report.row("answered by", str(told), f"the answers are those of {told!r}")
    if not top:
        others = ", ".join(model.name for model in models if model.logprobs) or "none"
        advice = f"no top logprobs: its text alone can teach (sequence-level). Models listed there that give logprobs: {others}"
        report.row("logprobs", "none" if top is None else "of the sampled token alone", advice)
    else:
        least = "" if top >= cfg.top_logprobs else f"{top} top logprobs a token, not {cfg.top_logprobs}: a longer tail"
        report.row("logprobs", f"{top} a token", least)
    align(job, answer, tokenizer, report)


def describe(client: TeacherClient, models: list[ModelInfo], report: Report) -> None:
    """The model's row in the list: price, context, notes."""
    model = client.model
    if model not in models:
        near = ", ".join(other.name for other in models[:8])
        report.row("model", f"{model.name} is not listed", f"{model.name} is not among the models listed ({near or 'none'})")
        return
    report.row("model", model.name, f"{model.name}: {model.note}" if model.note else "")
    price = "not listed" if model.cost(0, 0) is None else f"${model.input_usd:g} in, ${model.output_usd:g} out per 1M tokens"
    report.row("price", price)
    report.row("context", f"{model.context or 'unknown'} tokens, longest answer {model.max_output or 'unknown'}")
    if model.logprobs is not None:
        report.row("listed as", "with logprobs" if model.logprobs else "without logprobs")


async def limits(client: TeacherClient, report: Report) -> None:
    """Limits and balance by the last response's headers, and Venice's own account of them."""
    names = ("limit-requests", "remaining-requests", "limit-tokens", "remaining-tokens")
    found = [f"{name} {client.headers[key]}" for name in names if (key := f"x-ratelimit-{name}") in client.headers]
    report.row("limits", ", ".join(found) or "not told")
    money = [
        f"{unit} {client.headers[key]}" for unit in ("usd", "diem") if (key := f"x-venice-balance-{unit}") in client.headers
    ]
    if money:
        report.row("balance", ", ".join(money) + " before the call")
    if warning := client.headers.get("x-venice-model-deprecation-warning"):
        report.row("retirement", warning, f"the model will be retired: {warning}")
    if client.settings.is_venice:
        try:
            data: Any = (await client.get("/api_keys/rate_limits")).get("data") or {}
            tiers = [tier for tier in data.get("rateLimits", []) if tier.get("apiModelId") == client.settings.model]
            said = ", ".join(f"{limit['type']} {limit['amount']}" for tier in tiers for limit in tier["rateLimits"])
            report.row("by account", said or "no entry for this model")
        except (UserError, KeyError, TypeError, AttributeError) as error:
            report.row("by account", f"/api_keys/rate_limits cannot be read ({type(error).__name__})")


def align(job: Job, answer: Answer, tokenizer: TokenizerAdapter | None, report: Report) -> None:
    """Whether the answer's tokens are tokens of ours."""
    if tokenizer is None:
        return report.row("tokens", "not compared (no --tokenizer)")
    name = f"{tokenizer.source} ({tokenizer.size:,} entries)"
    try:
        record = parse_answer(job.body, answer.body, TokenTable(tokenizer), prompt_ids=job.prompt_ids)
    except Misaligned as error:
        advice = (
            f"its tokens are not those of {tokenizer.source} ({error}): give --tokenizer of this teacher, or use its text "
            "alone (kd/harvest.py --top_logprobs 0, kd/kd_batcher.py --k 0, --use_kd --kd_k 0)"
        )
        return report.row("tokens", f"do not align with {name}", advice)
    if not record.has_logprobs:
        return report.row("tokens", "nothing to compare without logprobs")
    known = (record.top_ids != MISSING).mean()
    report.row("tokens", f"all {len(record.sampled_id)} align with {name}; {known:.1%} of the top entries have an id")


def main() -> int:
    cfg = parse_config(VerifyConfig, __doc__)
    settings = Settings.load(cfg.base_url, cfg.model, cfg.allow_http)
    tokenizer = None if cfg.tokenizer is None else TokenizerAdapter.load(cfg.tokenizer)
    client = TeacherClient(
        settings, allow_other_model=cfg.allow_other_model, patience=Patience(timeout_s=cfg.timeout_s, attempts=ATTEMPTS)
    )
    report = Report()

    async def run() -> None:
        async with client:
            await verify(cfg, client, tokenizer, report)

    try:
        asyncio.run(run())
    except UserError as error:
        print(f"!!  {error}\nnot usable")
        return EXIT_USER_ERROR
    if report.restrictions:
        print("usable, but:\n  " + "\n  ".join(report.restrictions))
        return 1
    print("usable")
    return 0


if __name__ == "__main__":
    run_cli(main)
