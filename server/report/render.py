"""From a template to a page that needs no network and runs no script: its content security policy refuses both."""

import base64
import hashlib
from typing import Any

from server.report import words
from server.report.style import STYLE

HEAD = """
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'sha256-{{ style_digest }}';
  base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<style>{{ style | safe }}</style>
""".strip()


def render(template: str, **values: Any) -> str:
    """Fill in a page whose head holds ``HEAD``.

    Args:
        template: Jinja; what it prints is escaped unless it says ``safe``.
        values: all that it names; one that is missing is an error.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "algorithm_words": words.algorithm_words,
        "code_words": words.code_words,
        "count": words.count_text,
        "epsilon": words.epsilon_text,
        "fact": words.fact_text,
        "fact_words": words.fact_words,
        "number": words.number,
        "probability": words.probability_text,
        "rounds": words.rounds_text,
        "seconds": words.seconds_text,
        "whole": words.whole_text,
    }
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    return environment.from_string(template.lstrip()).render(style=STYLE, style_digest=digest, **values)


def data_uri(png: bytes) -> str:
    """A picture inside the page."""
    return "data:image/png;base64," + base64.b64encode(png).decode()
