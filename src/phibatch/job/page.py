"""How a report looks: plots, and one HTML page that needs nothing from any network."""

import io
import json
from collections.abc import Callable
from functools import partial
from importlib.resources import files
from typing import Any

import jinja2
import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from phibatch.job.compare import Comparison
from phibatch.job.progress import describe_seconds
from phibatch.job.report import Distribution, Report

ACCENT = "#3987e5"
SECOND = "#d98d2b"
BAD = "#d9534f"
INK = "#1a1a19"
"""The colour of a plot's words and lines; in the page it is the page's own, light or dark."""

STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "phibatch",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}

MINUTES_FROM = 300
"""Of so many seconds on a plot counts minutes."""

LABELS = {
    "prompt_tokens": "tokens of the prompt",
    "completion_tokens": "tokens of the answer",
    "generation_seconds": "seconds a row, from its admission to its last token",
}


def draw_plots(report: Report) -> dict[str, Figure]:
    """The report's plots by name; those without anything to show are absent."""
    with mpl.rc_context(STYLE):
        plots = {"throughput": _draw(lambda axes: _draw_throughput(axes, report))} if report.throughput else {}
        for name, distribution in report.distributions.items():
            plots[name] = _draw(partial(_draw_distribution, shown=distribution, name=name))
        if report.rows:
            plots["outcomes"] = _draw(lambda axes: _draw_outcomes(axes, report))
        return plots


def as_png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, facecolor="white")
    return buffer.getvalue()


def render_report(report: Report, plots: dict[str, Figure], comparison: Comparison | None = None) -> str:
    """The report as one page: styles and plots are inside, and there are no scripts."""
    drawn = {name: _as_svg(figure) for name, figure in plots.items()}
    return _render("report.html.j2", report=report, plots=drawn, comparison=comparison)


def render_comparison(comparison: Comparison) -> str:
    """A comparison as one page."""
    return _render("comparison.html.j2", comparison=comparison)


def _render(template: str, **values: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: files(__package__).joinpath(name).read_text(encoding="utf-8")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = _number
    environment.filters["seconds"] = describe_seconds
    environment.filters["yaml"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.get_template(template).render(values)


def _draw(paint: Callable[[Axes], None]) -> Figure:
    figure = Figure(figsize=(6.4, 2.8), layout="constrained")
    axes = figure.add_subplot()
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _number(value)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _number(value)))
    paint(axes)
    return figure


def _draw_throughput(axes: Axes, report: Report) -> None:
    """Runs one after the other: the hours between two do not count."""
    at = 0.0
    longest = max(run.seconds[-1] for run in report.throughput)
    unit, word = (60, "minutes") if longest >= MINUTES_FROM else (1, "seconds")
    for place, run in enumerate(report.throughput):
        if place:
            axes.axvline(at / unit, color=INK, linestyle=":", linewidth=1)
        times = [(at + seconds) / unit for seconds in run.seconds]
        axes.plot(times, run.tokens_per_second, color=ACCENT, linewidth=1.8, marker="o" if len(times) == 1 else "")
        axes.fill_between(times, run.tokens_per_second, color=ACCENT, alpha=0.15)
        at += run.seconds[-1]
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.set_xlabel(f"{word} of work" + (", one run after the other" if len(report.throughput) > 1 else ""))
    axes.set_ylabel("tokens a second")


def _draw_distribution(axes: Axes, shown: Distribution, name: str) -> None:
    lows = [shown.low + place * shown.width for place in range(len(shown.counts))]
    axes.bar(lows, shown.counts, shown.width, align="edge", color=ACCENT)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    for value, word in ((shown.median, "median"), (shown.p95, "95 %")):
        axes.axvline(value, color=SECOND, linewidth=1.2)
        axes.annotate(word, (value, 1), xycoords=("data", "axes fraction"), xytext=(3, -10), textcoords="offset points")
    axes.set_xlabel(LABELS[name])
    axes.set_ylabel("rows")


def _draw_outcomes(axes: Axes, report: Report) -> None:
    outcomes = [(name, rows, ACCENT) for name, rows in report.finish_reasons.items()]
    outcomes += [(line.code, line.rows, BAD) for line in report.errors]
    names, rows, colours = zip(*reversed(outcomes), strict=True)
    bars = axes.barh(range(len(names)), rows, color=colours)
    axes.set_yticks(range(len(names)), names)
    axes.bar_label(bars, [f" {_number(each)}" for each in rows])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    # A few bars are no thicker than many.
    axes.set_ylim(len(names) - 0.5 - max(len(names), 4), len(names) - 0.5)
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.12)
    axes.set_xlabel("rows")


def _as_svg(figure: Figure) -> Any:
    buffer = io.StringIO()
    with mpl.rc_context(STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    drawn = buffer.getvalue()
    # Without the XML prologue, which HTML does not know; in the ink of the page.
    return Markup(drawn[drawn.index("<svg") :].replace(INK, "currentColor"))  # noqa: S704 - it is matplotlib's own


def _number(value: float | None, digits: int = 3) -> str:
    """A number for people: whole ones with separators, others with so many digits that count."""
    if value is None:
        return "-"
    if float(value).is_integer() or abs(value) >= 10**digits:
        return f"{value:,.0f}"
    return f"{value:,.{digits}g}"
