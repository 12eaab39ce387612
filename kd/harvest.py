"""Ask a teacher for text, with its logprobs where it gives them, until the store holds --n_tokens of it.

    python kd/harvest.py --data data/packed --n_tokens 1000000 --budget_usd 5 --dry_run

The teacher is VENICE_BASE_URL, VENICE_API_KEY and VENICE_MODEL, from the environment or .env. Prompts are the beginnings of
packed documents (--data), JSON lines (--prompts: `text` to be continued, `prompt` to be answered, or chat `messages`), or
neither: a base model's start of text, its begin-of-text token or, where it has none, end-of-text. They are used in order, and
again with other seeds when all were used. With --mode score the teacher writes nothing: it tells the logprobs of --data's own
text, where the server can (vLLM, kd/local_teacher.py).

Request i is a function of the settings, the prompts and i alone, and an answer is committed before it is used. So the same
command run again, after a kill, a spent budget or for more tokens, asks for what is missing and for nothing else. The
run ends with up to --concurrency answers more than --n_tokens; --budget_usd counts all that the store ever cost, requests
that brought no answer included (not those in flight at a kill -9). A store takes one harvest at a time.
"""

from __future__ import annotations

import asyncio
import gc
import re
import signal
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from configs.errors import UserError, run_cli
from configs.schema import parse_config
from kd.kd_client import (
    STEPS_DOWN,
    Answer,
    Dropped,
    Interrupted,
    Stopped,
    TeacherClient,
    logprob_fields,
    request_tokens,
)
from kd.limits import Patience
from kd.prompts import TEMPLATE, HarvestConfig, Job, Prompts
from kd.records import Misaligned, TokenizerLike, TokenTable, parse_answer, scored_text, text_of_answer, wire_top
from kd.settings import Settings
from kd.store import Store, request_key

LETTERS = re.compile("[^A-Za-z0-9]+")  # what is left out where texts are compared: spaces and broken characters may differ
PROBED = 3  # prompts to try the first call with: a single one may be refused for what it says
ALL_MISALIGNED = 20  # answers, none of which can be used: it is the wrong tokenizer, or a model that writes no text
RECENT, MOSTLY = 100, 90  # so many of the last so many: something has changed, or the good ones were luck
NO_TEXT = "the teacher wrote no text"
IF_NO_TEXT = "one that thinks first needs more --max_new_tokens; one that answers at once teaches more for the money"


@dataclass
class Summary:
    """What a run did. `top_logprobs`: as many a position; None or 0: its text alone can teach."""

    tokens: int = 0
    answers: int = 0
    found: int = 0  # answers that the store held already
    top_logprobs: int | None = None
    dropped: Counter[str] = field(default_factory=Counter)  # prompts without an answer
    aligned: int = 0
    misaligned: Counter[str] = field(default_factory=Counter)  # answers that are kept but cannot be used, by the reason
    errors: Counter[str] = field(default_factory=Counter)  # requests that were tried again
    spent: str = "nothing"  # of the store, for people

    def lines(self) -> Iterator[str]:
        """The summary for people."""
        answers = f"{self.answers + self.found:,} answers ({self.found:,} from earlier runs)"
        yield f"{self.tokens:,} tokens in {answers}; spent in all: {self.spent}"
        if self.answers + self.found:
            kind = f"token-level, top {self.top_logprobs}" if self.top_logprobs else "sequence-level (text alone)"
            yield f"kind of distillation: {kind}"
        for what, counts in (("dropped", self.dropped), ("cannot be used", self.misaligned), ("tried again", self.errors)):
            if counts:
                yield f"{what}: " + ", ".join(f"{count:,} x {reason}" for reason, count in counts.most_common())


class Harvest:
    """One run: what `harvest` does, with its counts."""

    def __init__(
        self, cfg: HarvestConfig, client: TeacherClient, store: Store, prompts: Prompts, log: Callable[[str], None]
    ) -> None:
        self.cfg, self.client, self.store, self.prompts, self.log = cfg, client, store, prompts, log
        self.table = None if prompts.tokenizer is None else TokenTable(prompts.tokenizer)
        self.summary = Summary(errors=client.errors)
        self.fields: dict[str, Any] = {}  # what asks for logprobs
        self.probed = b""  # the key of this run's first call
        self.recent: deque[str | None] = deque(maxlen=RECENT)  # why the last answers cannot be used
        self.disk = ThreadPoolExecutor(1)  # its own: what arrives is stored while others are parsed
        self.bar: Any = None

    async def run(self) -> None:
        """Harvest what is missing. Raises Stopped or UserError when it ends early; `summary` is true either way."""
        cfg, client = self.cfg, self.client
        client.spent, client.on_lost = self.store.totals().cost, self.store.lose
        listed = await client.models()
        if cfg.dry_run:
            return self._estimate(None)
        first = await self._probe()
        if not self.summary.top_logprobs and cfg.mode == "score":
            raise UserError(
                f"{client.settings.base_url} tells no logprobs of a text that it is given: --mode score needs a server that "
                "echoes token ids with their logprobs, such as vLLM or kd/local_teacher.py"
            )
        if not self.summary.top_logprobs:
            why = f"{client.settings.model} gives no top logprobs" if cfg.top_logprobs else "--top_logprobs 0"
            if cfg.top_logprobs and first is None:
                why = "the first stored answer has no top logprobs (another --store or --seed asks for them anew)"
            self.log(f"{why}: going on with its text alone (sequence-level distillation)")
            if cfg.top_logprobs:
                others = ", ".join(model.name for model in listed if model.logprobs) or "none"
                self.log(f"models listed there that give logprobs: {others}")
        elif self.table is None:
            self.log("no --tokenizer: not checked that the teacher's tokens are the student's; packing leaves out what is not")
        self._estimate(first)
        with tqdm(total=cfg.n_tokens, unit="tok", unit_scale=True, desc="harvest", mininterval=0.5) as self.bar:
            await client.run(self._missing(), self._handle)
        if self.summary.tokens < cfg.n_tokens and cfg.mode == "score":
            if missing := self.summary.dropped.total():
                raise UserError(
                    f"{missing:,} requests got no answer, the rest of {cfg.data} is scored; run it again to ask for them"
                )
            self.log(f"all of {cfg.data} is scored: {self.summary.tokens:,} tokens")
        elif self.summary.tokens < cfg.n_tokens:
            raise UserError(
                f"the prompts are used up at {self.summary.tokens:,} of {cfg.n_tokens:,} tokens: at temperature 0 each is used "
                "once; bring more, or raise --temperature"
            )

    async def _probe(self) -> Answer | None:
        """Find out what logprobs there are: from the first prompt's stored answer, else by asking for it."""
        cfg, client = self.cfg, self.client
        problem, held = Dropped("no prompts"), len(self.store)
        steps = [k for k in (cfg.top_logprobs, *STEPS_DOWN) if 0 < k <= cfg.top_logprobs]
        for job in islice(self.prompts, PROBED):
            for fields in (*(logprob_fields(job.body, k) for k in steps), {}):
                if (stored := self.store.get(self._key({**job.body, **fields}))) is not None:
                    self.fields, self.summary.top_logprobs = fields, wire_top(stored.answer)
                    return None
            if held and not cfg.whole_store:
                self.log(
                    f"{self.store.path} has no answer to the first prompt: its {held:,} answers, to other prompts or settings, "
                    "do not count towards --n_tokens (--whole_store counts them)"
                )
                held = 0  # said once
            try:
                answer, self.fields, self.summary.top_logprobs = await client.probe(job.body, cfg.top_logprobs)
            except Dropped as error:
                problem = error
                continue
            job.body |= self.fields
            self._commit(job, answer)
            self._note(self._problem(job, answer))
            self.probed = self._key(job.body)
            if cfg.mode == "score" and self.table is not None and not text_of_answer(answer.body):
                await self._check_words(job, self.table.tokenizer)
            return answer
        raise UserError(f"the first calls to {client.settings.base_url} failed: {problem}")

    async def _check_words(self, job: Job, tokenizer: TokenizerLike) -> None:
        """Raise UserError where the teacher reads the ids that it is to score as another text.

        vLLM tells no text beside ids, and ids alone may be of any tokenizer: ask once more, for words, which is not stored.
        """
        plain = await self.client.ask({key: value for key, value in job.body.items() if not key.startswith("return_")})
        if plain.cost:
            self.store.lose(plain.cost)
        words = tokenizer.decode(i for i in job.body["prompt"] if i not in tokenizer.special_ids)
        told, sent = (LETTERS.sub("", text) for text in (scored_text(plain.body), words))
        if not told:
            self.log("the server tells no text: not checked that its tokenizer is that of --data")
        elif sent not in told:
            raise UserError(
                f"{self.client.settings.model} reads the ids of {self.cfg.data} as other text: pack it with the teacher's own "
                "--tokenizer"
            )

    def _key(self, body: dict[str, Any]) -> bytes:
        return request_key(self.client.settings.model, body, TEMPLATE)

    def _missing(self) -> Iterator[tuple[Job, dict[str, Any]]]:
        """The jobs that have no answer yet, until there are tokens enough; those that have one are counted."""
        if self.cfg.whole_store:
            self._count(self.store.totals().completion_tokens)
        for job in self.prompts:
            if self.summary.tokens >= self.cfg.n_tokens:
                return
            job.body |= self.fields
            key = self._key(job.body)
            tokens = self.store.tokens_of(key)
            if tokens is None:
                yield job, job.body
                continue
            if key == self.probed:
                self.summary.answers += 1
            else:
                self.summary.found += 1
            if not self.cfg.whole_store:
                self._count(tokens)

    def _count(self, tokens: int) -> None:
        tokens = max(1, tokens)  # so that a teacher of empty answers comes to an end
        self.summary.tokens += tokens
        self.bar.update(tokens)

    def _taught(self, answer: Answer) -> int:
        """Tokens that the teacher wrote, or scored."""
        return answer.prompt_tokens if self.cfg.mode == "score" else answer.completion_tokens

    async def _handle(self, job: Job, outcome: Answer | Dropped) -> None:
        """Commit an answer, then count it."""
        summary = self.summary
        if isinstance(outcome, Dropped):
            summary.dropped[outcome.reason] += 1
        else:
            # no task, which a second Ctrl-C would cancel: the answer is paid for
            await asyncio.shield(asyncio.get_running_loop().run_in_executor(self.disk, self._commit, job, outcome))
            summary.answers += 1
            self._count(self._taught(outcome))
            self._note(await asyncio.to_thread(self._problem, job, outcome))
        self.bar.set_postfix_str(
            f"{summary.answers + summary.found} answers, {self.client.dollars}, {self.client.errors.total()} retries, "
            f"{summary.dropped.total()} dropped, {summary.misaligned.total()} of no use",
            refresh=False,
        )
        useless = Counter(reason for reason in self.recent if reason is not None)
        if summary.aligned and useless.total() >= MOSTLY:
            raise Stopped(
                f"{useless.total()} of the last {len(self.recent)} answers cannot be used ({useless.most_common(1)[0][0]}); "
                "tools/verify_api.py shows more, and the same command goes on"
            )
        if not summary.aligned and summary.misaligned.total() >= ALL_MISALIGNED:
            reason, _ = summary.misaligned.most_common(1)[0]
            if reason == NO_TEXT:
                raise Stopped(f"none of {ALL_MISALIGNED} answers can be used: {NO_TEXT}; {IF_NO_TEXT}")
            raise Stopped(
                f"none of {ALL_MISALIGNED} answers aligns with the tokenizer ({reason}): give "
                "--tokenizer of this teacher, or --top_logprobs 0 for its text alone; tools/verify_api.py shows more"
            )

    def _note(self, misaligned: str | None) -> None:
        """Count what `_problem` found."""
        self.recent.append(misaligned)
        if misaligned is None:
            self.summary.aligned += 1
        else:
            self.summary.misaligned[misaligned] += 1

    def _commit(self, job: Job, answer: Answer) -> None:
        """Put the answer on the disk."""
        self.store.put(
            job.body,
            answer.raw,
            model=self.client.settings.model,
            template=TEMPLATE,
            prompt_ids=job.prompt_ids,
            prompt_tokens=answer.prompt_tokens,
            completion_tokens=self._taught(answer),
            cost=answer.cost,
        )

    def _problem(self, job: Job, answer: Answer) -> str | None:
        """Why an answer cannot be used; None: it can, or there is no tokenizer to tell."""
        if self.cfg.mode != "score" and not text_of_answer(answer.body):
            return NO_TEXT
        if self.table is not None:
            try:
                text_alone = not self.cfg.top_logprobs
                record = parse_answer(job.body, answer.body, self.table, prompt_ids=job.prompt_ids, text_alone=text_alone)
                if self.cfg.mode == "score" and not record.has_logprobs:
                    return "no logprobs"
            except Misaligned as error:
                return str(error)
        return None

    def _estimate(self, first: Answer | None) -> None:
        """Say what --n_tokens takes: about, by the first answer; without one at least, as if answers were of full length.

        Prompts are taken to be as long as the first.
        """
        cfg, client = self.cfg, self.client
        taught = cfg.max_new_tokens if first is None else max(1, self._taught(first))
        calls, written = -(-cfg.n_tokens // taught), cfg.n_tokens
        prompts = calls * (request_tokens(next(iter(self.prompts)).body)[0] if first is None else first.prompt_tokens)
        if cfg.mode == "score":
            prompts, written = written, 0
        dollars = client.model.cost(prompts, written)
        minutes = max(calls / client.gate.rpm, (prompts + written) / client.gate.tpm)
        if first is not None:
            minutes = max(minutes, calls * first.seconds / client.concurrency / 60)
        self.log(
            f"estimate for {cfg.n_tokens:,} tokens in all (what {self.store.path} holds of them is not subtracted), "
            + ("by the first answer: about " if first else "before an answer shows their length: at least ")
            + f"{calls:,} calls, {prompts:,} prompt tokens, {'no price listed' if dollars is None else f'${dollars:.2f}'}, "
            + (f"{minutes:.0f} minutes" if minutes else "time unknown before the first call (no --rpm or --tpm)")
            + (f"; at most ${cfg.budget_usd:g} in all" if cfg.budget_usd is not None else "; no --budget_usd, so no limit")
        )


async def _harvest(harvest: Harvest) -> None:
    """Run it; the first Ctrl-C, SIGTERM or SIGHUP lets what is in flight (and paid for) come in, the second one gives that up.

    What is given up is part of the store's cost even so: the task is cancelled, the process is not ended.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    interrupted = Interrupted("interrupted; the same command goes on")
    assert task is not None
    signals = [signal.SIGINT, signal.SIGTERM] if threading.current_thread() is threading.main_thread() else []
    if signals and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # the terminal is gone; nohup ignores it
        signals.append(signal.SIGHUP)

    def finish() -> None:
        for number in signals:
            loop.add_signal_handler(number, task.cancel)
        harvest.client.stop(interrupted)
        harvest.log("finishing the requests that are in flight; once more to drop them")

    for number in signals:
        loop.add_signal_handler(number, finish)
    try:
        async with harvest.client:
            await harvest.run()
    except asyncio.CancelledError:
        raise interrupted from None
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


def harvest(
    cfg: HarvestConfig,
    settings: Settings | None = None,
    patience: Patience | None = None,
    log: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
    store: Store | None = None,
) -> Summary:
    """Harvest as `cfg` says and print a summary. Raises UserError where it ends early, with all answers so far committed.

    `store`: one that the caller opened, in `with store.harvesting()`; None: opened and locked here.
    """
    settings = settings or Settings.load(cfg.base_url, cfg.model, cfg.allow_http)
    tokenizer = load_tokenizer(cfg)
    client = TeacherClient(
        settings,
        concurrency=cfg.concurrency,
        rpm=cfg.rpm,
        tpm=cfg.tpm,
        budget_usd=cfg.budget_usd,
        allow_other_model=cfg.allow_other_model,
        patience=patience or Patience(timeout_s=cfg.timeout_s),
    )
    prompts = Prompts(cfg, settings, tokenizer)
    cfg = replace(cfg, n_tokens=prompts.shard.share(cfg.n_tokens))
    if client.concurrency < cfg.concurrency:
        log(f"at most {client.concurrency} requests at once: more could fail together, and Venice then blocks the key")
    with ExitStack() as held:
        if store is None:
            store = held.enter_context(Store(store_path(cfg, settings)))
            if not cfg.dry_run:
                held.enter_context(store.harvesting())
        work = Harvest(cfg, client, store, prompts, log)
        thresholds = gc.get_threshold()
        gc.set_threshold(50_000)  # an answer is twenty objects a token and no cycles; looking often takes half the time
        try:
            asyncio.run(_harvest(work))
        finally:
            work.disk.shutdown()
            gc.set_threshold(*thresholds)
            work.summary.spent = client.dollars
            if not cfg.dry_run:
                for line in work.summary.lines():
                    log(line)
    return work.summary


def store_path(cfg: HarvestConfig, settings: Settings) -> Path:
    """--store, or the teacher's own file."""
    return Path(cfg.store or f"data/teacher/{re.sub(r'[^A-Za-z0-9._-]+', '-', settings.model)}.sqlite")


def load_tokenizer(cfg: HarvestConfig) -> TokenizerLike | None:
    """The tokenizer given, else that of --data; None where there is neither."""
    if cfg.tokenizer is None and cfg.data is None:
        return None
    from ae.tokenizer_adapter import TokenizerAdapter

    if cfg.tokenizer is not None:
        return TokenizerAdapter.load(cfg.tokenizer)
    from ae.chunks import PackedData  # lazy: it takes torch seconds to import

    return TokenizerAdapter.load(PackedData(Path(str(cfg.data)) / "train").tokenizer)


def main() -> None:
    try:
        harvest(parse_config(HarvestConfig, __doc__))
    except Interrupted:
        raise KeyboardInterrupt from None


if __name__ == "__main__":
    run_cli(main)
