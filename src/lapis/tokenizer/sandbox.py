"""The process in which chat templates run: `python -I -m lapis.tokenizer.sandbox`, one JSON request a line.

A template comes with a model, so it is a stranger's program. jinja2's sandbox keeps it away from Python's
objects; a memory limit, a CPU limit per request and a limit on the output keep it from eating the machine.
"""

from __future__ import annotations

import functools
import json
import resource
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

CPU_SECONDS = 1.0
OUTPUT_LIMIT = 16 << 20  # characters
MEMORY_LIMIT = 1 << 30  # bytes of address space


class Generation(Extension):
    """`{% generation %} … {% endgeneration %}`, some templates' mark of assistant text: the text stays."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The nodes between the two tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def environment() -> ImmutableSandboxedEnvironment:
    """The environment that Hugging Face chat templates expect, sandboxed."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    made.filters["tojson"] = _tojson
    made.globals["raise_exception"] = _raise
    made.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return made


def render(template: Template, variables: dict[str, Any]) -> str:
    """A template's text. Raises ValueError beyond the output limit, and whatever the template raises."""
    pieces: list[str] = []
    size = 0
    for piece in template.generate(variables):
        size += len(piece)
        if size > OUTPUT_LIMIT:
            raise ValueError(f"its output is longer than {OUTPUT_LIMIT:,} characters")
        pieces.append(piece)
    return "".join(pieces)


def main() -> None:
    """Answer requests from standard input until it closes."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    compiled = functools.lru_cache(maxsize=4)(environment().from_string)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # SIGPROF ends the process
        answer = _answer(compiled, line)
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(answer + "\n")
        sys.stdout.flush()


def _answer(compiled: Callable[[str], Template], line: str) -> str:
    try:
        request = json.loads(line)
        return json.dumps({"text": render(compiled(request["template"]), request["variables"])})
    except TemplateError as error:
        return json.dumps({"error": error.message or type(error).__name__})
    except MemoryError:
        return json.dumps({"error": f"it needs more than {MEMORY_LIMIT >> 20} MiB of memory"})
    except RecursionError:
        return json.dumps({"error": "it calls itself without end"})
    except Exception as error:  # noqa: BLE001 (a stranger's program; what it raised is reported)
        return json.dumps({"error": f"{type(error).__name__}: {error}"})


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


if __name__ == "__main__":
    main()
