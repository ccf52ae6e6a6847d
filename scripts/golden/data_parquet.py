#!/usr/bin/env python3
"""Writes tests/golden/data/rows.parquet and rows.jsonl: the same conversations with tools, as pyarrow writes a table
of them (a column for each key that any message has, null where one has not) and as JSON lines.

    python3 scripts/golden/data_parquet.py
"""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

OUT = Path(__file__).resolve().parents[2] / "tests/golden/data"


def call(city, days):
    return {"type": "function", "function": {"name": "weather", "arguments": {"city": city, "days": days}}}


def row(number):
    messages = [{"role": "user", "content": f"Wie ist das Wetter in Köln {number}? 🦙"}]
    if number % 3 == 0:
        messages.append({"role": "assistant", "content": "", "tool_calls": [call("Köln", number)]})
        messages.append({"role": "tool", "content": "21.5"})
    messages.append({"role": "assistant", "content": f"Sonnig, {number} °C.\n", "train": number % 4 != 1})
    messages += [{"role": "user", "content": "Danke"}, {"role": "assistant", "content": "Gern."}]
    tools = [{"name": "weather", "score": 0.25, "big": 2**53 + 1}] if number % 2 else None
    return {"id": number, "messages": messages} | ({"tools": tools} if tools else {})


rows = [row(number) for number in range(40)]
with open(OUT / "rows.jsonl", "w", newline="\n") as file:
    for line in rows:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
# pyarrow takes the columns of the first row.
table = pa.Table.from_pylist([{"tools": None} | line for line in rows])
pq.write_table(table, OUT / "rows.parquet", compression="snappy", row_group_size=17)
