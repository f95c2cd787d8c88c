"""The modes that score, over an engine whose log-probabilities are known by hand, and on bytes.

After a text the fake model's log-probability of an id depends on the whole text, so a question with
a wrong context, a wrong place or a wrong id gives another number.
"""

import csv
import dataclasses
import json
import math
import zlib

import numpy as np
import pytest
from jobs_fakes import EOS, ByteTokenizer, job_config, run_job

from lepton_jax.config import CascadeSection, JobSection, RunConfig, ScoringSection
from lepton_jax.engine.request import StepOutput
from lepton_jax.engine.scored import Scored, Scoring
from lepton_jax.jobs.classify import CONTENT_FREE, ClassifyMode
from lepton_jax.jobs.embed import EmbedMode
from lepton_jax.jobs.files.places import JobError
from lepton_jax.jobs.mode_for import mode_for
from lepton_jax.jobs.pairs import Pair, Questions, split_pair
from lepton_jax.jobs.perplexity import PerplexityMode, windows
from lepton_jax.jobs.rank import RankMode
from lepton_jax.jobs.rows import RowError
from lepton_jax.jobs.score import ScoreMode
from lepton_jax.jobs.scoring import ScoringSession, plain, score_all

TEXT = "context one, and what follows"


class Bytes(ByteTokenizer):
    """Without a beginning of text: the end of text stands for an empty context."""

    bos_id = None


class BytesWithBos(Bytes):
    """Each text begins with id 257."""

    bos_id = 257

    def encode(self, text, add_special=True):
        return [257] * add_special + super().encode(text)


def logprob(before, token) -> float:
    """Of an id after these ids, -0.01 to -2."""
    return -(1 + zlib.crc32(repr((list(before), token)).encode()) % 200) / 100


def best_after(before) -> int:
    return zlib.crc32(repr(list(before)).encode()) % 256


class FakeScorer:
    """Answers one question a beat; ids in `broken` make a question fail."""

    max_len, pages = 60, (9,)

    def __init__(self):
        self.open, self.asked, self.aborted, self.broken = {}, [], [], set()

    @property
    def has_work(self):
        return bool(self.open)

    def add_scoring(self, request_id, prompt_ids, scoring):
        if len(prompt_ids) > self.max_len:
            raise ValueError(f"the prompt has {len(prompt_ids)} tokens: too many")
        self.open[request_id] = tuple(prompt_ids), scoring
        self.asked.append((tuple(prompt_ids), scoring))

    def forget(self):
        """There is no cache of pages to forget."""

    def abort(self, request_id):
        if self.open.pop(request_id, None):
            self.aborted.append(request_id)

    def step(self):
        request_id = next(iter(self.open))
        ids, scoring = self.open.pop(request_id)
        if set(ids) & self.broken:
            return [StepOutput(request_id, [], None, "error")]
        first = len(ids) - len(scoring.targets)
        lines = [
            [logprob(ids[: first + n + 1], token) for token in targets]
            for n, targets in enumerate(scoring.targets)
        ]
        table = np.zeros((len(lines), scoring.width), np.float32)
        greedy = np.zeros(table.shape, bool)
        for n, line in enumerate(lines):
            table[n, : len(line)] = line
            best = best_after(ids[: first + n + 1])
            greedy[n, : len(line)] = [token == best for token in scoring.targets[n]]
        pooled = np.array([len(ids), ids[-1], 1.0], np.float32) if scoring.pool else None
        return [StepOutput(request_id, [], None, "scored", Scored(table, greedy, pooled))]


def alone(context, continuation) -> list[float]:
    """Log-probabilities of a continuation's ids, one by one."""
    ids = [*context, *continuation]
    return [logprob(ids[:n], ids[n]) for n in range(len(context), len(ids))]


def answer(mode, values, engine=None, tokenizer=None) -> dict:
    works = {"a": mode.parse(values)}
    return score_all(mode, works, engine or FakeScorer(), tokenizer or Bytes())[0]


def test_a_text_is_scored_after_the_end_of_text_where_there_is_no_beginning():
    row = answer(ScoreMode(), {"text": "hello"})
    expected = alone([EOS], b"hello")
    assert row["logprobs"] == pytest.approx(expected)
    assert row["logprob"] == pytest.approx(sum(expected))
    assert (row["tokens"], row["bytes"], row["prompt_tokens"]) == (5, 5, 6)
    assert row["per_byte"] == pytest.approx(sum(expected) / 5)
    assert row["greedy"] is False


def test_a_beginning_of_text_that_the_tokenizer_writes_is_not_scored():
    row = answer(ScoreMode(), {"text": "hello"}, tokenizer=BytesWithBos())
    assert row["logprobs"] == pytest.approx(alone([257], b"hello"))


def test_greedy_says_that_each_token_is_the_likeliest():
    context, ids = tuple(b"a context"), []
    while len(ids) < 3:
        ids.append(best_after([*context, *ids]))
    for change, greedy in ((0, True), (1, False)):
        for place in range(3):
            changed = [*ids]
            changed[place] ^= change
            asked = Questions([Pair(context, tuple(changed), 3)])
            assert asked.likelihoods(results_of(asked))[0].greedy == greedy


def results_of(asked: Questions) -> list[Scored]:
    engine, found = FakeScorer(), []
    for question in asked.questions:
        engine.add_scoring("a", question.ids, question.scoring)
        found.append(engine.step()[0].scored)
    return found


def test_spaces_at_the_end_of_a_context_go_to_the_continuation():
    pair = split_pair(Bytes(), "water  ", "boils")
    assert (bytes(pair.context), bytes(pair.continuation)) == (b"water", b"  boils")
    assert pair.bytes == 5
    pair = split_pair(Bytes(), "  ", "boils")
    assert (pair.context, bytes(pair.continuation)) == ((EOS,), b"  boils")


def test_choices_that_differ_in_their_last_token_alone_are_one_question():
    choices = [" a", " b", "x", " ", " a", " bc"]
    engine = FakeScorer()
    row = answer(ScoreMode(), {"context": TEXT, "choices": choices}, engine)
    context = list(TEXT.encode())
    for choice, got in zip(choices, row["choices"], strict=True):
        assert got["logprobs"] == pytest.approx(alone(context, choice.encode()))
    sums = [sum(alone(context, choice.encode())) for choice in choices]
    per_byte = [total / len(choice) for total, choice in zip(sums, choices, strict=True)]
    assert row["best"] == np.argmax(sums) and row["best_per_byte"] == np.argmax(per_byte)
    assert row["prompt_tokens"] == len(context) + 11
    assert engine.asked == [
        ((*context, *b" "), Scoring((tuple(b" x"), tuple(b"ab")))),
        ((*context, *b" b"), Scoring((tuple(b"b"), tuple(b"c")))),
    ]


def test_long_choices_are_questions_of_their_own():
    choices = ["one way", "no way", "z"]
    engine = FakeScorer()
    row = answer(ScoreMode(), {"context": TEXT, "choices": choices}, engine)
    for choice, got in zip(choices, row["choices"], strict=True):
        assert got["logprobs"] == pytest.approx(alone(TEXT.encode(), choice.encode()))
    assert len(engine.asked) == 2


def test_one_token_choices_are_one_question():
    engine = FakeScorer()
    answer(ScoreMode(), {"context": TEXT, "choices": ["a", "b", "c", "d"]}, engine)
    ((ids, scoring),) = engine.asked
    assert bytes(ids) == TEXT.encode() and scoring.targets == (tuple(b"abcd"),)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "the row has nothing: want text, or context"),
        ({"text": "a", "context": "b"}, "has context and text"),
        ({"context": "a"}, "has context: want"),
        ({"text": ""}, "text is '': want a text"),
        ({"text": 5}, "text is 5: want a text"),
        ({"context": 5, "continuation": "a"}, "context is 5"),
        ({"context": "a", "continuation": ""}, "continuation is ''"),
        ({"context": "a", "choices": ["b"]}, "choices is .*two or more"),
        ({"context": "a", "choices": "bc"}, "choices is 'bc'"),
        ({"context": "a", "choices": ["b", ""]}, "choices is"),
    ],
)
def test_bad_rows_are_named(values, message):
    with pytest.raises(RowError, match=message) as error:
        ScoreMode().parse(values)
    assert error.value.kind == "invalid_row"


def section(**fields) -> ScoringSection:
    return ScoringSection(**{"labels": ("good", "bad"), **fields})


def softmax(scores) -> np.ndarray:
    weights = np.exp(np.array(scores) - max(scores))
    return weights / weights.sum()


def test_classify_gives_probabilities_of_the_labels():
    mode = ClassifyMode(section(template="Review: {text}\nMood: {label}."))
    row = answer(mode, {"text": "fine"})
    before = b"Review: fine\nMood:"
    sums = [sum(alone(before, label)) for label in (b" good.", b" bad.")]
    assert list(row["probabilities"].values()) == pytest.approx(softmax(sums).tolist())
    assert sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-12)
    assert row["label"] == ("good", "bad")[int(np.argmax(sums))]
    assert row["probability"] == max(row["probabilities"].values())
    assert list(row["logprobs"].values()) == pytest.approx(sums)


def test_classify_by_the_mean_of_the_tokens():
    row = answer(ClassifyMode(section(normalize="mean")), {"text": "fine"})
    before = b"fine\nLabel:"
    means = [np.mean(alone(before, label)) for label in (b" good", b" bad")]
    assert list(row["probabilities"].values()) == pytest.approx(softmax(means).tolist())


def test_calibration_takes_off_what_content_free_texts_give():
    mode, engine = ClassifyMode(section(calibrate=True)), FakeScorer()
    session = mode.open(engine, Bytes())

    def sums(text):
        return [sum(alone(text + b"\nLabel:", label)) for label in (b" good", b" bad")]

    free = np.mean([softmax(sums(text.encode())) for text in CONTENT_FREE], axis=0)
    session.add("a", mode.parse({"text": "fine"}))
    rows = [p.row for _ in range(2) for p in session.step() if p.row]
    expected = softmax(sums(b"fine") - np.log(free))
    assert list(rows[0]["probabilities"].values()) == pytest.approx(expected.tolist(), abs=1e-6)


def test_calibration_of_a_label_that_is_all_but_impossible():
    long = "x" * 900
    mode = ClassifyMode(section(calibrate=True, labels=("good", long)))
    engine = FakeScorer()
    engine.max_len = 2000
    session = mode.open(engine, Bytes())
    with np.errstate(all="raise", under="ignore"):
        session.add("a", mode.parse({"text": "fine"}))
        rows = [p.row for _ in range(2) for p in session.step() if p.row]
    assert sum(rows[0]["probabilities"].values()) == pytest.approx(1)
    logs = [sum(alone(b"fine\nLabel:", label.encode())) for label in (" good", f" {long}")]
    free = [
        [sum(alone(text.encode() + b"\nLabel:", label.encode())) for label in (" good", f" {long}")]
        for text in CONTENT_FREE
    ]
    free = np.array(free) - np.logaddexp.reduce(free, axis=1, keepdims=True)
    expected = softmax(np.array(logs) - np.logaddexp.reduce(free) + np.log(3))
    assert list(rows[0]["probabilities"].values()) == pytest.approx(expected.tolist(), abs=1e-4)


def test_the_text_may_come_again_behind_the_label():
    mode, engine = ClassifyMode(section(template="{text}: {label} ({text})")), FakeScorer()
    answer(mode, {"text": "fine"}, engine)
    assert any(
        bytes(ids + scoring.targets[-1]).endswith(b" (fine)") for ids, scoring in engine.asked
    )
    mode, engine = RankMode(section(template="{query}: {candidate} ({query})")), FakeScorer()
    answer(mode, {"query": "q", "candidates": ["a", "b"]}, engine)
    assert any(bytes(ids + scoring.targets[-1]).endswith(b" (q)") for ids, scoring in engine.asked)


def test_classify_as_a_chat():
    mode = ClassifyMode(section(chat=True, system="Choose.", template="Is it good? {text}"))
    engine = FakeScorer()
    answer(mode, {"text": "It is {label}."}, engine)
    assert bytes(engine.asked[0][0]).startswith(b"s:Choose.;u:Is it good? It is {label}.;goo")
    assert len(engine.asked) == 2


def test_classify_the_answer_to_a_row_s_own_messages():
    mode = ClassifyMode(section(chat=True, system="Choose.", template="Is it good? {text}"))
    roles = ("system", "user", "assistant", "user")
    chat = [{"role": role, "content": f"{n}{{label}}"} for n, role in enumerate(roles)]
    engine = FakeScorer()
    row = answer(mode, {"messages": chat}, engine)
    before = b"s:0{label};u:1{label};a:2{label};u:3{label};"
    assert all(bytes(ids).startswith(before) for ids, _ in engine.asked)
    sums = [sum(alone(before, label)) for label in (b"good", b"bad")]
    assert list(row["logprobs"].values()) == pytest.approx(sums)
    assert mode.requests(chat, Bytes())[0][0] == len(engine.asked[0][0])


@pytest.mark.parametrize(
    ("fields", "values", "message"),
    [
        ({}, {"messages": [{}]}, "which want scoring.chat=true .*columns=other=messages"),
        ({"chat": True, "calibrate": True}, {"messages": [{}]}, "want scoring.calibrate=false"),
        ({"chat": True}, {"messages": [{}], "text": "x"}, "has text and messages: want one"),
        ({"chat": True}, {"messages": []}, "messages is empty: want a list"),
        ({"chat": True}, {"messages": "x"}, "messages is 'x': want a list"),
        ({"chat": True}, {}, "text is missing: want a text"),
    ],
)
def test_rows_that_are_no_text_and_no_chat_are_named(fields, values, message):
    with pytest.raises(RowError, match=message):
        ClassifyMode(section(**fields)).parse(values)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"labels": ("a,b",)}, "want two or more, .* or the flag repeated"),
        ({"labels": ("a", "a")}, "all different"),
        ({"template": "{label}"}, "no place for the text"),
        ({"template": "{text}"}, "want {label} after"),
        ({"template": "{text} {label}", "chat": True}, "the label is the answer"),
    ],
)
def test_classify_refuses_settings_that_do_not_fit(fields, message):
    with pytest.raises(ValueError, match=message):
        ClassifyMode(section(**fields))


def test_embeddings_have_length_one():
    row = answer(EmbedMode("mean"), {"text": "abc"})
    assert row["embedding"] == pytest.approx(np.array([3, 99, 1]) / math.sqrt(9 + 99**2 + 1))
    assert row["prompt_tokens"] == 3


def test_rank_by_likelihood_and_by_similarity():
    values = {"query": "query", "candidates": ["one", "three", "two"]}
    row = answer(RankMode(section()), values)
    means = [np.mean(alone(b"query", b"\n" + text.encode())) for text in values["candidates"]]
    assert row["scores"] == pytest.approx(means)
    assert row["ranking"].tolist() == np.argsort(-np.array(means)).tolist()
    row = answer(RankMode(section(rank_by="similarity")), values)
    vectors = [np.array([len(t), ord(t[-1]), 1.0]) for t in ("query", "one", "three", "two")]
    units = [vector / np.linalg.norm(vector) for vector in vectors]
    assert row["scores"] == pytest.approx([float(units[0] @ unit) for unit in units[1:]])
    with pytest.raises(ValueError, match="want {query}, and {candidate} after it"):
        RankMode(section(template="{candidate} {query}"))


@pytest.mark.parametrize(("window", "stride"), [(4, 4), (4, 1), (5, 3), (100, 7)])
def test_windows_score_each_token_once_with_all_that_they_reach(window, stride):
    ids = [EOS, *b"a text of nineteen"]
    places = []
    for question in windows(ids, window=window, stride=stride):
        assert len(question.ids) <= window
        begin = next(
            n for n in range(len(ids)) if tuple(ids[n:])[: len(question.ids)] == question.ids
        )
        first = begin + len(question.ids) - len(question.scoring.targets) + 1
        for place, targets in enumerate(question.scoring.targets, first):
            assert targets == (ids[place],)
            places.append(place)
    assert places == list(range(1, len(ids)))
    with pytest.raises(ValueError, match="want 1 to scoring.window=4"):
        PerplexityMode(4, 5)


def test_perplexity_by_hand():
    row = answer(PerplexityMode(3, 2), {"text": "abcdef"})
    ids = [EOS, *b"abcdef"]
    losses = alone(ids[:1], ids[1:4])  # the first window: places 1 to 3
    losses += alone(ids[2:4], ids[4:6]) + alone(ids[4:6], ids[6:])
    assert row["windows"] == 3 and row["tokens"] == 6
    assert row["logprob"] == pytest.approx(sum(losses))
    assert row["perplexity"] == pytest.approx(math.exp(-sum(losses) / 6))
    assert row["bits_per_byte"] == pytest.approx(-sum(losses) / 6 / math.log(2))


def test_a_refused_row_leaves_nothing_behind():
    engine = FakeScorer()
    session = ScoringSession(ScoreMode(), engine, Bytes())
    values = {"context": "c" * 55, "choices": ["short", "much too long", "also short"]}
    with pytest.raises(RowError, match="too many") as error:
        session.add("a", ScoreMode().parse(values))
    assert error.value.kind == "refused" and not session.has_work
    assert engine.aborted == ["a/0"]


def test_what_calibration_asks_counts_for_the_sizes():
    mode = ClassifyMode(section(calibrate=True))
    tokens = [count for count, _ in mode.requests("x", Bytes())]
    asked = []
    for text in ("x", *CONTENT_FREE):
        asked += [len(question.ids) for question in mode.ask(text, Bytes()).questions]
    assert tokens == asked


def test_a_calibration_that_is_refused_is_one_line(tmp_path):
    source = tmp_path / "rows.jsonl"
    source.write_text('{"text": "fine"}\n')
    config = job_config(source, tmp_path / "labels.jsonl", mode="classify")
    config = dataclasses.replace(config, scoring=section(calibrate=True))
    engine = FakeScorer()
    engine.max_len = 3
    with pytest.raises(JobError, match="job.mode=classify can't begin: the prompt has"):
        run_job(config, engine, mode=mode_for(config), tokenizer=Bytes())


LABELS = {"labels": ("good", "bad")}


@pytest.mark.parametrize(
    ("mode", "scoring", "cascade", "says"),
    [
        (
            "score",
            {"alert": "good>=0.5"},
            {},
            "scoring.alert='good>=0.5' is of job.mode=classify",
        ),
        ("generate", LABELS, {}, "scoring.labels=.* is of job.mode=classify, not of generate"),
        ("embed", {"normalize": "sum"}, {}, "normalize='sum' is of job.mode=classify or rank, not"),
        ("classify", {**LABELS, "system": "x"}, {}, "is read with scoring.chat=True only"),
        ("rank", {"layer": 3}, {}, "scoring.layer=3 is read with scoring.rank_by=similarity only"),
        ("rank", {"rank_by": "similarity", "template": "x"}, {}, "rank_by=likelihood only"),
        ("classify", LABELS, {"audit": 0.1}, "cascade.audit=0.1 is read with a cascade.agreement"),
    ],
)
def test_what_a_mode_would_not_read_is_refused(mode, scoring, cascade, says):
    config = RunConfig(
        job=JobSection(mode=mode),
        scoring=ScoringSection(**scoring),
        cascade=CascadeSection(**cascade),
    )
    with pytest.raises(ValueError, match=says):
        mode_for(config)


@pytest.mark.parametrize(
    ("mode", "says"), [("classify", "leave it out (give scoring.template)"), ("embed", "out")]
)
def test_a_template_of_prompts_is_for_generate_alone(mode, says):
    asked = section() if mode == "classify" else ScoringSection()
    config = RunConfig(job=JobSection(mode=mode, template="{text}"), scoring=asked)
    with pytest.raises(ValueError, match="job.template='{text}' is of job.mode=generate") as error:
        mode_for(config)
    assert str(error.value).endswith(says)


@pytest.mark.parametrize("mode", ["embed", "perplexity"])
def test_what_is_not_right_or_wrong_is_not_graded(mode):
    with pytest.raises(ValueError, match="job.answer='label' grades answers, and job.mode="):
        mode_for(RunConfig(job=JobSection(mode=mode, answer="label")))


def test_broken_numbers_end_a_row_once():
    engine, mode = FakeScorer(), ScoreMode()
    engine.broken = {ord("!")}
    session = ScoringSession(mode, engine, Bytes())
    session.add("a", mode.parse({"context": "so!", "choices": ["no way", "my way"]}))
    session.add("b", mode.parse({"text": "fine"}))
    rows = {}
    while session.has_work:
        for progress in session.step():
            assert progress.key not in rows
            rows[progress.key] = progress.row
    assert rows["a"]["error"]["type"] == "not_finite" and rows["b"]["tokens"] == 4
    assert not engine.open


def test_sessions_count_questions_and_drop_them():
    engine, mode = FakeScorer(), ScoreMode()
    session = mode.open(engine, Bytes())
    session.add("a", mode.parse({"context": TEXT, "choices": ["no way", "my way"]}))
    with pytest.raises(RowError, match="already being scored"):
        session.add("a", mode.parse({"text": "x"}))
    assert len(session) == 2
    (progress,) = session.step()
    assert (progress.key, progress.row, len(session)) == ("a", None, 1)
    session.close()
    assert not engine.has_work and not session.has_work
    with pytest.raises(RuntimeError, match="idle"):
        session.step()


def test_rows_of_files_are_plain_json():
    row = plain({"a": np.float32(1 / 3), "b": np.array([1, 2]), "c": [-math.inf], "d": True})
    assert row == {"a": 0.333333, "b": [1, 2], "c": [None], "d": True}


def test_every_mode_has_a_maker():
    assert isinstance(mode_for(RunConfig(job=JobSection(mode="score"))), ScoreMode)
    makers = {"classify": ClassifyMode, "embed": EmbedMode, "perplexity": PerplexityMode}
    for name, kind in makers.items():
        asked = section() if name == "classify" else ScoringSection()
        config = RunConfig(job=JobSection(mode=name), scoring=asked)
        mode = mode_for(config)
        assert isinstance(mode, kind)
        sizes = mode.requests(mode.parse({"text": "some text"}), Bytes())
        assert sizes and all(count > 0 and spec.max_tokens == 0 for count, spec in sizes)


def test_a_file_of_rows_in_each_form_of_the_mode_score(tmp_path):
    rows = [
        {"id": "a", "text": "hello"},
        {"id": "b", "context": TEXT, "choices": [" no", " my way"]},
        {"id": "c", "context": TEXT},
        {"id": "d", "context": TEXT, "continuation": "x" * 60},
        {"id": "e", "context": "", "continuation": "hello"},
    ]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = job_config(source, tmp_path / "scores.jsonl", mode="score")
    path, tally = run_job(config, FakeScorer(), mode=mode_for(config), tokenizer=Bytes())
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["id"] for row in found] == list("abcde")
    assert found[0]["logprobs"] == pytest.approx(alone([EOS], b"hello"))
    assert {name: v for name, v in found[4].items() if name != "id"} == {
        name: v for name, v in found[0].items() if name != "id"
    }
    assert len(found[1]["choices"]) == 2 and found[1]["best"] in (0, 1)
    assert found[2]["error"]["type"] == "invalid_row"
    assert found[3]["error"]["type"] == "refused"
    assert (tally.rows, tally.errors) == (5, 2)


def test_a_file_to_classify_in_csv(tmp_path):
    source = tmp_path / "rows.csv"
    source.write_text("id,text\n1,fine\n2,bad soup\n")
    config = dataclasses.replace(
        job_config(source, tmp_path / "labels.csv", mode="classify"), scoring=section()
    )
    path, tally = run_job(config, FakeScorer(), mode=mode_for(config), tokenizer=Bytes())
    with path.open() as lines:
        found = list(csv.DictReader(lines))
    assert [row["id"] for row in found] == ["1", "2"] and tally.errors == 0
    for row in found:
        chances = json.loads(row["probabilities"])
        assert sum(chances.values()) == pytest.approx(1, abs=2e-6)
        assert row["label"] == max(chances, key=chances.get)
