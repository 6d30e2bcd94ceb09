"""Local tables: what is read from them, and what is said of those that can't be read."""

import argparse
import io
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import apet


def load(task, **options):
    options = {
        "text_fields": None,
        "label_field": None,
        "train_size": None,
        "eval_size": None,
        "load": None,
        "method": ["apet"],
    } | options
    return apet.load_task(argparse.Namespace(task=str(task), **options))


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def rows_with(labels):
    """40 rows whose labels these are, in turn."""
    return [{"text": f"text {i}", "label": labels[i % len(labels)]} for i in range(40)]


def everything(data):
    return [*data.train, *data.select, *data.report]


def refused(task, *said, **options):
    with pytest.raises(apet.UserError) as error:
        load(task, **options)
    for part in said:
        assert part in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_a_json_array_is_read_in_files_and_in_folders(tmp_path, kind, indent):
    file = tmp_path / f"train.{kind}"
    file.write_text(json.dumps(rows_with(["good", "bad"]), indent=indent))
    (tmp_path / "test.json").write_text(json.dumps([{"text": "new", "label": "bad"}]))
    assert load(file).words == ("bad", "good") and len(everything(load(file))) == 40
    data = load(tmp_path)
    assert [e.target for e in data.report] == ["bad"] and len(data.train) + len(data.select) == 40


def test_json_lines_and_the_toy_tasks_need_no_other_package(tmp_path):
    (tmp_path / "a.json").write_text(lines(rows_with(["good", "bad"])))
    code = f"""
import sys
for name in ("datasets", "pyarrow", "pandas"):
    sys.modules[name] = None
sys.path.insert(0, {str(ROOT)!r})
import apet
for task in ("toy-sentiment", "toy-qa", sys.argv[1]):
    print(len(apet.load_task(apet.parser().parse_args(["--task", task])).report))
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.json")], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.split()[-1] == "4", done.stderr


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_nan_is_no_label_and_no_text(tmp_path, kind):
    rows = [{"text": f"text {i}", "label": (0.0, 1.0, float("nan"))[i % 3]} for i in range(60)]
    file = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pa = pytest.importorskip("pyarrow")
        __import__("pyarrow.parquet")
        pa.parquet.write_table(pa.Table.from_pylist(rows), file)
    else:
        file.write_text(lines(rows) if kind == "jsonl" else json.dumps(rows))
    data = load(file)
    assert data.words == ("0", "1") and data.about["rows without text or label, dropped"] == {"train": 20}
    (tmp_path / "b.jsonl").write_text(lines([*rows_with(["x", "y"]), {"text": float("nan"), "label": "x"}]))
    assert load(tmp_path / "b.jsonl").about["rows without text or label, dropped"] == {"train": 1}


def test_one_number_is_one_label_however_it_is_written(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(lines(rows_with([0, "0", 1, "1", True, 1.0, False, "0.0", " 1 "])))
    data = load(file)
    assert data.words == ("0", "1") and {e.label for e in everything(data)} == {0, 1}
    expected = {f"text {i}": (0, 0, 1, 1, 1, 1, 0, 0, 1)[i % 9] for i in range(40)}
    assert {e.source: e.label for e in everything(data)} == expected


def test_columns_are_those_named_whatever_the_first_row_holds(tmp_path):
    rows = [{"title": f"title {i}", "text": f"text {i}", "label": "xy"[i % 2]} for i in range(40)]
    rows[0]["text"] = None
    del rows[1]["title"]
    rows[7]["note"] = "seldom there, so no row is dropped for the lack of it"
    (tmp_path / "a.jsonl").write_text(lines(rows))
    data = load(tmp_path / "a.jsonl", text_fields="title,text")
    assert data.about["rows without text or label, dropped"] == {"train": 2}
    assert all(e.source.startswith("title: title ") and " text: text " in e.source for e in everything(data))


def test_two_columns_of_one_name_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("text,label,text\n" + "one,good,two\nthree,bad,four\n" * 20)
    refused(tmp_path / "a.csv", "none twice; not text, label, text")
    pa = pytest.importorskip("pyarrow")
    __import__("pyarrow.parquet")
    pa.parquet.write_table(pa.table([["a"] * 20, ["b"] * 20, ["x", "y"] * 10], names=["t", "t", "label"]), tmp_path / "a.parquet")
    refused(tmp_path / "a.parquet", "none twice; not t, t, label")


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
@pytest.mark.parametrize("values", [[0.0, 2.5, 3.8, 5.0], [i / 7 for i in range(40)]])
def test_a_column_of_real_numbers_is_regression_which_is_no_task(tmp_path, kind, values):
    rows = rows_with(values)
    text = lines(rows) if kind == "jsonl" else "text,label\n" + "".join(f"{r['text']},{r['label']}\n" for r in rows)
    (tmp_path / f"a.{kind}").write_text(text)
    refused(tmp_path / f"a.{kind}", "the column 'label' holds real numbers: regression is not a task here")


def test_a_column_with_a_word_in_it_holds_no_real_numbers(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines(rows_with(["v1.5", "2.0"])))
    assert load(tmp_path / "a.jsonl").words == ("2", "v1.5")


def test_a_pipe_or_a_device_is_no_data_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    refused(tmp_path / "pipe.jsonl", "must be a file of type")
    refused("/dev/zero", "must be a file of type")


@pytest.mark.parametrize("column", ["text", "label"])
def test_half_a_surrogate_pair_is_one_line(tmp_path, column):
    rows = rows_with(["good", "bad"])
    rows[4][column] = "half \ud83d of it"
    (tmp_path / "a.jsonl").write_text(lines(rows))
    refused(tmp_path / "a.jsonl", column, "must be text that UTF-8 can hold")
    rows[4][column] = "whole \U0001f600"
    (tmp_path / "a.jsonl").write_text(lines([rows[4], *rows * 2]))
    assert load(tmp_path / "a.jsonl")


def test_a_column_name_with_half_a_surrogate_pair_is_one_line(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines([{"a": "x", "\ud83d": f"text {i}", "label": i % 2} for i in range(40)]))
    refused(tmp_path / "a.jsonl", "has no column 'text'; there are a, \ud83d, label")


def test_a_csv_that_is_not_utf_8_or_has_semicolons_says_what_to_do(tmp_path):
    text = "text,label\n" + "caf\xe9,good\nbar,bad\n" * 20
    for encoding in ("latin-1", "utf-16"):
        (tmp_path / "a.csv").write_bytes(text.encode(encoding))
        refused(tmp_path / "a.csv", "it must be UTF-8", "CSV UTF-8", "iconv")
    (tmp_path / "b.csv").write_text("text;label\n" + "one, two;good\nthree;bad\n" * 20)
    refused(tmp_path / "b.csv", "separated by commas", "not text;label")


def test_an_open_quote_swallows_no_rows(tmp_path):
    (tmp_path / "a.csv").write_text('text,label\n"one,good\n' + "two,bad\nthree,good\n" * 20)
    refused(tmp_path / "a.csv", "can't read", "unexpected end of data")


def test_a_text_may_hold_separators_line_ends_and_more_characters_than_csv_allows_at_first(tmp_path):
    long = "word " * 60_000
    text = "text,label\n" + f'"one, ""two""\nthree",good\n{long},bad\n' * 20
    (tmp_path / "a.csv").write_text(text)
    assert {e.source for e in everything(load(tmp_path / "a.csv"))} == {'one, "two"\nthree', long}


def test_the_words_none_and_na_are_texts_and_labels(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\n" + "None,None\nN/A,favor\nnull,against\n" * 20)
    data = load(tmp_path / "a.csv")
    assert data.words == ("None", "against", "favor") and {e.source for e in everything(data)} == {"None", "N/A", "null"}
    assert "rows without text or label, dropped" not in data.about


def test_a_cell_that_is_neither_text_nor_number_is_named(tmp_path):
    rows = rows_with([{"text": ["a"], "start": [3]}])
    (tmp_path / "a.jsonl").write_text(lines(rows))
    refused(tmp_path / "a.jsonl", "the column 'label' must be text", "type is dict")
    (tmp_path / "b.jsonl").write_text(lines([{"text": ["a", "b"], "label": i % 2} for i in range(40)]))
    refused(tmp_path / "b.jsonl", "row 1: text must be text", "type is list", text_fields="text")


def test_a_folder_of_which_one_split_lacks_the_label_says_so_by_its_row(tmp_path):
    (tmp_path / "train.jsonl").write_text(lines(rows_with(["good", "bad"])))
    (tmp_path / "test.jsonl").write_text(lines([{"text": "x", "label": "good"}, {"text": "y"}]))
    assert load(tmp_path).about["rows without text or label, dropped"] == {"test": 1}


# Whatever the bytes are -----------------------------------------------------------------------------------------------

CELL = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.text(max_size=3), max_size=2)
ROWS = st.lists(st.dictionaries(st.sampled_from(["text", "label", "a"]) | st.text(max_size=3), CELL, max_size=3), max_size=14)


def parquet(rows):
    pa = pytest.importorskip("pyarrow")
    __import__("pyarrow.parquet")
    out = io.BytesIO()
    pa.parquet.write_table(pa.table({"text": [str(row) for row in rows], "label": list(range(len(rows)))}), out)
    return out.getvalue()


def changed(content: bytes, changes: list[tuple[int, int]]) -> bytes:
    content = bytearray(content)
    for place, byte in changes:
        if content:
            content[place % len(content)] = byte
    return bytes(content)


CHANGES = st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), max_size=3)
TABLES = st.builds(changed, ROWS.map(lines).map(str.encode) | ROWS.map(json.dumps).map(str.encode), CHANGES)
CSV = st.lists(st.lists(st.text(alphabet='ab1.",;\t\n\r\0-\ud800é', max_size=4), min_size=2, max_size=3), max_size=14).map(
    lambda table: "\n".join(",".join(row) for row in [["text", "label"], *table]).encode("utf-8", "surrogatepass")
)


@pytest.mark.parametrize("kind", apet.FILE_TYPES)
def test_whatever_a_file_holds_it_is_read_or_a_user_error(tmp_path, kind):
    made = {".csv": CSV, ".tsv": CSV.map(lambda b: b.replace(b",", b"\t"))}.get(kind, TABLES)
    made = st.builds(changed, ROWS.map(parquet), CHANGES) if kind == ".parquet" else made

    @settings(max_examples=100, deadline=None, database=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(content=st.binary(max_size=200) | made, label=st.none() | st.sampled_from(["label", "a"]))
    def check(content, label):
        (tmp_path / f"a{kind}").write_bytes(content)
        try:
            data = load(tmp_path / f"a{kind}", label_field=label)
        except apet.UserError:
            return
        json.dumps(data.about)
        for e in everything(data):
            (e.source + e.target + "".join(e.answers)).encode()

    check()
