"""Every format in and out, on an engine that echoes: shards, codecs, columns, URLs, bad files."""

import csv
import gzip
import io
import json

import fsspec
import pandas
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from jobs_fakes import job_config, run_job

from lepton_jax.config import JobSection
from lepton_jax.jobs.files import places
from lepton_jax.jobs.files.places import JobError
from lepton_jax.jobs.files.source import Source, short_names
from lepton_jax.jobs.mode_for import mode_for

ROWS = [{"id": f"r{i}", "prompt": f"row {i}, été"} for i in range(5)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def csv_of(rows, names=("id", "prompt")):
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def json_rows(text):
    return [json.loads(line) for line in text.splitlines()]


def texts(path):
    return {row["id"]: row.get("text") for row in json_rows(path.read_text())}


ECHOED = {row["id"]: row["prompt"] for row in ROWS}


@pytest.mark.parametrize(
    "name", ["in.jsonl", "in.csv", "in.parquet", "in.jsonl.gz", "in.jsonl.zst", "in.csv.gz"]
)
def test_every_input_gives_the_same_answers(tmp_path, name):
    path = tmp_path / name
    data = (csv_of(ROWS) if ".csv" in name else LINES).encode()
    if name.endswith(".gz"):  # two members and two frames: files that were appended to
        half = data.index(b"\n", len(data) // 2) + 1
        path.write_bytes(gzip.compress(data[:half]) + gzip.compress(data[half:]))
    elif name.endswith(".zst"):
        half, pack = data.index(b"\n") + 1, zstandard.ZstdCompressor().compress
        path.write_bytes(pack(data[:half]) + pack(data[half:]))
    elif name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        path.write_bytes(data)
    output, tally = run_job(job_config(path, tmp_path / "out.jsonl"))
    assert texts(output) == ECHOED
    assert (tally.rows, tally.errors) == (5, 0)
    source = Source(JobSection(input=str(path)))
    source.digests()
    assert source.rows >= 5  # a cell of CSV may be several lines


def test_csv_and_parquet_hold_what_the_lines_hold(tmp_path):
    (tmp_path / "in.jsonl").write_text(LINES + '{"id": "bad"}\n')
    sampling = {"logprobs": 1}
    files = {}
    for name in ("out.jsonl", "out.csv", "out.parquet"):
        files[name], _ = run_job(
            job_config(tmp_path / "in.jsonl", tmp_path / name, sampling=sampling)
        )
    rows = json_rows(files["out.jsonl"].read_text())
    table = pyarrow.parquet.read_table(files["out.parquet"])
    assert table.schema.field("token_ids").type == pyarrow.list_(pyarrow.int64())
    assert pyarrow.types.is_struct(table.schema.field("error").type)
    found = [
        {name: value for name, value in row.items() if value is not None}
        for row in table.to_pylist()
    ]
    assert found == rows
    frame = pandas.read_parquet(files["out.parquet"])
    assert list(frame["text"][:5]) == list(ECHOED.values())
    assert frame["error"][5]["type"] == "invalid_row"
    assert list(frame["token_ids"][0]) == rows[0]["token_ids"]
    with files["out.csv"].open(newline="") as lines:
        cells = list(csv.DictReader(lines))
    assert cells[0]["text"] == rows[0]["text"]
    assert json.loads(cells[0]["token_ids"]) == rows[0]["token_ids"]
    assert json.loads(cells[5]["error"]) == rows[5]["error"]
    assert list(pandas.read_csv(files["out.csv"])["id"]) == [row["id"] for row in rows]


@pytest.mark.parametrize("name", ["out.jsonl.gz", "out.csv.zst", "out.jsonl.zst", "out.csv.gz"])
def test_compressed_outputs_hold_what_plain_ones_hold(tmp_path, name):
    (tmp_path / "in.jsonl").write_text(LINES)
    plain, _ = run_job(job_config(tmp_path / "in.jsonl", tmp_path / name[: name.rindex(".")]))
    packed, _ = run_job(job_config(tmp_path / "in.jsonl", tmp_path / name))
    if name.endswith(".gz"):
        content = gzip.decompress(packed.read_bytes())
    else:
        content = zstandard.ZstdDecompressor().stream_reader(packed.read_bytes()).read()
    assert content == plain.read_bytes()


def test_shards_are_one_input_in_the_order_of_their_names(tmp_path):
    (tmp_path / "part-1.jsonl").write_text('{"prompt": "c"}\n{"prompt": ""}\n{"id": "x"')
    (tmp_path / "part-0.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "a"}\n{"prompt": "b"}\n'))
    output, _ = run_job(job_config(tmp_path / "part-*", tmp_path / "out.jsonl"))
    rows = json_rows(output.read_text())
    assert [(row["id"], row.get("text")) for row in rows] == [
        ("part-0.jsonl.gz:1", "a"),
        ("part-0.jsonl.gz:2", "b"),
        ("part-1.jsonl:1", "c"),
        ("part-1.jsonl:2", None),
        ("part-1.jsonl:3", None),
    ]
    assert [(row["error"]["file"], row["error"]["line"]) for row in rows[3:]] == [
        ("part-1.jsonl", 2),
        ("part-1.jsonl", 3),
    ]


def test_shards_of_one_name_in_several_folders(tmp_path):
    for day in ("a", "b"):
        (tmp_path / "in" / day).mkdir(parents=True)
        (tmp_path / "in" / day / "p.jsonl").write_text('{"prompt": "x"}\n{"prompt": ""}\n')
    output, tally = run_job(job_config(tmp_path / "in" / "*" / "p.jsonl", tmp_path / "out.jsonl"))
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"{day}/p.jsonl:{n}" for day in "ab" for n in (1, 2)]
    assert [row["error"]["file"] for row in rows if "error" in row] == ["a/p.jsonl", "b/p.jsonl"]
    assert tally.errors == 2
    assert short_names(["gs://b/x/p", "gs://b/y/q"]) == ["p", "q"]
    assert short_names(["gs://b/x/p", "gs://b/y/p"]) == ["x/p", "y/p"]


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_columns_are_renamed_and_kept(tmp_path, ending):
    rows = [
        {"key": "a", "question": "one?", "label": "x", "prompt": "old", "note": "no"},
        {"key": "b", "question": "two?", "label": "y", "prompt": "old", "note": "no"},
    ]
    path = tmp_path / f"in.{ending}"
    if ending == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        path.write_text(csv_of(rows, list(rows[0])) if ending == "csv" else lines)
    config = job_config(
        path,
        tmp_path / "out.jsonl",
        columns="prompt=question, id=key",
        keep="label, asked=question",
    )
    output, _ = run_job(config)
    first, second = json_rows(output.read_text())
    assert list(first)[:3] == ["id", "label", "asked"]
    assert (first["id"], first["text"], first["label"]) == ("a", "one?", "x")
    assert (second["id"], second["text"], second["asked"]) == ("b", "two?", "two?")
    assert "note" not in first and "prompt" not in first


def test_cells_hold_json_and_structs_hold_fields(tmp_path):
    chat = [{"role": "user", "content": "hi"}]
    rows = [
        {"id": "a", "messages": chat, "sampling": {"max_tokens": 3, "seed": None}},
        {"id": "b", "messages": None, "prompt_tokens": [120, 121]},
    ]
    table = pyarrow.Table.from_pylist(
        rows,
        schema=pyarrow.schema(
            [
                ("id", pyarrow.string()),
                (
                    "messages",
                    pyarrow.list_(
                        pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())])
                    ),
                ),
                (
                    "sampling",
                    pyarrow.struct([("max_tokens", pyarrow.int64()), ("seed", pyarrow.int64())]),
                ),
                ("prompt_tokens", pyarrow.list_(pyarrow.int64())),
            ]
        ),
    )
    pyarrow.parquet.write_table(table, tmp_path / "in.parquet")
    cells = [
        {"id": "a", "messages": json.dumps(chat), "sampling": '{"max_tokens": 3}'},
        {"id": "b", "prompt_tokens": "[120, 121]"},
        {"id": "c", "messages": "[{"},
    ]
    names = ["id", "messages", "sampling", "prompt_tokens"]
    (tmp_path / "in.csv").write_text(csv_of(cells, names))
    for name in ("in.parquet", "in.csv"):
        output, _ = run_job(job_config(tmp_path / name, tmp_path / "out.jsonl"))
        found = json_rows(output.read_text())
        assert [row["text"] for row in found[:2]] == ["u:h", "xy"]
    assert "messages is not valid JSON" in found[2]["error"]["message"]


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_template_makes_prompts_of_a_table(tmp_path, ending):
    rows = [
        {"shop": "North", "sold": 95, "choices": "up or down", "note": "", "sampling": None},
        {"shop": "South", "sold": None, "choices": "up or down", "note": "", "sampling": None},
    ]
    rows[0]["sampling"] = {"max_tokens": 20} if ending == "parquet" else '{"max_tokens": 20}'
    path = tmp_path / f"in.{ending}"
    if ending == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text(csv_of(rows, list(rows[0])))
    template, outputs = "{shop}: {sold} ({choices})", []
    for columns in ("id=shop", "id=shop,shop"):
        config = job_config(path, tmp_path / "out.jsonl", template=template, columns=columns)
        output, _ = run_job(config, mode=mode_for(config))
        outputs.append(output.read_text())
    assert outputs[0] == outputs[1]
    first, second = json_rows(output.read_text())
    assert (first["id"], first["text"]) == ("North", "North: 95 (up or dow")
    assert second["id"] == "South" and "has no 'sold'" in second["error"]["message"]
    config = job_config(path, tmp_path / "out.jsonl", template="{shop} {sol}")
    with pytest.raises(JobError, match="job.template names 'sol', but .* has shop, sold"):
        run_job(config, mode=mode_for(config))


def test_a_template_is_not_for_requests_that_say_what_they_ask(tmp_path):
    request = {"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "x"}}
    (tmp_path / "in.jsonl").write_text(json.dumps(request) + "\n")
    config = job_config(tmp_path / "in.jsonl", tmp_path / "out.jsonl", template="{body}")
    with pytest.raises(JobError, match="job.template is for rows of our own form"):
        run_job(config, mode=mode_for(config))


def test_bad_rows_of_csv_are_named_by_their_line(tmp_path):
    data = b"id,prompt\n"
    data += b'a,"two\nlines"\nb\nc,x,y\nd,\xff\n"e"x,y\n,no id\ng,\n\nh,end\n"i,open'
    (tmp_path / "in.csv").write_bytes(data)
    output, _ = run_job(job_config(tmp_path / "in.csv", tmp_path / "out.jsonl"))
    rows = json_rows(output.read_text())
    found = [
        row.get("text") or (row["error"]["line"], row["error"]["message"][:25]) for row in rows
    ]
    assert found == [
        "two\nlines",
        (4, "the row has 1 cells: want"),
        (5, "the row has 3 cells: want"),
        (6, "the row is not valid UTF-"),
        (7, "the row is not valid CSV:"),
        "no id",
        (9, "the row has none of promp"),
        "end",
        (12, "the row is not valid CSV:"),
    ]
    assert rows[5]["id"] == "8"


def test_cells_and_kept_values_may_be_nested_only_so_far(tmp_path):
    deep = "[" * 129 + "]" * 129
    (tmp_path / "in.csv").write_text(
        f'id,messages\na,{deep}\nb,"[{{""role"": ""user"", ""content"": ""x""}}]"\n'
    )
    output, tally = run_job(job_config(tmp_path / "in.csv", tmp_path / "out.jsonl"))
    first, second = map(json.loads, output.read_text().splitlines())
    assert tally.errors == 1 and "more than 128" in first["error"]["message"]
    assert second["text"] == "u:x;"
    line = '{"id": "%s", "prompt": "x", "note": %s}\n'
    (tmp_path / "in.jsonl").write_text(line % ("a", deep[1:-1]) + line % ("b", deep[2:-2]))
    config = job_config(tmp_path / "in.jsonl", tmp_path / "kept.jsonl", keep="note")
    output, tally = run_job(config)
    first, second = map(json.loads, output.read_text().splitlines())
    assert tally.errors == 1 and "more than 128" in first["error"]["message"]
    assert json.dumps(second["note"]) == deep[2:-2]


def test_kept_values_that_json_cannot_hold_become_what_it_can(tmp_path):
    rows = [{"prompt": "x", "when": pandas.Timestamp("2024-05-06"), "size": float("nan")}]
    pandas.DataFrame(rows).to_parquet(tmp_path / "in.parquet")
    keep = {"keep": "when,size"}
    output, _ = run_job(job_config(tmp_path / "in.parquet", tmp_path / "out.jsonl", **keep))
    row = json_rows(output.read_text())[0]
    assert row["when"].startswith("2024-05-06") and row.get("size") is None
    (tmp_path / "in.jsonl").write_text('{"prompt": "x", "when": "\\ud800", "size": [1, NaN]}\n')
    output, _ = run_job(job_config(tmp_path / "in.jsonl", tmp_path / "out.jsonl", **keep))
    assert json_rows(output.read_text())[0]["size"] == [1, None]


def test_parquet_columns_whose_types_do_not_go_together_are_texts(tmp_path):
    rows = [{"id": 1, "prompt": "x", "tag": [1]}, {"id": "b", "prompt": "y", "tag": {"a": {}}}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = job_config(tmp_path / "in.jsonl", tmp_path / "out.parquet", keep="tag")
    output, _ = run_job(config)
    table = pyarrow.parquet.read_table(output).to_pylist()
    assert [(row["id"], row["tag"]) for row in table] == [("1", "[1]"), ("b", '{"a": {}}')]


def test_an_empty_input_gives_a_readable_file_of_no_rows(tmp_path):
    (tmp_path / "in.jsonl").write_text("")
    for name in ("out.parquet", "out.csv", "out.jsonl.gz"):
        output, tally = run_job(job_config(tmp_path / "in.jsonl", tmp_path / name))
        assert tally.rows == 0 and output.exists()
    assert pyarrow.parquet.read_table(tmp_path / "out.parquet").num_rows == 0


@pytest.mark.parametrize(
    ("name", "content", "job", "says"),
    [
        ("in.csv", b"question,label\nx,y\n", {}, "columns question, label, and none of prompt"),
        ("in.csv", b"shop\nx\n", {}, "or --config.job.template='... {shop} ...'"),
        ("in.csv", b"a,a\n1,2\n", {}, "each once"),
        ("in.csv", b"", {}, "want a first line of names"),
        ("in.csv", b"a,b\n", {"columns": "prompt=c"}, "job.columns names 'c', but .* has a, b"),
        ("in.csv", b"prompt\n", {"keep": "c"}, "job.keep names 'c'"),
        ("in.jsonl", b"", {"columns": "prompt="}, "want names as in"),
        ("in.jsonl", b"", {"keep": "a=b,a=c"}, "'a' is there twice"),
        ("in.parquet", b"PAR1", {}, "can't be read as Parquet"),
        ("in.jsonl.gz", b"no gzip", {}, "can't be read on"),
        ("in.jsonl.zst", b"no zstd", {}, "can't be read on"),
        ("in.jsonl", b"", {"input": "none-*.jsonl"}, "'none-.*' matches no file"),
    ],
)
def test_files_that_cannot_be_used_are_named_at_once(tmp_path, name, content, job, says):
    (tmp_path / name).write_bytes(content)
    source = job.pop("input", tmp_path / name)
    with pytest.raises(JobError, match=says):
        run_job(job_config(source, tmp_path / "out.jsonl", **job))
    assert not list(tmp_path.glob("out*"))


def test_an_archive_that_ends_early_ends_the_job_with_its_rows_kept(tmp_path):
    lines = "".join(f'{{"prompt": "{i * 7919 % 104729:06}"}}\n' for i in range(20_000))
    packed = gzip.compress(lines.encode())
    (tmp_path / "in.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(JobError, match="in.jsonl.gz' can't be read on: Compressed file ended"):
        run_job(job_config(tmp_path / "in.jsonl.gz", tmp_path / "out.jsonl"))
    assert not (tmp_path / "out.jsonl").exists()


def test_a_kept_column_may_not_hide_a_field_of_the_answer(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "x", "text": "y"}\n')
    with pytest.raises(JobError, match="--config.job.keep=input_text=text"):
        run_job(job_config(tmp_path / "in.jsonl", tmp_path / "out.jsonl", keep="text"))
    config = job_config(tmp_path / "in.jsonl", tmp_path / "out.jsonl", keep="input_text=text")
    assert json_rows(run_job(config)[0].read_text())[0]["input_text"] == "y"


def test_a_kept_column_is_still_read(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"id": 7, "prompt": "x"}\n')
    config = job_config(tmp_path / "in.jsonl", tmp_path / "out.jsonl", keep="key=id,prompt")
    (row,) = json_rows(run_job(config)[0].read_text())
    assert (row["id"], row["key"], row["prompt"], row["text"]) == (7, 7, "x", "x")


def test_columns_of_a_table_that_the_mode_does_not_read_may_hold_anything(tmp_path):
    (tmp_path / "in.csv").write_text("prompt,choices,labels\nx,yes or no,good\n")
    output, tally = run_job(job_config(tmp_path / "in.csv", tmp_path / "out.jsonl"))
    assert tally.errors == 0 and json_rows(output.read_text())[0]["text"] == "x"


def test_an_input_by_another_path_is_not_overwritten(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_text(LINES)
    for names in [("./in.jsonl", "in.jsonl"), ("in.jsonl", str(tmp_path / "in.jsonl"))]:
        with pytest.raises(JobError, match="is the input: give another file"):
            run_job(job_config(*names))
    assert (tmp_path / "in.jsonl").read_text() == LINES


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet", "out.csv.gz"])
def test_urls_are_read_and_written(tmp_path, name):
    store = fsspec.filesystem("memory")
    store.pipe_file("/bucket/in/a.jsonl", LINES.encode())
    (tmp_path / "in.jsonl").write_text(LINES)
    here, _ = run_job(job_config(tmp_path / "in.jsonl", tmp_path / name))
    run_job(job_config("memory://bucket/in/*.jsonl", f"memory://bucket/{name}"))
    assert store.cat_file(f"/bucket/{name}") == here.read_bytes()
    left = store.find("/bucket")
    assert sorted(left) == ["/bucket/in/a.jsonl", f"/bucket/{name}"]
    store.rm("/bucket", recursive=True)


def test_a_missing_package_is_named_with_the_command_that_brings_it(tmp_path, monkeypatch):
    def missing(module):
        raise ImportError(module)

    monkeypatch.setattr(places.importlib, "import_module", missing)
    (tmp_path / "in.jsonl").write_text(LINES)
    for name, package in [("o.parquet", "pyarrow"), ("o.jsonl.zst", "zstandard")]:
        with pytest.raises(JobError, match=f"needs {package}: pip install {package}"):
            run_job(job_config(tmp_path / "in.jsonl", tmp_path / name))
    with pytest.raises(JobError, match="needs fsspec: pip install fsspec"):
        run_job(job_config("s3://bucket/in.jsonl", tmp_path / "out.jsonl"))


def test_a_store_whose_package_is_missing_is_named(tmp_path):
    with pytest.raises(JobError, match="pip install gcsfs, s3:// pip install s3fs"):
        run_job(job_config("nothing://bucket/in.jsonl", tmp_path / "out.jsonl"))
