"""What /metrics tells, in Prometheus' text format. No label holds anything that a client wrote."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from student.batching import Batcher, Job, Observer

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics(Observer):
    """One server's figures, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        for_all: dict[str, Any] = {"namespace": "latentforge", "registry": self.registry}
        self.requests = Counter("requests", "HTTP requests", ["path", "status"], **for_all)
        self.rows = Counter("rows", "completions by how they ended", ["outcome"], **for_all)
        self.tokens = Counter("tokens", "tokens read and written", ["kind"], **for_all)
        self.steps = Counter("latent_steps", "latent steps of the whole batch", **for_all)
        self.step_seconds = Histogram("step_seconds", "time of a latent step", buckets=SECONDS, **for_all)
        self.batch = Histogram("batch_rows", "rows in a latent step", buckets=ROWS, **for_all)
        self.first = Histogram("first_chunk_seconds", "from request to first chunk", buckets=SECONDS, **for_all)
        self.interval = Histogram("chunk_interval_seconds", "between a row's chunks", buckets=SECONDS, **for_all)
        self.queued = Histogram("queue_seconds", "from request to the reading of its prompt", buckets=SECONDS, **for_all)
        self.waiting = Gauge("queue_rows", "rows that wait for a slot or to be scored", **for_all)
        self.running = Gauge("running_rows", "rows in slots", **for_all)

    def watch(self, batcher: Batcher) -> None:
        """Read the gauges from a batcher."""
        self.waiting.set_function(lambda: batcher.waiting)
        self.running.set_function(lambda: batcher.running)

    def taken(self, job: Job) -> None:
        self.queued.observe(job.taken - job.submitted)
        self.tokens.labels("prompt").inc(len(job.prompt))

    def stepped(self, rows: int, seconds: float) -> None:
        self.steps.inc()
        self.step_seconds.observe(seconds)
        self.batch.observe(rows)

    def wrote(self, job: Job, tokens: int, seconds: float) -> None:
        self.tokens.labels("generated").inc(tokens)
        (self.interval if job.first_chunk else self.first).observe(seconds)

    def ended(self, job: Job, outcome: str) -> None:
        self.rows.labels(outcome).inc()
