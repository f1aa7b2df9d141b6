"""What /metrics shows."""

from collections.abc import Callable

import prometheus_client as prom

from craton.serve.served import Served
from craton.serve.worker import Worker

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_ASKED: list[tuple[str, str, Callable[[Worker], float]]] = [
    ("running", "Answers in the making", lambda w: w.running),
    ("waiting", "Answers that wait for room", lambda w: w.waiting),
    ("cache_blocks", "Blocks of the cache", lambda w: w.engine.scheduler.pool.total),
    ("cache_blocks_free", "Blocks that can be allocated", lambda w: w.engine.scheduler.pool.free),
    ("prompt_tokens_total", "Prompt tokens", lambda w: w.engine.counters.prompt_tokens),
    (
        "cached_prompt_tokens_total",
        "Prompt tokens found in the cache",
        lambda w: w.engine.counters.cached_prompt_tokens,
    ),
    ("preemptions_total", "Answers set back because the cache was full", lambda w: w.engine.counters.preemptions),
    ("cancelled_total", "Answers that nobody waited for", lambda w: w.engine.counters.cancelled),
    ("expected_wait_seconds", "What a request that comes now would wait", lambda w: w.expected_wait(1)),
]


class Metrics:
    """Counted as it happens, or asked of the models when somebody looks."""

    def __init__(self, models: dict[str, Served]):
        self.registry = r = prom.CollectorRegistry()
        self.models = models
        self.requests = prom.Counter("craton_requests", "Requests by path and status", ["path", "status"], registry=r)
        self.refused = prom.Counter("craton_refused", "Requests answered with 429", registry=r)
        first, step = "From a request's arrival to its first token", "One forward pass: the time between two tokens"
        self.ttft = prom.Histogram("craton_time_to_first_token_seconds", first, buckets=_SECONDS, registry=r)
        self.step = prom.Histogram("craton_step_seconds", step, buckets=_SECONDS, registry=r)
        self.generated = prom.Counter("craton_generated_tokens", "Tokens generated", registry=r)
        self.gauges = [(prom.Gauge(f"craton_{n}", text, ["model"], registry=r), get) for n, text, get in _ASKED]

    def observe(self, name: str, value: float) -> None:
        """A worker's figure: 'time_to_first_token', 'step' or 'generated'."""
        if name == "time_to_first_token":
            self.ttft.observe(value)
        elif name == "step":
            self.step.observe(value)
        else:
            self.generated.inc(value)

    def text(self) -> bytes:
        """As Prometheus reads it."""
        for gauge, get in self.gauges:
            for name, served in self.models.items():
                gauge.labels(name).set(get(served.worker))
        return prom.generate_latest(self.registry)


class Counting:
    """ASGI: counts answers by path and status."""

    def __init__(self, app: Callable, metrics: Metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        async def watched(message: dict) -> None:
            if message["type"] == "http.response.start":
                path, status = getattr(scope.get("route"), "path", "other"), str(message["status"])
                self.metrics.requests.labels(path, status).inc()
            await send(message)

        await self.app(scope, receive, watched if scope["type"] == "http" else send)
