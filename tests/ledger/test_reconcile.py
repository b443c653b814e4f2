"""Reconciliation's arithmetic, and how rows are shown."""

from __future__ import annotations

import json

from gateway.ledger.reconcile import Reading, Tokens, compare, engine_tokens
from gateway.ledger.report import render

VLLM = """\
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{engine="0",model_name="a b"} 100.0
vllm:prompt_tokens_total{engine="1",model_name="a b"} 11.0
vllm:generation_tokens_total{engine="0",model_name="a b"} 1.5e+03
vllm:prompt_tokens_total_other 7
"""
LLAMACPP = "llamacpp:prompt_tokens_total 42\nllamacpp:tokens_predicted_total 17 1700000000000\n"


def test_engine_counters() -> None:
    assert engine_tokens(VLLM) == Tokens(111, 1500)
    assert engine_tokens(LLAMACPP) == Tokens(42, 17)
    assert engine_tokens("ollama_something 3\n") is None


def test_compare() -> None:
    before = Reading(0.0, 0, {"one": Tokens(10, 5)}, {"one": Tokens(1000, 500), "again": Tokens(50, 50)})
    now = Reading(
        9.0,
        0,
        {"one": Tokens(110, 55), "again": Tokens(1, 1), "new": Tokens(1, 2), "away": Tokens(3, 4)},
        {"one": Tokens(1103, 550), "again": Tokens(5, 5), "new": Tokens(1, 2)},
    )
    rows = {row["upstream"]: row for row in compare(before, now, {"away": "no answer"})}
    assert (rows["one"]["input_difference"], rows["one"]["output_difference"], rows["one"]["note"]) == (-3, 0, "")
    assert "restarted" in rows["again"]["note"]
    assert rows["again"]["input_difference"] is None
    assert rows["new"]["note"] == "the engine was not read before"
    assert rows["away"]["note"] == "no answer"
    assert (rows["away"]["ledger_input_tokens"], rows["away"]["ledger_output_tokens"]) == (3, 4)


def test_shown() -> None:
    rows = [{"model": "a,b", "requests": 10, "cost": None}, {"model": "c", "requests": 2, "cost": 0.5}]
    assert render(rows, "table") == (
        "model  requests      cost\na,b          10         -\nc             2  0.500000\n"
    )
    assert render(rows, "csv") == 'model,requests,cost\r\n"a,b",10,\r\nc,2,0.5\r\n'
    assert [json.loads(line) for line in render(rows, "jsonl").splitlines()] == rows
    assert "nothing" in render([], "table")
