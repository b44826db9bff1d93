"""`hexswarm plan` and `hexswarm simulate` as typed, in this process: results, and mistakes."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest

from hexswarm.cli import main
from hexswarm.errors import UsageError
from hexswarm.plan_options import SimulateOptions
from hexswarm.router.placement.cluster import Cluster, parse
from hexswarm.router.placement.groups import parse_plan
from hexswarm.router.placement.plan import Plan, whole_units
from hexswarm.router.placement.regroup import regroupable
from hexswarm.simulator.cli import _policy
from hexswarm.simulator.rival_separate import Pipelines

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "cluster.json"
SAID = json.loads(EXAMPLE.read_text("utf-8"))
FIGURES = {
    *("flow_tokens_per_s", "bound_tokens_per_s", "ratio", "load_tokens_per_s"),
    *("expected", "binds", "units", "edges"),
}
REPORT = {
    *("policy", "cluster", "model", "seed", "window_s", "arrived", "finished", "waiting"),
    *("running", "gave_up", "refusals", "repairs", "offered_tokens_per_s"),
    *("prompt_tokens_per_s", "decode_tokens_per_s", "ttft", "prompt", "decode", "tpot"),
    *("latency", "goodput", "stages", "uses", "limits", "attainment"),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the example, and a plan of it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cluster.json").write_text(json.dumps(SAID), "utf-8")
    (tmp_path / "plan.json").write_text(json.dumps(plan_of(parse(SAID))), "utf-8")
    (tmp_path / "bad.json").write_text('{\n"schema": ', "utf-8")
    (tmp_path / "list.json").write_text("[1]", "utf-8")
    (tmp_path / "digits.json").write_text("9" * 5000, "utf-8")
    (tmp_path / "noise.bin").write_bytes(bytes(range(128, 256)))
    (tmp_path / "sub").mkdir()
    lines = ["input_tokens,output_tokens", *(f"{40 + n},{10 + n}" for n in range(20))]
    (tmp_path / "trace.csv").write_text("\n".join(lines), "utf-8")
    (tmp_path / "trace-arrivals.csv").write_text("requests_in_3_s\n0\n9\n", "utf-8")
    return tmp_path


def plan_of(pool: Cluster, **changes: Any) -> dict[str, Any]:
    """Every machine that can holds the whole model, as pipelines of one."""
    units = whole_units(pool, "llama-8b")
    nodes = {unit.id: [0, 32] if unit.profile.max_layers >= 32 else None for unit in units}
    lines = [[name] for name, layers in nodes.items() if layers]
    return {
        "schema": "hexswarm-plan/1", "model": "llama-8b", "cluster": pool.name,
        "nodes": nodes, "groups": [], "pipelines": lines, **changes,
    }  # fmt: skip


def typed(words: str) -> int:
    return main(words.split())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("plan none.json", "cannot be read"),
        ("plan sub", "cannot be read"),
        ("plan bad.json", "is not JSON: line 2"),
        ("plan list.json", 'not a cluster file; it is JSON whose "schema"'),
        ("plan plan.json", "not a cluster file"),
        ("plan digits.json", "digits"),
        ("plan noise.bin", "no text file"),
        ("plan cluster.json --model gpt", "it has llama-8b"),
        ("plan cluster.json --objective service", "give --load"),
        ("plan cluster.json --objective best", "use flow, service, slo"),
        ("plan cluster.json --tpot 1", "give --load TOK_S too, or --objective slo"),
        ("plan cluster.json --objective flow --load 5 --ttft 1", "keeps no limits"),
        ("plan cluster.json --seconds 0", "--seconds is a positive number"),
        ("plan cluster.json --load nan", "--load is a positive number"),
        ("plan cluster.json --seconds soon", "seconds"),
        ("plan cluster.json -o sub", "sub is a folder; name a file"),
        ("plan cluster.json -o none/x.json", "there is no folder none; make it"),
        ("plan cluster.json -o cluster.json", "would be overwritten"),
        ("plan cluster.json -o x.json --svg x.json", "would be overwritten"),
        ("plan", "see hexswarm plan --help"),
        ("simulate cluster.json", "needs a plan; hexswarm plan -o FILE"),
        ("simulate cluster.json --plan plan.json", "either --rate or --load"),
        ("simulate cluster.json --plan plan.json --rate 1 --load 5", "either --rate or --load"),
        ("simulate cluster.json --plan cluster.json --rate 1", "cluster.json: this is not a plan"),
        ("simulate cluster.json --plan plan.json --rate 1 --policy x", "there are hexswarm, helix"),
        ("simulate cluster.json --plan plan.json --rate 1 --seconds 10", "--warmup is shorter"),
        ("simulate cluster.json --plan plan.json --rate 1 --absence 5", "give --churn TIME"),
        ("simulate cluster.json --plan plan.json --rate 1 --arrivals x", "use poisson or azure"),
        ("simulate cluster.json --plan plan.json --rate 1 --arrivals azure", "--arrivals-file"),
        (
            "simulate cluster.json --plan plan.json --rate 1 --arrivals poisson "
            "--arrivals-file trace-arrivals.csv",
            "come from no file",
        ),
        ("simulate cluster.json --plan plan.json --rate 1 --trace list.json", "no request of the"),
        ("simulate cluster.json --plan plan.json --rate 1 --trace bad.json", "not a trace"),
        (
            "simulate cluster.json --plan plan.json --rate 1 --arrivals-file cluster.json",
            "has no requests",
        ),
        ("simulate cluster.json --plan plan.json --rate 1 --svg plan.json", "be overwritten"),
    ],
)
def test_mistakes_are_one_line_with_a_remedy(
    folder: Path, capsys: pytest.CaptureFixture[str], words: str, expected: str
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert typed(words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert expected in line
    assert before == {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"cluster": "another"}, "for cluster another, not for office-and-homes; name that"),
        ({"model": "gpt"}, "no speeds for model 'gpt'; it has llama-8b"),
        ({"nodes": {"nobody": [0, 32]}}, "no node 'nobody'"),
        ({"nodes": {"anna": [0, 33]}, "pipelines": []}, "at most"),
        ({"nodes": {"anna": [0, 8]}, "pipelines": []}, "nobody holds layers 8-31; search longer"),
        ({"pipelines": [["anna"], ["anna"]]}, "in two pipelines"),
    ],
)
def test_plans_that_do_not_fit_the_cluster(
    folder: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], expected: str
) -> None:
    (folder / "plan.json").write_text(json.dumps(plan_of(parse(SAID), **changes)), "utf-8")
    assert typed("simulate cluster.json --plan plan.json --rate 1") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line


@pytest.mark.parametrize("seed", range(30))
def test_damaged_files_end_in_our_own_error_or_none(seed: int) -> None:
    """Whatever is replaced or removed anywhere in a cluster or a plan."""
    rng = random.Random(seed)
    for said, read in (
        (SAID, parse),
        (plan_of(parse(SAID)), lambda said: parse_plan(parse(SAID), said)),
    ):
        hurt = copy.deepcopy(said)
        for _ in range(rng.randint(1, 2)):
            _hurt(hurt, rng)
        try:
            read(hurt)
        except UsageError:
            pass
        except OverflowError:  # the reader of files tells it as a number that is not finite
            pass


def _hurt(said: Any, rng: random.Random) -> None:
    """Something deep inside becomes something else, or is gone."""
    while True:
        keys = list(said) if isinstance(said, dict) else list(range(len(said)))
        if not keys:
            return
        key = rng.choice(keys)
        if isinstance(said[key], dict | list) and rng.random() < 0.8:
            said = said[key]
            continue
        if rng.random() < 0.25:
            del said[key]
        else:
            said[key] = rng.choice([None, -1, 0, 1e400, "x", [], {}, [[]], 1.5, True, "n" * 9])
        return


def test_machines_of_several_gpus_are_planned_in_groups(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Table, JSON and file agree, and the file is read again."""
    words = "plan cluster.json --seconds 0.3 -o found.json --svg found.svg"
    assert typed(words) == 0
    table = capsys.readouterr().out
    plan = parse_plan(parse(SAID), json.loads((folder / "found.json").read_text("utf-8")))
    assert plan.missing(32) == []
    for unit, span in plan.placed():
        assert any(unit.id in row and str(span) in row for row in table.splitlines())
    assert (folder / "found.svg").read_text("utf-8").startswith("<svg")
    assert typed("plan cluster.json --seconds 0.3 --json --load 300") == 0
    told = json.loads(capsys.readouterr().out)
    assert set(told["figures"]) == FIGURES
    assert told["figures"]["flow_tokens_per_s"] >= 1.2 * 300
    assert set(told["figures"]["units"]) == {*told["nodes"], *(g["id"] for g in told["groups"])}


def test_single_gpus_are_planned_as_they_are(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster = parse(SAID)
    alone = [node.id for node in cluster.nodes if not regroupable(cluster, node)]
    said = {**SAID, "nodes": [node for node in SAID["nodes"] if node["id"] in alone]}
    (folder / "cluster.json").write_text(json.dumps(said), "utf-8")
    assert typed("plan cluster.json --seconds 0.1 --json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["groups"] == []
    assert set(told["nodes"]) == set(alone)


def test_disjoint_pipelines_are_kept_by_the_simulator(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file says who serves with whom, and requests go along one pipeline each."""
    words = "plan cluster.json --seconds 0.2 --objective slo --ttft 9 --tpot 2 -o slo.json --json"
    assert typed(words) == 0
    told = json.loads(capsys.readouterr().out)
    lines = told["pipelines"]
    assert json.loads((folder / "slo.json").read_text("utf-8"))["pipelines"] == lines
    place = {name: at for at, line in enumerate(lines) for name in line}
    for sender, receiver, _ in told["figures"]["edges"]:
        if "coordinator" not in (sender, receiver):
            assert place[sender] == place[receiver]
    run = "simulate cluster.json --plan slo.json --rate 0.4 --seconds 30 --warmup 5"
    assert typed(f"{run} --policy hexgen --json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["policy"] == "hexgen"
    assert report["ttft"]["count"] > 0
    lengths = {len(line) for line in lines}
    assert min(lengths) <= report["stages"] <= max(lengths)


@pytest.mark.parametrize("name", ["hexgen", "separate"])
def test_policies_of_pipelines_take_those_of_the_plan(name: str) -> None:
    """Whichever they are: by rule, at most one of these two would have been found."""
    pool = parse(SAID)
    said = plan_of(pool, nodes={}, pipelines=[["office-1", "office-3"], ["office-2", "anna"]])
    said["nodes"] = {"office-1": [0, 9], "office-2": [0, 9], "office-3": [9, 32], "anna": [9, 32]}
    options = SimulateOptions(plan=Path("x"), rate=1.0, policy=name)
    for lines in (said["pipelines"], [["office-1", "anna"], ["office-2", "office-3"]]):
        plan = parse_plan(pool, {**said, "pipelines": lines})
        policy = _policy(pool, pool.model("llama-8b"), plan, options)
        assert isinstance(policy, Pipelines)
        named = [[plan.units[at].id for at in line] for line in policy.pipelines]
        assert named == lines


def test_arrivals_deaths_and_the_keys_of_the_report(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bursts come as the file beside the trace has them; absences have the length asked for."""
    plan = plan_of(parse(SAID))
    del plan["pipelines"]
    (folder / "plan.json").write_text(json.dumps(plan), "utf-8")
    run = "simulate cluster.json --plan plan.json --trace trace.csv --rate 1 --seconds 24 --json"
    run += " --warmup 2"
    told = {}
    for more in (
        "",
        "--arrivals poisson",
        "--arrivals azure",
        "--arrivals-file trace-arrivals.csv",
        "--churn 8s --absence 1s",
        "--churn 8s --absence 30s",
    ):
        assert typed(f"{run} {more}") == 0
        told[more] = json.loads(capsys.readouterr().out)
        assert set(told[more]) == REPORT
        assert told[more]["policy"] == "hexswarm"
    plain, poisson, azure, file, short, long = told.values()
    assert plain == poisson
    assert azure == file != plain
    assert plain["repairs"] == 0
    assert short != long != plain


def test_the_table_names_the_policy_as_the_flag(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = "simulate cluster.json --plan plan.json --rate 0.5 --seconds 20 --warmup 5"
    assert typed(f"{run} --svg run.svg") == 0
    assert "policy hexswarm:" in capsys.readouterr().out
    assert "policy hexswarm" in (folder / "run.svg").read_text("utf-8")
    assert isinstance(parse_plan(parse(SAID), plan_of(parse(SAID))), Plan)
