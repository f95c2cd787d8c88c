"""A byte tokenizer and an engine without a model: what it answers is known by hand."""

from pathlib import Path

from lepton_jax.config import EngineSection, JobSection, RunConfig, SamplingParams
from lepton_jax.engine.request import StepOutput
from lepton_jax.jobs.driver import Job
from lepton_jax.jobs.generate import GenerateMode
from lepton_jax.text.chat_template import ChatTemplateError, render

EOS = 256
TEMPLATE = (
    "{% for t in tools or [] %}{{ t.function.name }}!{% endfor %}"
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
)


class ByteTokenizer:
    """Ids 0 to 255 are bytes, 256 ends a text."""

    control_ids = frozenset({EOS})
    leading_space = False
    eos_ids = (EOS,)
    chat_template = TEMPLATE

    def encode(self, text, add_special=True):
        return list(text.encode())

    def apply_chat(self, messages, tools=None, **variables):
        if messages[0].get("role") == "bad":
            raise ChatTemplateError("messages[0].role is 'bad'")
        return self.encode(render(TEMPLATE, messages, tools=tools))

    def id_to_bytes(self, token_id):
        return bytes([token_id]) if token_id < 256 else b"<eos>"


class FakeEngine:
    """Answers each prompt with `answer(prompt bytes)`, then EOS; `block` tokens a beat.

    A prompt of `max_len` tokens or more is refused. The log-probability of token t is -t.
    """

    def __init__(self, answer=lambda prompt: prompt, *, rows=2, block=3, max_len=100, pages=(9,)):
        self.pages = pages
        self._answer, self._rows, self._block, self.max_len = answer, rows, block, max_len
        self._open = {}
        self.added, self.aborted, self.steps = [], [], 0
        self.most_open = 0
        self.fails = set()
        self.forgotten = []  # the steps before which it was as new

    @property
    def has_work(self):
        return bool(self._open)

    def add_request(self, request_id, prompt_ids, params):
        if len(prompt_ids) >= self.max_len:
            raise ValueError(
                f"the prompt has {len(prompt_ids)} tokens, over max_len={self.max_len}"
            )
        if request_id in self._open:
            raise ValueError(f"request id {request_id!r} is already running")
        self.added.append((request_id, params))
        ids = [*self._answer(bytes(prompt_ids)), EOS]
        if params.ignore_eos:
            ids *= params.max_tokens
        self._open[request_id] = (ids[: params.max_tokens], params)
        self.most_open = max(self.most_open, len(self._open))

    def abort(self, request_id):
        if self._open.pop(request_id, None):
            self.aborted.append(request_id)

    def forget(self):
        if self._open:
            raise ValueError("requests are open")
        self.forgotten.append(self.steps)

    def step(self):
        self.steps += 1
        return [self._advance(request_id) for request_id in list(self._open)[: self._rows]]

    def stats(self):
        return {"decode_steps": self.steps, "decode_tokens": 0, "something_else": 1}

    def _advance(self, request_id):
        ids, params = self._open[request_id]
        if request_id in self.fails:
            del self._open[request_id]
            return StepOutput(request_id, [], None, "error")
        new, rest = ids[: self._block], ids[self._block :]
        reason = None
        if not params.ignore_eos:
            ends = [i for i, t in enumerate(new) if t == EOS or t in params.stop_token_ids]
            if ends:
                new, rest, reason = new[: ends[0] + 1], [], "stop"
        if not rest:
            reason = reason or "length"
            del self._open[request_id]
        else:
            self._open[request_id] = (rest, params)
        logprobs = None if params.logprobs is None else [(-float(t), []) for t in new]
        return StepOutput(request_id, new, logprobs, reason)


class Killed(BaseException):
    """Stands for the end of the process between two beats."""


class MortalEngine(FakeEngine):
    """Lives for so many beats."""

    def __init__(self, beats, **sizes):
        super().__init__(**sizes)
        self._beats = beats

    def step(self):
        if self.steps >= self._beats:
            raise Killed
        return super().step()


def job_config(source, output, *, rows=2, sampling=None, **job):
    """A config of these paths; `job` are more fields of its section."""
    return RunConfig(
        engine=EngineSection(rows=rows),
        sampling=SamplingParams(**(sampling or {})),
        job=JobSection(input=str(source), output=str(output), **job),
    )


def run_job(config, engine=None, *, fingerprint="model", mode=None, tokenizer=None):
    """(output file, tally) of a job on a fake engine."""
    with Job(config, mode or GenerateMode(config.sampling)) as job:
        job.resume(fingerprint)
        tokenizer = tokenizer or ByteTokenizer()
        job.workload(tokenizer)
        tally = job.run(engine or FakeEngine(), tokenizer)
    return Path(job.output.path), tally
