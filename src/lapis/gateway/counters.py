"""What this process has done since it started, as Prometheus reads it. What is billed is the ledger's."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

from lapis.tenants.usage import Usage


class Counters:
    """Counters of one process. Written from the event loop only."""

    def __init__(self) -> None:
        self.active = 0
        self.requests: dict[tuple[str, int], int] = defaultdict(int)
        self.seconds: dict[str, float] = defaultdict(float)
        self.prompt_tokens: dict[str, int] = defaultdict(int)
        self.cached_tokens: dict[str, int] = defaultdict(int)
        self.completion_tokens: dict[str, int] = defaultdict(int)
        self.cancelled: dict[str, int] = defaultdict(int)

    def request(self, route: str, status: int, seconds: float) -> None:
        """Count one HTTP request; status 0 is a client that hung up before an answer."""
        self.requests[route, status] += 1
        self.seconds[route] += seconds

    def generation(self, model: str, usage: Usage, *, finished: bool) -> None:
        """Count the tokens of one request to a model."""
        self.prompt_tokens[model] += usage.prompt_tokens
        self.cached_tokens[model] += usage.cached_tokens
        self.completion_tokens[model] += usage.completion_tokens
        self.cancelled[model] += not finished

    def prometheus(self, engines: Mapping[str, Mapping[str, object]]) -> str:
        """Everything in Prometheus' text format, the numbers of each loaded engine's `stats()` as gauges."""
        return "\n".join(self._lines(engines)) + "\n"

    def _lines(self, engines: Mapping[str, Mapping[str, object]]) -> Iterator[str]:
        yield from _head("lapis_http_requests_active", "gauge", "HTTP requests being answered.")
        yield f"lapis_http_requests_active {self.active}"
        yield from _head("lapis_http_requests_total", "counter", "Requests by route and status; 0 = hung up.")
        for (route, status), count in sorted(self.requests.items()):
            yield f'lapis_http_requests_total{{route="{_label(route)}",status="{status}"}} {count}'
        yield from _head("lapis_http_request_seconds_total", "counter", "Seconds spent by route.")
        for route, seconds in sorted(self.seconds.items()):
            yield f'lapis_http_request_seconds_total{{route="{_label(route)}"}} {seconds:.6f}'
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
        yield from _engine_lines(engines)


def _engine_lines(engines: Mapping[str, Mapping[str, object]]) -> Iterator[str]:
    names = sorted({name for stats in engines.values() for name, value in stats.items() if _is_number(value)})
    for name in names:
        yield from _head(f"lapis_engine_{name}", "gauge", f"The engine's own {name.replace('_', ' ')}.")
        for model, stats in sorted(engines.items()):
            if _is_number(stats.get(name)):
                yield f'lapis_engine_{name}{{model="{_label(model)}"}} {stats[name]}'


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _head(name: str, kind: str, text: str) -> Iterator[str]:
    yield f"# HELP {name} {text}"
    yield f"# TYPE {name} {kind}"


def _label(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
