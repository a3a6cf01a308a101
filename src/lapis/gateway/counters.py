"""What this process has done since it started, as Prometheus reads it. What is billed is the ledger's."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

from lapis.gateway.histogram import Histogram
from lapis.tenants.usage import Usage

# What an engine has now. Everything else in its `stats()` only grows.
GAUGES = frozenset(
    {
        "running",
        "waiting",
        "queued_tokens",
        "max_queued_tokens",
        "pages",
        "pages_used",
        "pages_cached",
        "tokens_per_second",
        "uptime_seconds",
    }
)
# What an engine is, 1 or 0: slower or less exact than it could be where it is 0.
FACTS = {
    "bit_exact": "Whether answers are those of the trained model, bit for bit.",
    "replay": "Whether small steps are replayed by one call.",
}


class Counters:
    """Counters of one process. Written from the event loop only."""

    def __init__(self) -> None:
        self.active = 0
        self.requests: dict[tuple[str, int], Histogram] = defaultdict(Histogram)
        self.prompt_tokens: dict[str, int] = defaultdict(int)
        self.cached_tokens: dict[str, int] = defaultdict(int)
        self.completion_tokens: dict[str, int] = defaultdict(int)
        self.cancelled: dict[str, int] = defaultdict(int)
        self.first_token: dict[str, Histogram] = defaultdict(Histogram)
        self.next_token: dict[str, Histogram] = defaultdict(Histogram)

    def request(self, route: str, status: int, seconds: float) -> None:
        """Count one HTTP request; status 0 is a client that hung up before an answer."""
        self.requests[route, status].observe(seconds)

    def generation(self, model: str, usage: Usage, *, finished: bool) -> None:
        """Count the tokens of one request to a model."""
        self.prompt_tokens[model] += usage.prompt_tokens
        self.cached_tokens[model] += usage.cached_tokens
        self.completion_tokens[model] += usage.completion_tokens
        self.cancelled[model] += not finished

    def prometheus(self, engines: Mapping[str, Mapping[str, object]]) -> str:
        """Everything in Prometheus' text format, with the numbers of each loaded engine's `stats()`."""
        return "\n".join(self._lines(engines)) + "\n"

    def _lines(self, engines: Mapping[str, Mapping[str, object]]) -> Iterator[str]:
        yield from _head("lapis_http_requests_active", "gauge", "HTTP requests being answered.")
        yield f"lapis_http_requests_active {self.active}"
        yield from self._request_lines()
        by_model = {
            "prompt_tokens": (self.prompt_tokens, "Prompt tokens by model."),
            "cached_tokens": (self.cached_tokens, "Prompt tokens found in the prefix cache, by model."),
            "completion_tokens": (self.completion_tokens, "Generated tokens by model."),
            "cancelled": (self.cancelled, "Generations that ended before their end, by model."),
        }
        for name, (counts, text) in by_model.items():
            yield from _head(f"lapis_{name}_total", "counter", text)
            for model, value in sorted(counts.items()):
                yield f'lapis_{name}_total{{model="{_label(model)}"}} {value}'
        waits = {
            "lapis_time_to_first_token_seconds": (self.first_token, "From a request to its first token."),
            "lapis_inter_token_seconds": (self.next_token, "Between the tokens of an answer."),
        }
        for name, (histograms, text) in waits.items():
            yield from _head(name, "histogram", text)
            for model, histogram in sorted(histograms.items()):
                yield from histogram.lines(name, f'model="{_label(model)}"')
        yield from _engine_lines(engines)
        yield from _fact_lines(engines)

    def _request_lines(self) -> Iterator[str]:
        requests = sorted(self.requests.items())
        yield from _head("lapis_http_requests_total", "counter", "Requests by route and status; 0 = hung up.")
        for (route, status), histogram in requests:
            yield f'lapis_http_requests_total{{route="{_label(route)}",status="{status}"}} {histogram.count}'
        name = "lapis_http_request_seconds"
        yield from _head(name, "histogram", "Seconds from a request to the end of its answer.")
        for (route, status), histogram in requests:
            yield from histogram.lines(name, f'route="{_label(route)}",status="{status}"')


def _engine_lines(engines: Mapping[str, Mapping[str, object]]) -> Iterator[str]:
    names = sorted({name for stats in engines.values() for name, value in stats.items() if _is_number(value)})
    for name in names:
        kind, ending = ("gauge", "") if name in GAUGES else ("counter", "_total")
        shown = f"lapis_engine_{name}{ending}"
        yield from _head(shown, kind, f"The engine's own {name.replace('_', ' ')}.")
        for model, stats in sorted(engines.items()):
            if _is_number(stats.get(name)):
                yield f'{shown}{{model="{_label(model)}"}} {stats[name]}'


def _fact_lines(engines: Mapping[str, Mapping[str, object]]) -> Iterator[str]:
    for name, text in FACTS.items():
        told = {model: stats[name] for model, stats in sorted(engines.items()) if name in stats}
        if told:
            yield from _head(f"lapis_engine_{name}", "gauge", text)
        for model, value in told.items():
            yield f'lapis_engine_{name}{{model="{_label(model)}"}} {int(bool(value))}'


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _head(name: str, kind: str, text: str) -> Iterator[str]:
    yield f"# HELP {name} {text}"
    yield f"# TYPE {name} {kind}"


def _label(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
