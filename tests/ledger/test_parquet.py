"""`llm-gateway usage --format parquet`, as a process, read back by pyarrow: the columns, their types, their sums."""

from __future__ import annotations

import asyncio
import io
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow
import pyarrow.parquet

from tests.ledger.books import exchange, finished, journal

AT = datetime.now(UTC) - timedelta(days=2)


async def written(folder: Path, by: str) -> pyarrow.Table:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gateway", "usage", "--by", by, "--since", "7d", "--format", "parquet"),
        *("--data-dir", str(folder), "--store", "off"),
        stdout=asyncio.subprocess.PIPE,
        cwd=folder,
    )
    out, _ = await process.communicate()
    assert process.returncode == 0
    return pyarrow.parquet.read_table(io.BytesIO(out))


async def test_what_is_written_can_be_read(tmp_path: Path) -> None:
    async with journal(tmp_path / "journal") as one:
        for number in range(5):
            running = exchange(number, key="k" if number < 3 else "l", began_unix_s=AT.timestamp())
            one.open(running)
            one.post(finished(running, 100, 10))
        unpriced = exchange(9, key="l", began_unix_s=AT.timestamp())
        record = finished(unpriced)
        one.post(type(record)(**{**{name: getattr(record, name) for name in record.__struct_fields__}, "cost": None}))
    table = await written(tmp_path, "key,hour,day")
    types = {field.name: str(field.type) for field in table.schema}
    assert types["key"] == "string"
    assert (types["hour"], types["day"]) == ("timestamp[ms, tz=UTC]", "date32[day]")
    assert {types[name] for name in ("requests", "partial", "input_tokens", "output_tokens", "unpriced")} == {"int64"}
    assert (types["cost"], types["upstream_s"]) == ("double", "double")
    rows = table.to_pylist()
    assert [(row["key"], row["requests"], row["input_tokens"], row["unpriced"]) for row in rows] == [
        ("k", 3, 300, 0),
        ("l", 3, 300, 1),
    ]
    assert rows[0]["hour"] == AT.replace(minute=0, second=0, microsecond=0)
    assert rows[0]["day"] == AT.date()
    assert rows[0]["cost"] == 3 * (100 * 2.0 + 10 * 8.0) / 1e6


async def test_no_rows_have_columns_too(tmp_path: Path) -> None:
    table = await written(tmp_path, "model")
    assert table.num_rows == 0
    assert {"model", "requests", "cost"} < set(table.column_names)
