"""`llm-gateway sim replay`: loads, the fleet on its virtual clock, figures, the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from gateway.cli import main
from gateway.routing.policies import DEFAULT, POLICIES
from gateway.routing.prefix import Prompt
from gateway.sim.replay import study
from gateway.sim.replay.fleet import Hardware, run
from gateway.sim.replay.loads import SYNTHETIC, Arrival, BadTrace, faster, read_trace, synthetic


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """40 talks of 5 turns, an arrival each second; all share the first block."""
    lines = []
    for turn in range(5):
        for talk in range(40):
            ids = [0, *(1000 * (talk + 1) + n for n in range(4 * (turn + 1)))]
            at = 1000 * (40 * turn + talk)
            lines.append({"timestamp": at, "input_length": 512 * len(ids) + 9, "output_length": 20, "hash_ids": ids})
    return write(tmp_path / "trace.jsonl", lines)


def replay(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["sim", "replay", *arguments, "--json"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def test_a_trace_is_read_and_spread_over_its_buckets(tmp_path: Path) -> None:
    one = {"timestamp": 3000, "input_length": 1100, "output_length": 7, "hash_ids": [0, 5, 6]}
    path = write(tmp_path / "trace", [one] * 200)
    arrivals = read_trace(path, 1)
    assert {(one.prompt.tokens, tuple(one.prompt.hashes), one.output_tokens) for one in arrivals} == {(1100, (0, 5), 7)}
    assert 3.0 <= arrivals[0].at < 3.2
    assert 5.8 < arrivals[-1].at < 6.0
    assert [one.at for one in arrivals] == sorted(one.at for one in arrivals)
    assert [one.at for one in read_trace(path, 1)] == [one.at for one in arrivals]
    assert [one.at for one in read_trace(path, 2)] != [one.at for one in arrivals]
    assert len(read_trace(path, 1, 10)) == 10


@pytest.mark.parametrize("text", ["", "\n", "{}\n", '{"timestamp": 1}\n', "nonsense\n"])
def test_a_trace_that_is_none_is_refused_by_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "bad").write_text(text)
    with pytest.raises(BadTrace, match="bad"):
        read_trace(tmp_path / "bad", 0)
    assert main(["sim", "replay", str(tmp_path / "bad")]) == 2
    assert main(["sim", "replay", str(tmp_path / "missing")]) == 2
    assert main(["sim", "replay", "synthetic:nothing"]) == 2


@pytest.mark.parametrize("name", SYNTHETIC)
def test_made_loads_come_at_their_rate_and_are_the_same_for_the_same_seed(name: str) -> None:
    one, same, other = (synthetic(name, seed, 2000, 8, rate=4.0) for seed in (1, 1, 2))
    assert len(one) == 2000
    assert study.rate_of(one) == pytest.approx(4.0, rel=0.25)
    assert [each.at for each in one] == [each.at for each in same] != [each.at for each in other]
    assert [each.prompt.hashes for each in one] == [each.prompt.hashes for each in same]
    shared = len({each.prompt.hashes[0] for each in one if each.prompt.hashes})
    assert shared == (1 if name == "shared" else shared)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_request_is_answered_under_every_policy(policy: str) -> None:
    arrivals = synthetic("talks", 3, 300, 4)
    result = run(arrivals, POLICIES[policy], 4, Hardware())
    assert len(result.ttft_s) == 300
    assert min(result.ttft_s) > 0
    assert sum(result.shares) == 300
    assert result.prompt_tokens == sum(one.prompt.tokens for one in arrivals)
    assert 0 < result.cached_tokens < result.prompt_tokens


def test_one_request_takes_what_an_idle_engine_takes() -> None:
    arrival = Arrival(5.0, Prompt([1, 2], range(512, 5000, 512), 1200), 10)
    result = run([arrival], POLICIES[DEFAULT], 2, Hardware(rate=1000.0))
    assert result.ttft_s == [pytest.approx(1.2, abs=0.01)]
    assert sorted(result.shares) == [0, 1]


def test_what_no_engine_can_hold_is_refused_and_counted() -> None:
    arrivals = [Arrival(0.0, Prompt([], (), 5000), 10), Arrival(0.0, Prompt([], (), 100), 10)]
    result = run(arrivals, POLICIES[DEFAULT], 2, Hardware(cache_tokens=4096))
    assert (result.refused, len(result.ttft_s)) == (1, 1)


def test_the_belief_is_about_right_and_feedback_mends_a_wrong_size() -> None:
    arrivals = synthetic("talks", 3, 1500, 4, rate=2.0)
    hardware = Hardware(cache_tokens=150_000)
    wrong = {}
    for feedback in (False, True):
        result = run(arrivals, POLICIES[DEFAULT], 4, hardware, index_tokens=1_000_000, feedback=feedback)
        wrong[feedback] = (result.believed_tokens - result.cached_tokens) / result.prompt_tokens
    assert wrong[False] > 0.1
    assert abs(wrong[True]) < wrong[False] / 2


def test_the_default_is_better_than_taking_turns(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = replay(capsys, str(trace), "--policy", "all", "--engines", "4", "--prefill-rate", "4000")
    policies = document["policies"]
    assert list(policies) == list(POLICIES)
    assert [name for name, one in policies.items() if one.get("default")] == [DEFAULT]
    for one in policies.values():
        assert one["requests"] == 200
        assert 0 < one["ttft_p50_s"] <= one["ttft_p90_s"] <= one["ttft_p99_s"]
        assert one["share_max_over_mean"] >= 1
        assert one["knee_rate"] >= 0
        assert one["sweep"]
    default, turns = policies[DEFAULT], policies["round_robin"]
    assert default["ttft_mean_s"] < 0.6 * turns["ttft_mean_s"]
    assert default["hit_rate"] > turns["hit_rate"] + 0.2
    assert default["knee_rate"] >= turns["knee_rate"]
    assert default["ttft_predicted_mean_s"] == pytest.approx(default["ttft_mean_s"], rel=0.2)


def test_the_same_seed_gives_the_same_figures(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, again, other = (
        replay(capsys, str(trace), "--seed", seed, "--sweep", "0")["policies"] for seed in ("1", "1", "2")
    )
    assert first == again != other
    several = replay(capsys, str(trace), "--seed", "1", "--seeds", "2", "--sweep", "0")["policies"][DEFAULT]
    means = (first[DEFAULT]["ttft_mean_s"] + other[DEFAULT]["ttft_mean_s"]) / 2
    assert several["ttft_mean_s"] == pytest.approx(means, rel=1e-3)


def test_the_table_is_for_people(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sim", "replay", str(trace), "--policy", "sticky,round_robin", "--sweep", "0"]) == 0
    text = capsys.readouterr().out
    assert "200 requests" in text
    assert [line.split()[0] for line in text.splitlines()[3:]] == ["sticky", "round_robin"]
    assert "sticky *" in text
    with pytest.raises(SystemExit):
        main(["sim", "replay", str(trace), "--policy", "nothing"])
    assert "round_robin" in capsys.readouterr().err


def test_the_plot_is_a_picture(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plot.svg"
    replay(capsys, str(trace), "--policy", "sticky,sglang", "--plot", str(path))
    root = ElementTree.fromstring(path.read_text())
    assert root.tag.endswith("svg")
    words = [one.text for one in root.iter() if one.tag.endswith("text")]
    assert "sticky *" in words
    assert sum(one.tag.endswith("polyline") for one in root.iter()) == 2
    assert main(["sim", "replay", str(trace), "--sweep", "0", "--plot", str(tmp_path / "none" / "plot.svg")]) == 2


def test_how_many_engines_a_load_needs(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slow = (str(trace), "--prefill-rate", "2000", "--engines", "1,2,4,8,16")
    document = replay(capsys, *slow, "--target-p90", "6.0", "--policy", "round_robin,sticky")
    needed = {name: one["engines_needed"] for name, one in document["policies"].items()}
    assert needed["sticky"] < needed["round_robin"]
    p90_s = list(document["policies"]["round_robin"]["ttft_p90_s"].values())
    assert p90_s[-1] <= 6.0 < p90_s[-2]
    assert main(["sim", "replay", *slow, "--target-p90", "0.001"]) == 0
    assert "more than 16 engines" in capsys.readouterr().out
    assert main(["sim", "replay", *slow]) == 2


def test_the_knee_lies_where_the_p90_passes_the_limit() -> None:
    arrivals = synthetic("unique", 1, 600, 4, rate=2.0)
    fleet = study.Fleet(4)
    points, knee = study.sweep(arrivals, fleet, "round_robin", (0.5, 1.0, 2.0, 4.0), 3.0)
    below = max(point["rate"] for point in points if point["ttft_p90_s"] <= 3.0)
    above = min(point["rate"] for point in points if point["ttft_p90_s"] > 3.0)
    assert below < knee < above
    assert study.sweep(arrivals, fleet, "round_robin", (0.5,), 1000.0)[1] == points[0]["rate"]
    assert study.sweep(arrivals, fleet, "round_robin", (4.0, 8.0), 0.001)[1] == 0.0
    assert study.rate_of(faster(arrivals, 2.0)) == pytest.approx(2 * study.rate_of(arrivals))
