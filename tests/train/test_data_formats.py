import gzip
import json

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from train.data import DataError, read_records
from train.data.formats import where_of

ROWS = [
    {"prompt": "1+1=", "chosen": "2", "rejected": "3"},
    {"prompt": "Grüße \u2028 é", "chosen": "ja", "rejected": "nein"},
]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)


def write(path, text):
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize(
    ("name", "text", "place"),
    [
        ("a.jsonl", LINES, "a.jsonl line 2"),
        ("a.jsonl", "\ufeff" + LINES.replace("\n", "\r\n\r\n") + "\r\n", "a.jsonl line 3"),
        ("a.jsonl.gz", LINES + "\n", "a.jsonl.gz line 2"),
        ("a.json", json.dumps(ROWS), "a.json record 2"),
        ("a.json.gz", json.dumps(ROWS), "a.json.gz record 2"),
    ],
)
def test_json_files(name, text, place, tmp_path):
    records = read_records(write(tmp_path / name, text))
    assert records == ROWS
    assert where_of(records[1]) == place


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    rows = [{"messages": [{"role": "user", "content": "a"}]}, {"messages": None}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    records = read_records(path)
    assert records == rows
    assert where_of(records[1]) == "a.parquet row 2"


def test_hub_names_go_through_datasets(monkeypatch):
    def load_dataset(name, configuration, split):
        assert (name, configuration, split) == ("someone/pairs", None, "train_prefs")
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    records = read_records("someone/pairs", "train_prefs")
    assert records == ROWS
    assert where_of(records[0]) == "someone/pairs [train_prefs] row 1"


def test_a_configuration_follows_the_hub_name(monkeypatch):
    def load_dataset(name, configuration, split):
        assert (name, configuration, split) == ("openai/gsm8k", "main", "test")
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_records("openai/gsm8k:main", "test") == ROWS


def test_hub_trouble_is_explained(monkeypatch):
    def load_dataset(name, configuration, split):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        DataError, match=r"'someone/pairs', split 'train': ConnectionError: no route"
    ):
        read_records("someone/pairs")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", LINES + '\n{"prompt": "x', r"a\.jsonl line 3: not valid JSON \(Unterminated"),
        ("a.jsonl", LINES + "\n[1]", r"a\.jsonl line 3: expected a JSON object, found list"),
        ("a.json", LINES, r"a\.json: holds more than one JSON value.*name it \.jsonl"),
        ("a.json", '{"a": 1}', r"a\.json: expected one JSON list of objects, found dict"),
        ("a.json", '[{"a": 1}, 2]', r"a\.json record 2: expected a JSON object, found int"),
        ("a.json", "[{]", r"a\.json: not valid JSON"),
        ("a.jsonl", "\n \n", r"a\.jsonl holds no records"),
        ("a.json", "[]", r"a\.json holds no records"),
        ("a.csv", "a,b", r"cannot tell the format from the name.*\.jsonl\.gz, \.parquet"),
    ],
)
def test_broken_files_are_explained(name, text, message, tmp_path):
    with pytest.raises(DataError, match=message):
        read_records(write(tmp_path / name, text))


def test_damaged_bytes_are_explained(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(LINES.encode())[:-9])
    with pytest.raises(DataError, match="not an intact gzip file"):
        read_records(path)
    path.write_text(LINES)
    with pytest.raises(DataError, match="not an intact gzip file"):
        read_records(path)
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINES.encode("latin-1", "replace"))
    with pytest.raises(DataError, match=r"a\.jsonl line 2: not valid UTF-8"):
        read_records(path)
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="not an intact parquet file"):
        read_records(path)


def test_missing_file_is_not_taken_for_a_hub_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"pairs\.jsonl does not exist"):
        read_records(tmp_path / "pairs.jsonl")
