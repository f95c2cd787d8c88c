"""<output>.report.html: what a job did and how fast, as one page that needs nothing but itself.

Numbers are those of the summary (`summary.py`) and of the trace (`trace.py`), the plots inline SVG.
"""

import logging
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from lepton_jax.html.page import render
from lepton_jax.html.svg_plots import Series, scatter
from lepton_jax.jobs.files.places import JobError, reason, write_small
from lepton_jax.jobs.summary import optimizer_lines, pool_lines, roofline_text
from lepton_jax.jobs.trace import Trace, scalars

log = logging.getLogger(__name__)

_PERCENTILES = (0.5, 0.9, 0.95, 0.99, 1.0)
_PAGE = """<h1>{{ s.output }}</h1>
<table>{% for name, value in facts %}<tr><td>{{ name }}</td><td>{{ value }}</td></tr>
{% endfor %}</table>
{% if replicas %}<h2>Replicas</h2>
<table>{% for name, value in replicas %}<tr><td>{{ name }}</td><td>{{ value }}</td></tr>
{% endfor %}</table>{% endif %}
<h2>Throughput</h2>
{{ plots.rates }}
{{ plots.rows }}
<h2>Latency</h2>
<p>From a row's hand-over to the engine, where it may queue, to its answer.</p>
<table><tr><th>share of rows</th><th>seconds, at most</th></tr>
{% for share, seconds in latencies %}<tr><td>{{ "{:.0%}".format(share) }}</td>
<td>{{ "-" if seconds is none else "{:.3g}".format(seconds) }}</td></tr>{% endfor %}</table>
<h2>Slowest rows</h2>
<table><tr><th>id</th><th>seconds</th><th>prompt tokens</th><th>generated tokens</th></tr>
{% for seconds, id, prompt, new in slowest %}<tr><td>{{ id }}</td>
<td>{{ "{:.3g}".format(seconds) }}</td><td>{{ prompt }}</td><td>{{ new }}</td></tr>
{% endfor %}</table>
<h2>Lengths</h2>
{{ plots.lengths }}
<h2>Padding waste</h2>
{{ plots.padding }}
<h2>Roofline</h2>
<p>{{ roofline }}</p>
{% if errors %}<h2>Errors</h2>
<table>{% for kind, count in errors.items() %}<tr><td>{{ kind }}</td><td>{{ count }}</td></tr>
{% endfor %}</table>{% endif %}
"""


def report_page(summary: Mapping[str, Any], trace: Trace) -> str:
    """The page of a finished job, of its summary (`summary.summarize`) and its trace."""
    names = (
        "rows errors resumed_rows cut_answers prompt_tokens generated_tokens seconds "
        "first_token_seconds programs late_compiles compile_seconds prefix_hit_tokens preemptions "
        "peak_memory_bytes device"
    ).split()
    return render(
        _PAGE,
        title=str(summary["output"]),
        s=summary,
        facts=[
            *((name.replace("_", " "), _fact(summary[name])) for name in names),
            *optimizer_lines(summary["optimizer"]),
        ],
        replicas=pool_lines(summary["pool"]),
        latencies=[(share, trace.latency(share)) for share in _PERCENTILES],
        slowest=trace.slowest,
        errors=summary["error_types"],
        roofline=roofline_text(summary["roofline"], summary["device"]),
        plots={name: Markup(svg) for name, svg in _plots(trace).items()},
    )


def write_report(page: str, path: str) -> None:
    """Where it can't be written a warning says so: the job is done."""
    try:
        write_small(path, page.encode())
    except (OSError, JobError) as error:
        log.warning("%s can't be written: %s; the output is complete", path, reason(error))


def _fact(value: Any) -> str:
    return f"{value:,}" if isinstance(value, (int, float)) else str(value)


def _plots(trace: Trace) -> dict[str, str]:
    stretches = [(s.begin + s.seconds / 2, scalars(s)) for s in trace.stretches]

    def over_time(title: str, unit: str, **names: str) -> str:
        curves = [
            Series(shown, [(at, values[name]) for at, values in stretches], line=True)
            for name, shown in names.items()
        ]
        return scatter(curves, title=title, x="seconds", y=unit, from_zero=True)

    lengths = {"prompts": trace.prompt_lengths, "answers": trace.output_lengths}
    counted = [Series(name, sorted(c.items()), line=True) for name, c in lengths.items()]
    return {
        "rates": over_time(
            "Tokens over time",
            "tokens/s",
            prompt_tokens_per_second="prompts",
            generated_tokens_per_second="generated",
        ),
        "rows": over_time("Rows over time", "rows/s", rows_per_second="answered"),
        "padding": over_time("Idle places among the computed", "share", padding_waste="padding"),
        "lengths": scatter(
            counted, title="Rows by length", x="tokens, at most", y="rows", from_zero=True
        ),
    }
