"""A process that renders chat templates and can do nothing else: run by `hexswarm.templates`.

A template is a stranger's program. Jinja's sandbox keeps it away from Python's internals, but not
from memory and time: three nested loops over `range(99999)` never end, and thirty doublings of a
text fill the machine. Only a process can be held to limits on both: templates are rendered here,
with `MEMORY` bytes of address space, no files to write, and a parent that kills what takes long.

The environment is that of transformers (`utils/chat_template_utils.py`), rebuilt, because importing
transformers takes seconds: trimmed blocks, loop controls, `{% generation %}`, `raise_exception`,
`strftime_now`, `tojson` without HTML escapes. Run by its path, with the standard library and Jinja.

One request a line, `{"template": ..., "variables": ...}`; one answer a line, `{"text": ...}` or
`{"error": ...}`. The first line says that it is ready.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import resource
import sys
from typing import Any

MEMORY = 512 << 20
MAX_TEXT = 1 << 20
"""Characters of a rendered chat."""


def limit_resources() -> None:
    """Hold this process to its memory and keep it from writing files."""
    for kind, limit in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_FSIZE, 0)):
        with contextlib.suppress(ValueError, OSError):  # macOS has no limit on address space
            resource.setrlimit(kind, (limit, limit))


@functools.cache
def environment() -> Any:
    """Jinja's immutable sandbox with what transformers adds to it."""
    import jinja2
    from jinja2 import ext, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(ext.Extension):  # type: ignore[misc]  # jinja2 is not followed
        """`{% generation %}` marks the assistant's words for training; here it changes nothing."""

        tags = {"generation"}  # noqa: RUF012  # Jinja's interface

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(str(message))

    def to_json(value: Any, ensure_ascii: bool = False, **how: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **how)

    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    made.filters["tojson"] = to_json
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return made


@functools.lru_cache(maxsize=4)
def compiled(template: str) -> Any:
    return environment().from_string(template)


def render(template: str, variables: dict[str, Any]) -> dict[str, str]:
    """The answer to one request."""
    parts, size = [], 0
    try:
        for part in compiled(template).generate(**variables):
            size += len(part)
            if size > MAX_TEXT:
                return {"error": f"it renders more than {MAX_TEXT} characters"}
            parts.append(part)
    except MemoryError:
        return {"error": f"it needs more than {MEMORY >> 20} MiB"}
    except Exception as error:  # a stranger's program may raise anything
        return {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    return {"text": "".join(parts)}


def main() -> None:
    environment()
    limit_resources()
    answers = sys.stdout
    answers.write("ready\n")
    answers.flush()
    for line in sys.stdin:
        request = json.loads(line)
        answer = render(request["template"], request["variables"])
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
