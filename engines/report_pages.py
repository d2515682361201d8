"""A report's pages: templates filled in with what `engines.report` chose.

Everything in a results file is untrusted text: HTML is escaped by jinja2, Markdown by `engines.markdown`, and the data
embedded for download cannot end its script element.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from engines.charts import SERIES_COLORS, STRIP_COLORS, bar_layout
from engines.intervals import LEAST_ROUNDS, RESAMPLES
from engines.markdown import Verbatim, code_block, finalized
from engines.results import LEAST_STEPS
from engines.structure_strip import Strip, roles_of
from engines.throughput import DASHES, curves_in_words

TEMPLATES = Path(__file__).parent / "templates"
SHOWN_COMMANDS = 6  # and links to files, before the rest is folded away


def html_page(context: dict[str, Any], strips: Sequence[tuple[str, Strip]], contents: Mapping[str, bytes]) -> bytes:
    """Render the page, with everything in it that it shows or offers for download.

    Args:
        strips: (name, drawing) of the structures.
        contents: name -> the bytes of each results file, JSON.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (TEMPLATES / "report.js").read_text()
    style = environment.get_template("report.css.j2").render(series=SERIES_COLORS, strip=STRIP_COLORS)
    page = environment.get_template("report.html.j2").render(
        **context,
        style=Markup(style),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        drawings=[bar_layout(chart, context["charted"]) for chart in context["charts"]],
        strips=strips,
        roles=roles_of([strip for _, strip in strips]),
        csv_json=_json_in_html(json.dumps(context["csv"], ensure_ascii=False).encode()),
        sections=_sections(context),
        shown_commands=SHOWN_COMMANDS,
        dashes=DASHES,
        in_words=curves_in_words,
        resamples=RESAMPLES,
        least_rounds=LEAST_ROUNDS,
        least_steps=LEAST_STEPS,
        embedded=[(picture.title, _address(light), _address(dark)) for picture, light, dark in context["pictures"]],
        series_count=len(SERIES_COLORS["light"]),
        downloads=[(name, _json_in_html(content)) for name, content in contents.items()],
    )
    return page.encode()


def _sections(context: dict[str, Any]) -> list[tuple[str, str]]:
    """The (id, name) of the page's sections, in their order."""
    sections = (
        (True, "comparison", "Comparison"),
        (context["accuracy"], "accuracy", "Accuracy"),
        (context["rounding"], "quantization", "Quantization error"),
        (context["charts"] or context["throughput"], "batch", "Over batch and length"),
        (context["times"], "time", "Where did the time go"),
        (context["predictions"] or context["calibration"], "predicted", "Predicted"),
        (True, "structure", "Structure"),
        (context["study"], "dependency", "Dependency"),
        (True, "measurements", "All measurements"),
        (True, "how", "How it was measured"),
        (True, "environment", "Environment"),
        (True, "engines", "Engines"),
        (True, "data", "Command and data"),
    )
    return [(name, text) for holds, name, text in sections if holds]


def _address(png: bytes) -> str:
    """The address that holds a picture itself."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _json_in_html(content: bytes) -> Markup:
    """Make JSON safe inside a script element: `<`, `>` and `&` occur only in its strings, where they may be escaped."""
    text = content.decode()
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def markdown_page(context: dict[str, Any]) -> bytes:
    """Render the same for a pull request; pictures are files beside it."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=False,
        finalize=finalized,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["code_block"] = code_block
    environment.filters["verbatim"] = Verbatim
    return environment.get_template("report.md.j2").render(**context).encode()
