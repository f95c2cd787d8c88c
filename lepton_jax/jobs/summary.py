"""What a job did and what it cost, as text for people and as JSON beside the output.

Rates are the engine's: prompt tokens computed per second of prefill and tokens per second of
decode, of this run, whereas rows and tokens count the whole output. Peaks of devices are in
`telemetry.py`.
"""

import dataclasses
import json
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from lepton_jax.distributed.replicas import process_stats
from lepton_jax.jobs.driver import Tally
from lepton_jax.jobs.files.places import JobError, reason, write_small
from lepton_jax.jobs.grading import interval
from lepton_jax.models.build import Model
from lepton_jax.optimizer.found import GAINS
from lepton_jax.telemetry import StepStats, device_peaks, roofline
from lepton_jax.tensors import QTensor

log = logging.getLogger(__name__)

_PREVIEW_LENGTH = 160  # characters


@dataclasses.dataclass(frozen=True)
class ModelCost:
    """What the roofline counts of one device: bytes of weights that a step reads, parameters that a
    token meets.

    `int8` is the share of these parameters that meet activations in int8.
    """

    weight_bytes: int
    parameters: int
    int8: float

    @classmethod
    def of(
        cls,
        model: Model,
        weight_bytes: int,
        *,
        leaves: Sequence[Any] = (),
        preset: str = "none",
        devices: int = 1,
    ) -> "ModelCost":
        """Of a model whose leaves take `weight_bytes`. With experts: what one token visits.

        `devices` do the work together, as one model or as many replicas. Where the `leaves` are in
        other processes there are none, and the preset says what is int8.
        """
        counts = {path: spec.size for path, spec in model.specs.items() if spec.inputs}
        everything = sum(counts.values())
        config = model.config
        if not config.tie_embeddings:
            counts.pop("embed", None)  # a token takes one row of it
        for path in counts:
            if "experts_" in path:
                counts[path] = counts[path] * config.experts_per_token // config.num_experts
        visited = sum(counts.values())
        int8 = float(preset == "w8a8")
        if leaves:
            stored = zip(model.specs, leaves, strict=True)
            int8 = sum(counts.get(path, 0) for path, leaf in stored if _is_int8(leaf)) / visited
        read = math.ceil(weight_bytes * visited / everything / devices)
        return cls(read, math.ceil(visited / devices), int8)


def _is_int8(leaf: Any) -> bool:
    """Whether both sides of a weight's product are int8."""
    return isinstance(leaf, QTensor) and leaf.act_bits == 8 and leaf.values.dtype == jnp.int8


def summarize(
    tally: Tally,
    stats: Mapping[str, Any],
    *,
    cost: ModelCost,
    output: str,
    cascade: Mapping[str, Any] | None = None,
    optimizer: Mapping[str, Any] | None = None,
    speculation: str = "off",
) -> dict[str, Any]:
    """The summary of a finished job, in JSON types.

    Args:
      tally: of the job.
      stats: `Engine.stats()` at its end, with `process_stats()` where that was another process.
      cost: of the model.
      output: the file that was written.
      cascade: of a job of two models, `CascadeMode.account()`.
      optimizer: what its profile was and what feedback did, `tuning.account()`.
      speculation: `engine.speculation` of the config.
    """
    engine = StepStats.of(stats)
    process = stats if "device" in stats else process_stats()
    return {
        "output": output,
        "rows": tally.rows,
        "errors": tally.errors,
        "error_types": dict(tally.error_types),
        "resumed_rows": tally.resumed,
        "accuracy": _accuracy(tally),
        "cut_answers": tally.cut,
        "perplexity": tally.perplexity,
        "bits_per_byte": tally.bits_per_byte,
        "alerts": tally.alerts,
        "prompt_tokens": tally.prompt_tokens,
        "generated_tokens": tally.generated_tokens,
        "seconds": round(tally.seconds, 3),
        "first_token_seconds": _rounded(tally.first_seconds, 3),
        "prefill_tokens_per_second": _rounded(engine.prefill_rate, 1),
        "decode_tokens_per_second": _rounded(engine.decode_rate, 1),
        "compile_seconds": round(engine.compile_seconds, 3),
        "programs": engine.programs,
        "late_compiles": engine.late_compiles,
        "compile_cache_hits": process["compile_cache_hits"],
        "compile_cache_misses": process["compile_cache_misses"],
        "prefix_hit_tokens": engine.prefix_hit_tokens,
        "preemptions": engine.preemptions,
        "speculation": speculation,
        "proposed_tokens": engine.proposed_tokens,
        "accepted_tokens": engine.accepted_tokens,
        "tokens_per_step": _rounded(engine.tokens_per_step, 3),
        "padding_waste": round(engine.padding_waste, 4),
        "peak_memory_bytes": process["peak_memory_bytes"],
        "device": process["device"],
        "device_peak_memory_bytes": process.get("device_peak_memory_bytes"),
        "roofline": _roofline(engine, process["device"], cost),
        "pool": stats.get("pool"),
        "cascade": cascade,
        "optimizer": optimizer,
    }


def _accuracy(tally: Tally) -> dict[str, Any] | None:
    """Mean grade of the rows with a known answer, its 95 % interval, and how many they are."""
    if tally.accuracy is None:
        return None
    low, high = interval(tally.graded, tally.accuracy)
    return {"mean": tally.accuracy, "low": low, "high": high, "rows": tally.graded}


def write_summary(summary: Mapping[str, Any], path: str) -> None:
    """As one indented JSON object. Where it can't be written a warning says so: the job is done."""
    try:
        write_small(path, (json.dumps(summary, indent=2) + "\n").encode())
    except (OSError, JobError) as error:
        log.warning("%s can't be written: %s; the output is complete", path, reason(error))


def summary_text(summary: Mapping[str, Any]) -> str:
    """The summary in a few lines for people."""
    s = summary
    rows = f"{s['rows']} ({s['errors']} errors"
    rows += f", {s['resumed_rows']} from an interrupted run)" if s["resumed_rows"] else ")"
    peak = f"{s['peak_memory_bytes'] / 2**20:,.0f} MiB"
    if s["device_peak_memory_bytes"] is not None:
        peak += f", on the device {s['device_peak_memory_bytes'] / 2**20:,.0f} MiB"
    programs = f"{s['programs']} in {s['compile_seconds']:.1f} s"
    if s["late_compiles"]:
        programs += f", {s['late_compiles']} of them while the job ran"
    lines = [
        ("rows", rows),
        *((f"  {kind}", f"{count}") for kind, count in s["error_types"].items()),
        *_answer_lines(s),
        *_cascade_lines(s["cascade"]),
        ("tokens", f"{s['prompt_tokens']:,} of prompts, {s['generated_tokens']:,} generated"),
        ("time", f"{s['seconds']:.1f} s"),
        *_first_tokens(s["first_token_seconds"]),
        ("prefill", _rate(s["prefill_tokens_per_second"])),
        ("decode", _rate(s["decode_tokens_per_second"])),
        ("programs", programs),
        ("compile cache", f"{s['compile_cache_hits']} hits, {s['compile_cache_misses']} misses"),
        ("prefix cache", f"{s['prefix_hit_tokens']:,} prompt tokens reused"),
        *_preemptions(summary),
        *_speculation(summary),
        *optimizer_lines(s["optimizer"]),
        ("padding waste", f"{s['padding_waste']:.0%}"),
        ("peak memory", peak),
        ("roofline", roofline_text(s["roofline"], s["device"])),
        *pool_lines(s["pool"]),
        ("output", s["output"]),
    ]
    return "\n".join(f"{name:<16}{value}" for name, value in lines)


def _answer_lines(s: Mapping[str, Any]) -> list[tuple[str, str]]:
    lines = []
    if s["accuracy"]:
        a = s["accuracy"]
        text = f"{a['mean']:.1%} of {a['rows']} known answers ({a['low']:.0%} to {a['high']:.0%})"
        lines.append(("correct", text))
    if s["cut_answers"]:
        lines.append(("cut short", f"{s['cut_answers']:,} answers, at max_tokens or max_len"))
    if s["perplexity"]:
        text = f"{s['perplexity']:,.4g} a token, {s['bits_per_byte']:.4g} bits a byte, of all texts"
        lines.append(("perplexity", text))
    if s["alerts"]:
        lines.append(("alerts", f"{s['alerts']}, in {s['output']}.alerts.jsonl"))
    return lines


def _cascade_lines(cascade: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """Who answered, whether the promise was kept, and what it saved."""
    if not cascade or not cascade["agreement"]:
        return []
    agreement, rows = cascade["agreement"], cascade["rows"]
    text = f"{agreement['mean']:.2%} as the dense model chooses ({agreement['low']:.2%} to "
    text += f"{agreement['high']:.2%}); {cascade['promised']:.2%} promised"
    by_dense = f"{rows['unsure']} unsure, {rows['audit']} audits, {rows['calibration']} calibration"
    lines = [
        ("agreement", text),
        ("answered by", f"the compressed model {rows['sure']}, the dense one {by_dense}"),
    ]
    if not cascade["thresholds"]:
        wanted = f"its calibration of {cascade['calibration']} rows"
        lines.append(("cascade", f"the input ended before {wanted}: the dense model answered all"))
    elif cascade["of_dense_time"]:
        share = f"about {cascade['of_dense_time']:.2f} of what the dense model would take alone"
        lines.append(("time beside", share))
    return lines


def _first_tokens(seconds: float | None) -> list[tuple[str, str]]:
    if seconds is None:
        return []
    return [("  first tokens", f"{seconds:.1f} s after the program's start")]


def _preemptions(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    if not summary["preemptions"]:
        return []
    text = f"{summary['preemptions']:,} times a row was put back and computed again, because the "
    return [("preemptions", f"{text}cache was full (engine.num_pages, engine.rows)")]


def _speculation(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    proposed, accepted = summary["proposed_tokens"], summary["accepted_tokens"]
    if not proposed:
        asked, decoded = summary["speculation"], summary["decode_tokens_per_second"]
        silent = asked == "off" or decoded is None
        return [] if silent else [("speculation", f"{asked} proposed nothing")]
    text = f"{accepted:,} of {proposed:,} proposed tokens accepted ({accepted / proposed:.0%})"
    return [("speculation", f"{text}, {summary['tokens_per_step']:.2f} tokens a step")]


def optimizer_lines(optimizer: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """What a profile set and was measured to gain, and how often a knob was turned."""
    o, lines = optimizer or {}, []
    if o.get("profile"):
        fields = ", ".join(f"{name}={value}" for name, value in o["fields"].items())
        kl = "not measured" if o["kl"] is None else f"at most {o['kl']:.4f} nats a token"
        effect = f"T1/T0 {1 / o['effect']:.2f}, "
        effect += f"{o['effect']:.2f} times as {GAINS[o['objective']]}, KL {kl}"
        lines += [("profile", f"{fields or 'nothing'} ({o['profile']})"), ("  when tuned", effect)]
    if o.get("decisions"):
        lines.append(("knob turns", f"{o['decisions']:,}"))
    return lines


def pool_lines(pool: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """What each replica did, and how near they came to T/m."""
    if pool is None:
        return []
    lines = [
        (
            f"replica {r['name']}",
            f"busy {r['utilization']:.0%}, {r['rows']} rows, {r['tokens_per_second']:,.0f} tokens/s"
            + (", died" if r["died"] else ""),
        )
        for r in pool["replicas"]
    ]
    times = f"{pool['ideal_seconds']:.1f} s at best, {pool['seconds']:.1f} s measured"
    times += f" ({pool['of_ideal']:.0%}); idle at the end {pool['tail_idle']:.1%}"
    return [*lines, ("time T/m", times)]


def preview_text(tally: Tally) -> str:
    """The first rows of the output, shortened."""
    return "\n".join(f"{row_id}: {_shortened(text)}" for row_id, text in tally.preview)


def _shortened(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= _PREVIEW_LENGTH else flat[: _PREVIEW_LENGTH - 3] + "..."


def _roofline(engine: StepStats, kind: str, cost: ModelCost) -> dict[str, float | None] | None:
    peaks = device_peaks(kind)
    if peaks is None:
        return None
    shares = dataclasses.asdict(roofline(engine, peaks, **dataclasses.asdict(cost)))
    return {name: _rounded(share, 4) for name, share in shares.items()}


def roofline_text(shares: Mapping[str, float | None] | None, device: str) -> str:
    if shares is None:
        return f"the peaks of {device!r} are not known"
    texts = {
        "decode_bandwidth": "of the memory bandwidth in decode",
        "prefill_flops": "of the FLOP/s in prefill",
    }
    found = [f"{shares[n]:.1%} {text}" for n, text in texts.items() if shares[n] is not None]
    return ", ".join(found) or "nothing ran"


def _rate(value: float | None) -> str:
    return "nothing ran" if value is None else f"{value:,.0f} tokens/s"


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
