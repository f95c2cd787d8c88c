"""Between jobs and the optimizer: a sample of a job's requests, and the profile that a run takes.

A mode turns rows into requests in its session's `add`; here it adds them to a `_Recorder` in place
of an engine, so that every mode is sampled by its own rules, and refused by an engine's. Read next:
`lepton_jax/optimizer/lepton_optimizer.py`, `lepton_jax/tune.py`.
"""

import dataclasses
import itertools
import logging
import sys
from collections.abc import Collection, Sequence
from typing import Any

from lepton_jax.checkpoints import load as checkpoints
from lepton_jax.config import CascadeSection, RunConfig, SamplingParams
from lepton_jax.distributed.ray_replicas import platform_of
from lepton_jax.engine.protocol import Limits
from lepton_jax.engine.request import StepOutput
from lepton_jax.engine.scored import Scoring
from lepton_jax.engine.sizing import max_len_of
from lepton_jax.jobs.compress_inputs import load_tokenizer
from lepton_jax.jobs.files.source import RowError, Source
from lepton_jax.jobs.mode_for import mode_for
from lepton_jax.jobs.openai_batch import BatchMode
from lepton_jax.jobs.rows import BadRow, read_rows
from lepton_jax.optimizer import profile as profiles
from lepton_jax.optimizer.found import GAINS, Found
from lepton_jax.optimizer.profile import Key, Profile
from lepton_jax.optimizer.sample import SampledRequest, workload_class
from lepton_jax.optimizer.space import with_fields
from lepton_jax.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)


class _Recorder:
    """Takes and refuses requests as an engine of these limits does, and keeps them."""

    has_work = False

    def __init__(self, limits: Limits):
        self.max_len = limits.max_len
        self.requests: dict[str, SampledRequest] = {}
        self._limits = limits

    def add_request(
        self, request_id: str, prompt_ids: Sequence[int], params: SamplingParams
    ) -> None:
        self._limits.check_request(prompt_ids, params)
        self.requests[request_id] = SampledRequest(tuple(prompt_ids), params)

    def add_scoring(self, request_id: str, prompt_ids: Sequence[int], scoring: Scoring) -> None:
        self._limits.check_scoring(prompt_ids, scoring)
        self.requests[request_id] = SampledRequest(tuple(prompt_ids), scoring)

    def step(self) -> list[StepOutput]:
        return []

    def abort(self, request_id: str) -> None:
        self.requests.pop(request_id, None)

    def forget(self) -> None:
        """Nothing is remembered."""


def sample_requests(config: RunConfig, tokenizer: Tokenizer) -> list[SampledRequest]:
    """Requests of the first rows of job.input, up to `optimizer.sample`. Rows that would become
    error rows are left out, which is said. Raises ValueError (JobError) where the input can't be
    read.
    """
    job = dataclasses.replace(config.job, follow=0.0)  # what is there now is enough
    asked = with_fields(config, {"scoring.calibrate": False})  # else answers are needed
    asked = dataclasses.replace(asked, cascade=CascadeSection())  # and here of two models
    source, mode, recorder = Source(job), mode_for(asked), _Recorder(_limits(config))
    batch = source.format == "openai_batch"
    mode = BatchMode(mode, config.job.mode) if batch else mode
    session = mode.open(recorder, tokenizer)
    id_field = "custom_id" if batch else "id"
    source.serve(mode.fields, id_field=id_field)
    rows = read_rows(source, mode, id_field=id_field, strict=source.strict)
    errors = []
    for number, row in enumerate(itertools.islice(rows, config.optimizer.sample)):
        try:
            if isinstance(row, BadRow):
                raise RowError(row.type, row.message)
            session.add(str(number), row.work)
        except RowError as error:
            errors.append(f"{row.id!r}: {error}")
    if errors:
        log.warning("sampled without %d rows that become error rows: %s", len(errors), errors[0])
    return list(recorder.requests.values())[: config.optimizer.sample]


def _limits(config: RunConfig) -> Limits:
    """Of an engine of this config; pages that it plans itself are enough for any request."""
    model, engine = checkpoints.describe(config.model.path).config, config.engine
    return Limits(
        vocab_size=model.vocab_size,
        max_len=max_len_of(engine, model.max_position),
        page_size=engine.page_size,
        num_pages=engine.num_pages or sys.maxsize,
        num_layers=model.num_layers,
        has_head=bool(model.head_path),
    )


def require_search(config: RunConfig) -> None:
    """Raises ValueError where a search is asked for what only a run does."""
    asked = config.optimizer
    if asked.log or asked.profile not in ("auto", "off"):
        raise ValueError(
            "tune makes a profile, takes none, and logs no decisions: leave out optimizer.profile "
            "and optimizer.log, which are for run"
        )


def with_profile(
    config: RunConfig, given: Collection[str]
) -> tuple[RunConfig, Profile | None, str]:
    """The config with the profile that optimizer.profile names or that fits; the profile; and what
    to tell the user, "" where there is nothing to say.

    Raises ValueError where a named profile is of something else, or a file is damaged.
    """
    asked = config.optimizer.profile
    without = with_fields(config, {"optimizer.profile": "off"})
    remote = config.pool.ray and platform_of(config.pool)
    if remote and asked not in ("auto", "off"):
        raise ValueError(
            f"optimizer.profile={asked!r} is of this process's devices, and the actors have "
            f"{remote}s: leave it out"
        )
    directory = profiles.default_directory()
    several = bool(config.hosts.coordinator)  # whose directories may differ
    none_here = several or config.job.follow or not any(directory.glob("*.json"))
    if remote or asked == "off" or (asked == "auto" and none_here):
        return without, None, ""
    model = checkpoints.identify(config.model.path)
    key = Key.here(model, config, given=given, workload="")
    if asked == "auto" and not profiles.has_any(key, directory):
        others = profiles.others(key, directory)
        return without, None, f"profile: none here; {'; '.join(others)}" if others else ""
    requests = sample_requests(config, load_tokenizer(config))
    if asked == "auto" and not requests:
        return without, None, ""
    kind = workload_class(requests)
    key = Key.here(model, config, given=given, workload=kind)
    profile, where = profiles.find(key, directory, asked)
    if profile is None:
        return without, None, f"profile: {where}"
    config = with_fields(config, {"optimizer.profile": where})
    return profile.applied(config, given), profile, _said(profile, where, given)


def _said(profile: Profile, where: str, given: Collection[str]) -> str:
    fields = ", ".join(f"{n}={v}" for n, v in profile.open_fields(given).items())
    kept = sorted(set(profile.fields) & set(given))
    stays = f"; {', '.join(kept)} as given" if kept else ""
    gain = f"{profile.numbers['effect']:.2f} times as {GAINS[profile.key.objective]}"
    kl = f", KL at most {profile.numbers['kl']:.4f}" if "kl" in profile.numbers else ""
    return (
        f"profile: {fields or 'nothing'}{stays}, because it was {gain} on {profile.key.workload} "
        f"on this device{kl} ({where})"
    )


def account(
    profile: Profile | None, given: Collection[str], *, config: RunConfig, decisions: int | None
) -> dict[str, Any]:
    """What a run's summary says of the optimizer: the profile's file, the fields that it set, the
    effect and the KL that the search measured, and how often a knob was turned.

    `config` is as `with_profile` gave it; `decisions` None where engines are in other processes.
    """
    numbers = profile.numbers if profile else {}
    return {
        "profile": config.optimizer.profile if profile else None,
        "fields": profile.open_fields(given) if profile else {},
        "objective": config.optimizer.objective,
        "effect": numbers.get("effect"),
        "kl": numbers.get("kl"),
        "decisions": decisions,
    }


def table(found: Found) -> str:
    """A search's trials, predicted beside measured, and what came of it: `first` and `whole` are
    seconds to a request's first and last token, `score` is what the objective makes small.
    """
    heads = f"{'first':>7} {'whole':>7} {'score':>8}"
    lines = [f"{'predicted':>9} {'measured':>9} {'error':>6} {heads}  candidate"]
    for one in found.tried:
        mark = " <- best" if one is found.best else ""
        lines.append(
            f"{one.predicted:8.2f}s {one.trial.seconds:8.2f}s {one.error:+6.0%} "
            f"{one.trial.first_token:6.2f}s {one.trial.whole:6.2f}s {one.score:7.2f}s  "
            f"{one.candidate.text()}{mark}"
        )
    programs, seconds = found.compiled
    kl = "not measured" if found.kl is None else f"at most {found.kl:.4f} nats a token"
    coarse = ", ".join(f"{name} ({kl:.4f})" for name, kl in found.too_coarse.items())
    lines += [
        "",
        f"effect T1/T0 = {1 / found.effect:.2f}: {found.tried[0].score:.2f} s before, "
        f"{found.best.score:.2f} s after, {found.effect:.2f} times as {GAINS[found.objective]}",
        f"accuracy kept: KL from the uncompressed model {kl}",
        f"{found.considered} candidates, {found.too_large} too large for the memory, "
        f"{len(found.tried)} tried, {programs} programs compiled in {seconds:.1f} s",
        *(f"{count} can't be predicted: {why}" for why, count in found.unpredicted.items()),
    ]
    if not found.tried[0].fits:
        lines.append("the config as it was doesn't fit into the memory and couldn't be the best")
    if coarse:
        lines.append(f"presets and caches that diverge more than allowed: {coarse}")
    lines += ["", f"the best as flags: {found.best.candidate.flags()}"]
    return "\n".join(lines)
