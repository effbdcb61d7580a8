"""report.html and card.md of a run folder: self-contained, no network, no script."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from slimcli.artifacts import atomic
from slimcli.artifacts.event_lines import large
from slimcli.report.content import Content, facts, read_content
from slimcli.report.curves import macs_curve, training_curve

ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")


def write_report(folder: Path) -> Path:
    """Write ``report.html`` and ``card.md`` from the files of a run, and return the first path.

    Raises:
        RunError: The run has no readable summary, or the disk is full.
    """
    content = read_content(folder)
    path = folder / "report.html"
    atomic.write_text(path, rendered(content, "report.html.j2"))
    atomic.write_text(folder / "card.md", rendered(content, "card.md.j2"))
    return path


def rendered(content: Content, template: str) -> str:
    """A template filled; everything that comes from the user is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    is_html = template.endswith(".html.j2")
    environment = Environment(
        loader=PackageLoader("slimcli.report", "."),
        autoescape=is_html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["md"] = markdown_text
    environment.filters["bytes"] = lambda size: large(size, "B")
    paper = ARXIV.search(content.paper)
    return environment.get_template(template).render(
        run=content,
        found=content.summary,
        facts=facts(content),
        paper_link=f"https://arxiv.org/abs/{paper[1]}" if paper else "",
        layers=_layers(content),
        # Drawn by matplotlib, which escapes the names in it.
        curves=[Markup(each) for each in _curves(content) if each] if is_html else [],
    )


def markdown_text(value: Any) -> str:
    r"""Text that can't become markup, or another cell of a table.

    >>> markdown_text("a|b <i> `x`\n# y")
    'a\\|b &lt;i> \\`x\\` # y'
    """
    text = re.sub(r"([\\`*_\[\]|])", r"\\\1", " ".join(str(value).split()))
    return text.replace("<", "&lt;")


def _curves(content: Content) -> list[str]:
    return [training_curve(content), macs_curve(content)]


def _layers(content: Content) -> list[dict[str, Any]]:
    """The layers with the lengths of their two bars, in percent of the widest."""
    layers = content.summary["layers"]
    widest = max((each["channels_before"] for each in layers), default=1)
    rows = []
    for each in layers:
        before = each["channels_before"]
        after = each["channels_after"] if each["channels_after"] is not None else before
        bars = {"before": 100 * before / widest, "after": 100 * after / widest}
        rows.append({**each, "channels_after": after, "bars": bars})
    return rows
