"""receipt.html: a receipt as one page that needs nothing but itself, plots included.

`page` shows one receipt, `pareto_page` those of a sweep side by side: bytes against KL and speed
against KL. Numbers come from the receipts as they are; the plots are `lepton_jax/html`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from lepton_jax.html.page import render
from lepton_jax.html.svg_plots import Series, scatter

NAME = "receipt.html"
_PAGE = """<h1>Receipt: {{ r.recipe.title }} of {{ r.source.path }}</h1>
<p class="digest">{{ r.digest }}</p>
<h2>Quality</h2>
{% if r.quality %}
<table><tr><th>on {{ r.quality.places }} places of held-out text</th><th>dense</th>
<th>compressed</th><th>95 % interval</th></tr>
{% for name, dense, e, form in quality %}
<tr><td>{{ name }}</td><td>{{ dense }}</td><td>{{ form.format(e.value) }}</td>
<td>{{ form.format(e.low) }} to {{ form.format(e.high) }}</td></tr>{% endfor %}
</table>
{% else %}<p>Not measured: receipt.compare was false.</p>{% endif %}
{% if r.kv %}<p>With a key-value cache in {{ r.kv.dtype }}: perplexity
{{ "{:.5f}".format(r.kv.perplexity_ratio.value) }} of the dense model's, KL
{{ "{:.3g}".format(r.kv.kl.value) }} nats a token, same likeliest token
{{ "{:.4f}".format(r.kv.top1.value) }}.</p>{% endif %}
<h2>Size</h2>
<table>
<tr><td>dense, in device memory</td><td>{{ mib(r.size.dense_bytes) }}</td></tr>
<tr><td>compressed, in device memory</td><td>{{ mib(r.size.device_bytes) }}</td></tr>
{% if r.size.disk_bytes %}<tr><td>compressed, on disk</td>
<td>{{ mib(r.size.disk_bytes) }}</td></tr>{% endif %}
<tr><td>parameters kept, k of N</td><td>{{ "{:,} of {:,}".format(r.size.kept, r.size.parameters) }}
</td></tr>
<tr><td>ideal compute, k/N of what a token visits</td>
<td>{{ "{:.3f}".format(r.size.compute_fraction) }}</td></tr>
</table>
{% if r.speed %}<h2>Speed on {{ r.speed.device }}</h2>
<table><tr><th></th><th>dense, tokens/s</th><th>compressed, tokens/s</th><th>ratio</th>
<th>time, measured</th><th>time, ideal (k/N)</th></tr>
{% for name in ("decode", "prefill") %}{% set s = r.speed[name] %}
<tr><td>{{ name }}</td><td>{{ "{:.1f}".format(s.dense) }}</td>
<td>{{ "{:.1f}".format(s.compressed) }}</td><td>{{ "{:.2f}".format(s.ratio) }}</td>
<td>{{ "{:.3f}".format(s.measured_time_ratio) }}</td>
<td>{{ "{:.3f}".format(s.ideal_compute_ratio) }}</td></tr>{% endfor %}</table>
<p>The best of {{ r.speed.repeats }} run{{ "" if r.speed.repeats == 1 else "s" }} of each,
{{ "which took turns" if r.speed.turns else
"those of the dense model first: together they are too large for the memory" }}.
{% for name, saved in r.speed.saved.items() %}{{ "Memory" if name == "memory" else
"Time of " ~ name }}: {{ saved }}. {% endfor %}</p>{% endif %}
<h2>Error of each weight</h2>
{{ errors }}
{{ product_errors }}
{% if bytes_plot %}<h2>Size against KL</h2>
{{ bytes_plot }}{% endif %}
{% if r.recovery %}<h2>Recovery</h2>
<p>{{ recovery }}</p>
{{ recovery_plot }}{% endif %}
{% if r.sensitivity %}<h2>Sensitivity of each weight</h2>
<p>Predicted for the chosen schemes: KL {{ "{:.3g}".format(r.sensitivity.predicted_kl) }} nats a
token{% if r.quality %}, measured {{ "{:.3g}".format(r.quality.kl.value) }}{% endif %}.
{% if "rounding=gptq" in r.sensitivity.schemes|join(" ") %}
What GPTQ rounds was tried rounded to nearest.{% endif %}</p>
{{ sensitivity_plot }}{% endif %}
{% if r.structured %}<h2>Structure</h2>
<p>{{ structure }}; layers kept: {{ r.structured.layers|join(", ") }}</p>
{{ influence_plot }}{% endif %}
<h2>Recipe</h2>
<pre>{% for rule in r.recipe.rules %}{{ rule }}
{% endfor %}</pre>
<h2>Everything else</h2>
<pre>{{ rest }}</pre>
"""
_SWEEP = """<h1>{{ title }}</h1>
<table><tr>{% for name in columns %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
{{ bytes_plot }}
{{ speed_plot }}
<p>Vertical bars are 95 % intervals. The line joins the recipes that no other beats in both.</p>
"""


def page(receipt: Mapping[str, Any]) -> str:
    """The page of one receipt."""
    shown = ("source", "measure", "held_out", "calibration", "environment", "fingerprint")
    rest = {name: receipt[name] for name in (*shown, "weights_sha256")}
    rest["caches"] = receipt.get("caches")  # older receipts name none
    return render(
        _PAGE,
        title=f"Receipt: {receipt['recipe']['title']}",
        r=receipt,
        quality=_quality_rows(receipt),
        mib=lambda count: f"{count / 2**20:,.1f} MiB",
        errors=Markup(_error_plot(receipt, "error", "Relative error |W - W'| / |W|")),
        product_errors=Markup(_error_plot(receipt, "product_error", "The same of products W x")),
        bytes_plot=Markup(_size_plot(receipt)),
        recovery=_recovery_text(receipt),
        recovery_plot=Markup(_recovery_plot(receipt)),
        structure=_structure_text(receipt),
        influence_plot=Markup(_influence_plot(receipt)),
        sensitivity_plot=Markup(_sensitivity_plot(receipt)),
        rest=json.dumps(rest, indent=1),
    )


def pareto_page(
    receipts: Mapping[str, Mapping[str, Any]], *, title: str, columns: Sequence[str], rows: Sequence
) -> str:
    """The page of a sweep: its table, bytes against KL, speed against KL."""
    return render(
        _SWEEP,
        title=title,
        columns=columns,
        rows=rows,
        bytes_plot=Markup(_bytes_plot(receipts)),
        speed_plot=Markup(_speed_plot(receipts)),
    )


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other is as small as in both and smaller in one; by x."""
    order = sorted(range(len(points)), key=lambda i: points[i])
    front: list[int] = []
    for i in order:
        if not front or points[i][1] < points[front[-1]][1]:
            front.append(i)
    return front


def _error_plot(receipt: Mapping[str, Any], field: str, title: str) -> str:
    """Error by layer, a line for each kind of weight; weights of no layer at -1. Empty where none
    was measured.
    """
    kinds: dict[str, list] = {}
    for row in receipt["weights"]:
        kind, layer = _kind_and_layer(row["path"])
        if row[field] is not None:
            kinds.setdefault(kind, []).append((layer, row[field], row["path"]))
    series = [
        Series(
            kind,
            [(layer, error) for layer, error, _ in sorted(found)],
            labels=[path for _, _, path in sorted(found)],
            line=True,
        )
        for kind, found in kinds.items()
    ]
    return (
        scatter(series, title=title, x="layer (-1: embeddings and head)", y="error")
        if series
        else ""
    )


def _kind_and_layer(path: str) -> tuple[str, int]:
    found = re.fullmatch(r"layers\.(\d+)\.(.*)", path)
    return (found[2], int(found[1])) if found else (path, -1)


def _quality_rows(receipt: Mapping[str, Any]) -> list[tuple]:
    """(name, the dense model's, estimate, how to write it)."""
    quality, prefix = receipt["quality"], receipt["greedy_prefix"]
    if not quality:
        return []
    dense = f"{quality['dense_perplexity']['value']:.3f}"
    rows = [
        ("perplexity", dense, quality["perplexity"], "{:.3f}"),
        ("perplexity, compressed / dense", "1", quality["perplexity_ratio"], "{:.5f}"),
        ("KL(dense || compressed), nats a token", "0", quality["kl"], "{:.3g}"),
        ("same likeliest token", "1", quality["top1"], "{:.4f}"),
        ("of the five likeliest, in common", "1", quality["top5"], "{:.4f}"),
    ]
    if prefix:
        name = f"common tokens of {prefix['prompts']} greedy answers"
        rows.append((name, str(prefix["of"]), prefix, "{:.1f}"))
    return rows


def _recovery_text(receipt: Mapping[str, Any]) -> str:
    told = receipt["recovery"]
    if not told:
        return ""
    text = (
        f"{told['train']}: {told['steps_done']} steps over {told['tokens']:,} tokens in "
        f"{told['seconds'] / 60:.1f} minutes; the best was step {told['best_step']}. Before it: "
    )
    if not told["before"]:
        return text + "not measured."
    text += f"perplexity {told['before']['perplexity']['value']:.3f}, "
    text += f"KL {told['before']['kl']['value']:.3g}"
    closed = told["gap_closed"]
    return f"{text}; {closed:.0%} of the gap in perplexity closed." if closed else f"{text}."


def _recovery_plot(receipt: Mapping[str, Any]) -> str:
    if not receipt["recovery"]:
        return ""
    points = [(step, kl) for step, _, kl in receipt["recovery"]["evaluations"]]
    return scatter(
        [Series("held out", points, line=True)],
        title="KL on windows that were held out",
        x="step",
        y="KL, nats a token",
        from_zero=True,
    )


def _sensitivity_plot(receipt: Mapping[str, Any]) -> str:
    """Of each weight under each scheme; empty where it wasn't measured."""
    found = receipt["sensitivity"]
    if not found:
        return ""
    rows = found["weights"]
    series = [
        Series(
            scheme,
            [(_kind_and_layer(row["path"])[1], row["kl"][index]) for row in rows],
            labels=[row["path"] for row in rows],
        )
        for index, scheme in enumerate(found["schemes"])
    ]
    return scatter(
        series,
        title="KL when one weight alone is compressed, predicted",
        x="layer (-1: embeddings and head)",
        y="KL, nats a token",
        log_y=True,
    )


def _structure_text(receipt: Mapping[str, Any]) -> str:
    structure = receipt["recipe"].get("structure") or {}
    return ", ".join(f"{name} {value}" for name, value in structure.items() if value)


def _influence_plot(receipt: Mapping[str, Any]) -> str:
    """Of the dense model's layers; empty where none were dropped."""
    influence = (receipt["structured"] or {}).get("influence")
    if not influence:
        return ""
    kept = set(receipt["structured"]["layers"])
    series = [
        Series(name, [(i, v) for i, v in enumerate(influence) if (i in kept) == among])
        for name, among in (("kept", True), ("dropped", False))
    ]
    return scatter(
        series, title="Influence of each layer", x="layer", y="1 - cosine(input, output)"
    )


def _size_plot(receipt: Mapping[str, Any]) -> str:
    """One model beside the dense one, whose KL is 0; empty where nothing was measured."""
    if not receipt["quality"]:
        return ""
    size, kl = receipt["size"], receipt["quality"]["kl"]
    series = [
        Series("dense", [(size["dense_bytes"] / 2**20, 0.0)]),
        Series(
            "compressed",
            [(size["device_bytes"] / 2**20, kl["value"])],
            low_high=[(kl["low"], kl["high"])],
        ),
    ]
    return scatter(
        series,
        title="Size against KL",
        x="MiB in device memory",
        y="KL, nats a token",
        from_zero=True,
    )


def _bytes_plot(receipts: Mapping[str, Mapping[str, Any]]) -> str:
    sized = {n: r["size"]["device_bytes"] / 2**20 for n, r in receipts.items()}
    kl = {n: r["quality"]["kl"] for n, r in receipts.items() if r["quality"]}
    return _against_kl(kl, sized, title="Size against KL", x="MiB in device memory")


def _speed_plot(receipts: Mapping[str, Mapping[str, Any]]) -> str:
    timed = {
        n: r["speed"]["decode"]["measured_time_ratio"] for n, r in receipts.items() if r["speed"]
    }
    measured = {n: r["kv"] or r["quality"] for n, r in receipts.items() if r["quality"]}
    kl = {n: quality["kl"] for n, quality in measured.items()}  # with the cache that was timed
    return _against_kl(kl, timed, title="Speed against KL", x="time of a decoded token, dense = 1")


def _against_kl(kl: Mapping, across: Mapping[str, float], *, title: str, x: str) -> str:
    """KL of recipes, each with the ends of its interval; empty where nothing was measured."""
    names = [name for name in across if name in kl]
    if not names:
        return ""
    points = [(across[name], kl[name]["value"]) for name in names]
    ends = [(kl[name]["low"], kl[name]["high"]) for name in names]
    front = [points[i] for i in pareto_front(points)]
    series = [Series("recipes", points, labels=names, named=True, low_high=ends)]
    if len(points) > 1:
        series.append(Series("Pareto front", front, line=True))
    return scatter(series, title=title, x=x, y="KL, nats a token", log_y=True, from_zero=True)
