"""The thread that owns the model: rows join and leave between latent steps, texts are scored between them.

    batcher = Batcher(FastSampler(model, tokenizer, slots=32), model)
    batcher.submit([Job(prompt, params, emit)])       # emit(job, event) is called from the thread
    batcher.drain(grace=20); batcher.join()           # take no more, finish what is there

Nothing here knows who asks: a job's `emit` gets a Chunk for each latent step and, last, one Finished or one exception.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from student.fast import FastSampler
from student.sampler import Chunk, SamplingParams
from student.scoring import Scores, Text, joined, padded_length, score
from student.student_model import Student

log = logging.getLogger("latentforge.batching")
SCORE_TOKENS = 4096  # of one pass over texts to score, pads included: what a running row waits for at most, each step
PREFILL_TOKENS = 4096  # likewise, of prompts that join between two steps; one that is longer is read alone


class Busy(Exception):
    """More rows than may wait; `retry_after` is a guess of the seconds until there is room."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the queue is full; try again in {retry_after} s")
        self.retry_after = retry_after


class Closing(Exception):
    """The batcher takes no more rows, or has dropped this one to end."""


class Expired(Exception):
    """A row's deadline has passed."""


@dataclass
class Finished:
    """The last event of a row that went well."""

    scores: Scores | None


Event = Chunk | Finished | Exception


@dataclass(eq=False)
class Job:
    """A row on its way through the model. `params` None writes nothing; `top` not None asks for scores at the end."""

    prompt: list[int]
    params: SamplingParams | None
    emit: Callable[[Job, Event], None]
    top: int | None = None
    score_prompt: bool = False
    deadline: float = math.inf  # of time.monotonic
    index: int = 0  # the asker's own number

    token_ids: list[int] = field(default_factory=list)  # written so far
    ended: int | None = None  # the end-of-text token, where one ended the row (`Chunk.ended`)
    latent_steps: int = 0
    finish_reason: str = ""
    cut: bool = False  # a stop string ended its text (`Chunk.cut`)
    submitted: float = 0.0
    taken: float = 0.0  # when its prompt began to be read, or its text to be scored
    joined: float = 0.0  # when its prompt had been read
    first_chunk: float = 0.0
    last_chunk: float = 0.0
    cancelled: bool = False

    def cancel(self) -> None:
        """Give up: the slot is free before the next step. Nothing is emitted any more. From any thread."""
        self.cancelled = True

    @property
    def written(self) -> list[int]:
        """What was written; of a row that ended itself with its end-of-text token."""
        return self.token_ids if self.ended is None else [*self.token_ids, self.ended]

    @property
    def texts(self) -> list[Text]:
        """What is to be scored, one behind the other: the prompt, if asked for, from its first token on, so that a token's
        likelihood does not depend on how many follow it; then what was written, under the distribution that it was drawn from.
        """
        told = [Text((), self.prompt, 0, self.top or 0)] if self.score_prompt else []
        return [*told, *([Text(self.prompt, self.written, len(self.prompt), self.top or 0)] if self.written else [])]


class Observer:
    """Told what happens, in the batcher's thread; all of it does nothing here."""

    def taken(self, job: Job) -> None:
        """Its prompt has been read into a slot, or it is about to be scored."""

    def stepped(self, rows: int, seconds: float) -> None: ...

    def wrote(self, job: Job, tokens: int, seconds: float) -> None:
        """A chunk; `seconds` since the row's last one, or since it was submitted."""

    def ended(self, job: Job, outcome: str) -> None:
        """outcome: the finish reason, or cancelled, expired, dropped, failed."""


class Batcher:
    """See the module's docstring.

    max_queue: rows that may wait beyond those in slots. prefill_rows: prompts read in one pass; only at 1 is a row's text
    independent of its neighbours to the last bit, since sums in a batch of another shape round differently.
    """

    def __init__(
        self, sampler: FastSampler, model: Student, *, max_queue: int = 256, prefill_rows: int = 1,
        warm_up: bool = False, observer: Observer | None = None,
    ) -> None:  # fmt: skip
        self.sampler, self.model, self.observer = sampler, model.eval(), observer or Observer()
        self.max_queue, self.prefill_rows = max_queue, prefill_rows
        self.ready = threading.Event()
        self._changed = threading.Condition()  # guards the next four
        self._waiting: deque[Job] = deque()
        self._scoring: deque[Job] = deque()
        self._alive: set[Job] = set()
        self._close_at: float | None = None  # when what is left is dropped
        self._running: dict[int, Job] = {}  # by slot; the thread's own
        self._row_seconds = 1.0  # that a row keeps its slot: a running mean
        self.dropped, self.failed = 0, False
        self._thread = threading.Thread(target=self._work, args=(warm_up,), name="model", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------------------------------- from any thread
    @property
    def waiting(self) -> int:
        """Rows that do not run: without a slot, their prompt being read, or their text not scored yet."""
        return max(0, len(self._alive) - len(self._running))

    @property
    def running(self) -> int:
        """Rows in slots."""
        return len(self._running)

    @property
    def closing(self) -> bool:
        return self._close_at is not None

    def submit(self, jobs: Sequence[Job]) -> None:
        """Take all of the jobs or none: raises Busy or Closing. Prompts must fit (`sampler.check`)."""
        with self._changed:
            if self.closing or not self._thread.is_alive():
                raise Closing("the server is shutting down")
            if len(self._alive) + len(jobs) > self.sampler.slots + self.max_queue:
                per_slot = len(self._alive) / self.sampler.slots
                raise Busy(min(60, max(1, math.ceil(per_slot * self._row_seconds))))
            for job in jobs:
                job.submitted = time.monotonic()
                self._alive.add(job)
                (self._scoring if job.params is None else self._waiting).append(job)
            self._changed.notify()

    def drain(self, grace: float) -> None:
        """Take no more rows; those that are not finished in `grace` seconds are dropped, with Closing. Returns at once."""
        with self._changed:
            self._close_at = min(self._close_at or math.inf, time.monotonic() + grace)
            self._changed.notify()

    def join(self, timeout: float | None = None) -> int:
        """Wait for the end of a drain; returns how many rows were dropped."""
        self._thread.join(timeout)
        return self.dropped

    # ------------------------------------------------------------------------------------------- the thread
    def _work(self, warm_up: bool) -> None:
        try:
            if warm_up:
                self._warm_up()
        except Exception as error:
            log.critical("the step cannot be compiled: %s", error, exc_info=error)
            self.drain(0)
        else:
            self.ready.set()
        try:
            while self._wait():
                self._drop_ended()
                self._fill_slots()
                if self._running:
                    self._step()
                self._score()
        except Exception as error:  # none that a request could bring about is known
            self._give_up(error)
            self._wait()

    def _wait(self) -> bool:
        """Sleep while there is nothing to do; False once all is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._alive or self.closing)
            if self._close_at is None or (self._alive and time.monotonic() < self._close_at):
                return True
            left = list(self._alive)
        self.dropped += len(left)
        for job in left:
            self._end(job, Closing("the server shut down before this was finished"), "dropped")
        for slot in list(self._running):
            self._leave(slot)
        return False

    def _warm_up(self) -> None:
        """Compile the step for whatever can be asked for, so that no request waits for it."""
        start = time.monotonic()
        log.info("compiling the step of %d slots; minutes the first time on a machine ...", self.sampler.slots)
        self.sampler.warm_up()
        log.info("compiled in %.0f s", time.monotonic() - start)

    def _drop_ended(self) -> None:
        """Let go of what was cancelled or came to its deadline, wherever it is."""
        now = time.monotonic()
        with self._changed:
            gone = {job for job in self._alive if job.cancelled or now > job.deadline}
            if not gone:
                return
            self._waiting = deque(job for job in self._waiting if job not in gone)
            self._scoring = deque(job for job in self._scoring if job not in gone)
        for slot in [slot for slot, job in self._running.items() if job in gone]:
            self._leave(slot)
        for job in gone:
            late = f"not finished in time: given up after {now - job.submitted:.1f} s"
            self._end(job, None if job.cancelled else Expired(late), "cancelled" if job.cancelled else "expired")

    def _fill_slots(self) -> None:
        """Read the prompts of those that wait longest, as many as there are free slots and a pass should take."""
        k, tokens = self.sampler.cfg.k, 0
        while (free := self.sampler.free) and tokens < PREFILL_TOKENS:
            jobs: list[Job] = []
            longest = 0  # a pass pads its prompts to the longest
            with self._changed:
                while self._waiting and len(jobs) < min(free, self.prefill_rows):
                    longest = max(longest, -(-len(self._waiting[0].prompt) // k) * k)
                    if jobs and tokens + longest * (len(jobs) + 1) > PREFILL_TOKENS:
                        break
                    jobs.append(self._waiting.popleft())
            if not jobs:
                return
            tokens += max(-(-len(job.prompt) // k) * k for job in jobs) * len(jobs)
            start = time.monotonic()
            try:
                slots = self.sampler.add([job.prompt for job in jobs], [job.params for job in jobs if job.params])
            except Exception as error:
                self._fail(jobs, error)
                continue
            for slot, job in zip(slots, jobs, strict=True):
                job.taken, job.joined = start, time.monotonic()
                self._running[slot] = job
                self.observer.taken(job)

    def _step(self) -> None:
        """One latent step of every row."""
        start, rows = time.monotonic(), len(self._running)
        try:
            chunks = self.sampler.step()
        except Exception as error:  # out of memory, above all: these rows fail, the server goes on
            jobs = list(self._running.values())
            for slot in list(self._running):
                self._leave(slot)
            return self._fail(jobs, error)
        now = time.monotonic()
        self.observer.stepped(rows, now - start)
        for chunk in chunks:
            self._accept(self._running[chunk.row], chunk, now)

    def _accept(self, job: Job, chunk: Chunk, now: float) -> None:
        """Note a chunk and pass it on; a row's last one frees its slot."""
        self.observer.wrote(job, len(chunk.token_ids), now - (job.last_chunk or job.submitted))
        job.token_ids += chunk.token_ids
        job.latent_steps += 1
        job.first_chunk, job.last_chunk = job.first_chunk or now, now
        slot, chunk.row = chunk.row, job.index
        if chunk.finish_reason is None:
            return self._emit(job, chunk)
        job.finish_reason, job.ended, job.cut = chunk.finish_reason, chunk.ended, chunk.cut
        self._running.pop(slot)
        self._row_seconds += 0.1 * (now - job.joined - self._row_seconds)
        self._emit(job, chunk)
        if job.top is None:
            self._end(job, Finished(None), job.finish_reason)
        else:
            self._scoring.append(job)

    def _score(self) -> None:
        """One pass over texts that wait to be scored: as many as fit, at least one."""
        jobs: list[Job] = []
        longest = count = 0
        with self._changed:
            while self._scoring:
                lengths = [padded_length(text, self.model.cfg.k) for text in self._scoring[0].texts]
                longest, count = max(longest, *lengths, 0), count + len(lengths)
                if jobs and longest * count > SCORE_TOKENS:
                    break
                jobs.append(self._scoring.popleft())
        for job in jobs:
            if job.params is None:  # it never had a slot
                job.taken = time.monotonic()
                self.observer.taken(job)
        wanted = [job for job in jobs if job.top is not None]
        try:
            scores = self._scores_of(wanted)
        except Exception as error:
            return self._fail(jobs, error)
        for job in jobs:
            self._end(job, Finished(scores.get(job)), job.finish_reason or "length")

    def _scores_of(self, jobs: Sequence[Job]) -> dict[Job, Scores]:
        """From one pass over the texts of all."""
        texts = [job.texts for job in jobs]
        flat = [text for own in texts for text in own]
        found = iter(score(self.model, flat) if flat else ())
        return {job: joined([next(found) for _ in own]) for job, own in zip(jobs, texts, strict=True)}

    def _leave(self, slot: int) -> None:
        self.sampler.remove(slot)
        self._running.pop(slot, None)

    def _fail(self, jobs: Sequence[Job], error: Exception) -> None:
        log.error("%d rows failed: %s", len(jobs), error, exc_info=error)
        if isinstance(error, torch.AcceleratorError):  # a device assert, say: nothing will run on that device any more
            self._give_up(error)
        for job in jobs:
            self._end(job, error, "failed")

    def _give_up(self, error: Exception) -> None:
        """Take and write no more, and say so at /health."""
        log.critical("the server cannot go on: %s", error, exc_info=error)
        self.failed = True
        self.drain(0)

    def _end(self, job: Job, event: Event | None, outcome: str) -> None:
        with self._changed:
            self._alive.discard(job)
        self.observer.ended(job, outcome)
        if event is not None:
            self._emit(job, event)

    def _emit(self, job: Job, event: Event) -> None:
        if job.cancelled:
            return
        try:
            job.emit(job, event)
        except RuntimeError:  # the asker's event loop is gone
            job.cancel()
