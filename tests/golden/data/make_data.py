"""Writes rows.parquet, as pyarrow does, and rows.jsonl, what must be read from it.

    pip install pyarrow==26.0.1
    python make_data.py
"""

import datetime
import decimal
import json
import pathlib

import pyarrow as pa
import pyarrow.parquet as pq

HERE = pathlib.Path(__file__).parent

TURN = pa.struct([("role", pa.string()), ("content", pa.string())])
COLUMNS = {
    "id": pa.uint16(),
    "text": pa.large_string(),
    "messages": pa.list_(TURN),
    "input_ids": pa.list_(pa.list_(pa.int32())),
    "options": pa.map_(pa.string(), pa.float32()),
    "source": pa.struct([("name", pa.string()), ("tags", pa.list_(pa.string()))]),
    "at": pa.timestamp("us", tz="UTC"),
    "day": pa.date32(),
    "price": pa.decimal128(10, 2),
    "image": pa.binary(),
    "score": pa.float64(),
    "nothing": pa.null(),
}

ROWS = [
    {
        "id": 1,
        "text": "é",
        "messages": [
            {"role": "user", "content": "a\nb"},
            {"role": "assistant", "content": None},
        ],
        "input_ids": [[1, 2], [], None, [3]],
        "options": [("k", 0.1), ("l", None)],
        "source": {"name": "x", "tags": ["a", None]},
        "at": datetime.datetime(2024, 2, 29, 1, 2, 3, 4, datetime.timezone.utc),
        "day": datetime.date(1969, 12, 31),
        "price": decimal.Decimal("-0.05"),
        "image": b"\xff\x00",
        "score": 0.25,
        "nothing": None,
    },
    {name: None for name in COLUMNS},
    {
        "id": 65535,
        "text": "",
        "messages": [],
        "input_ids": [],
        "options": [],
        "source": {"name": None, "tags": []},
        "at": datetime.datetime(1969, 12, 31, 23, 59, 59, 0, datetime.timezone.utc),
        "day": datetime.date(2024, 2, 29),
        "price": decimal.Decimal("12345678.90"),
        "image": b"text",
        "score": float("nan"),
        "nothing": None,
    },
]


def as_json(name: str, value):
    """What JSON has of a value."""
    if value is None:
        return None
    if name == "options":
        return dict(value)
    if name == "image":
        return value.decode() if value.isascii() else None
    if name == "score" and value != value:
        return None
    if isinstance(value, datetime.datetime):
        return value.replace(tzinfo=None).isoformat()
    if isinstance(value, datetime.date):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return str(value)
    return value


def main() -> None:
    schema = pa.schema(list(COLUMNS.items()))
    table = pa.Table.from_pylist(ROWS, schema=schema)
    # Without the Arrow schema and the statistics, which nobody reads here, the file is small.
    pq.write_table(
        table,
        HERE / "rows.parquet",
        compression="zstd",
        data_page_version="2.0",
        row_group_size=2,
        write_statistics=False,
        store_schema=False,
    )
    with open(HERE / "rows.jsonl", "w", encoding="utf-8") as out:
        for row in ROWS:
            row = {name: as_json(name, value) for name, value in row.items()}
            out.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
