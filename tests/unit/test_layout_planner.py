"""What can't be planned as it was asked for is said before anything is timed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hippo_mpi.checkpoint.checkpoint import ModelSource, open_checkpoint
from hippo_mpi.errors import UserError
from hippo_mpi.planning.layer_split import Machine, plan_split
from hippo_mpi.planning.layer_times import SHAPES, KindTimes, RankTimes
from hippo_mpi.planning.layout_choice import LinkTimes
from hippo_mpi.planning.model_costs import model_info
from hippo_mpi.runtime import layout_planner
from hippo_mpi.runtime.layout_planner import LayoutPlanner, PlanConstraints
from hippo_mpi.runtime.rank_timing import Timed
from hippo_mpi.sharding.slot_caches import KVSettings
from hippo_mpi.transport.pulse import Activity
from tests.parity import tiny_models

QUIET: Any = SimpleNamespace(progress=lambda *_: None)


def planner(
    num_ranks: int, num_rounds: int = 1, layer_split: tuple[int, ...] | None = None, **asked: Any
) -> LayoutPlanner:
    checkpoint: Any = SimpleNamespace(flow=SimpleNamespace(num_rounds=num_rounds))
    unused: Any = None
    machines = [Machine(f"mini{rank}", 1 << 34) for rank in range(num_ranks)]
    return LayoutPlanner(checkpoint, unused, machines, PlanConstraints(layer_split, None, **asked), unused)


@pytest.mark.parametrize(
    ("num_ranks", "asked", "said"),
    [
        (2, {"width_split": (5, 3)}, "--width-split is for --parallel tensor; in a pipeline, each rank holds whole layers, and --layer-split gives"),
        (2, {"is_exact": True}, "--tensor exact is for --parallel tensor"),
        (4, {"num_stages": 2}, "--stages is for --parallel tensor"),
        (2, {"collectives": "graph"}, "--collectives is for --parallel tensor"),
        (2, {"parallel": "tensor", "is_load_given": True}, "--plan-for is for --parallel auto"),
        (2, {"parallel": "tensor", "layout": "mlp only"}, "--layout mlp only is for --parallel auto"),
        (2, {"parallel": "tensor", "layer_split": (6, 6)}, "--layer-split is for --parallel pipeline; with tensor, --width-split"),
        (2, {"parallel": "auto", "layer_split": (6, 6)}, "--layer-split is for --parallel pipeline; with auto, --width-split"),
        (3, {"parallel": "tensor", "num_stages": 2}, "--stages 2 needs 4, 6 ... ranks: as many in each stage, at least 2; there are 3"),
        (2, {"parallel": "tensor", "num_stages": 2}, "--stages 2 needs 4, 6 ... ranks"),
        (4, {"parallel": "auto", "num_stages": 2}, "--stages is for --parallel tensor; auto compares numbers of stages itself"),
        (4, {"parallel": "tensor", "num_stages": 2, "has_comparison": True}, "--stages is for --parallel tensor, without --simulate"),
        (4, {"parallel": "tensor", "num_stages": 2, "layer_split": (3, 3, 6)}, "--layer-split 3,3,6 is for 3 stages, but --stages is 2"),
        (4, {"parallel": "tensor", "num_stages": 2, "width_split": (1, 1, 1)}, "width split 1,1,1 is for 3 ranks, but there are 2"),
        (1, {"parallel": "tensor", "width_split": (5, 3)}, "width split 5,3 is for 2 ranks, but there is 1"),
        (4, {"parallel": "tensor", "num_stages": 2, "num_rounds": 2}, "which goes through its layers several times"),
    ],
)  # fmt: skip
def test_refused(num_ranks: int, asked: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as refused:
        planner(num_ranks, **asked)
    assert said in str(refused.value)


def test_taken() -> None:
    assert planner(4, parallel="tensor", num_stages=2, layer_split=(2, 10), width_split=(5, 3), is_exact=True)
    assert planner(3, parallel="auto", width_split=(5, 3, 1))


def test_stages_of_ranks_are_taken_where_they_are_fastest(tmp_path: Path) -> None:
    """Sums over all four ranks take longer than messages between neighbours."""
    checkpoint = open_checkpoint(ModelSource(tiny_models.make_checkpoint("llama", tmp_path)))
    info, link = model_info(checkpoint, KVSettings()), LinkTimes(((1, 1.0),), ((1, 1e-6),))
    machines = [Machine(f"mini{rank}", 1 << 34) for rank in range(4)]
    planner = LayoutPlanner(checkpoint, info, machines, PlanConstraints(None, 256, parallel="auto"), QUIET)
    shards = planner.widths()
    whole, split, none = ((seconds,) * len(SHAPES) for seconds in (1.0, 0.4, 0.0))
    kind = KindTimes(tuple(range(info.num_layers)), whole, split, {"mlp.down_proj": split}, {"mlp.down_proj": (1,)})
    timed = [Timed(RankTimes((kind,), none, none), link)] * 4
    found = planner.planned(shards, timed, include_sums=False)
    assert found.shards is not None and found.shards.num_ranks == 2
    assert [(stage.start, stage.stop) for stage in found.split.stages] == [(0, 3), (0, 3), (3, 6), (3, 6)]
    assert found.notes[-1].startswith("chosen: tensor, 2 stages, ")


@pytest.mark.parametrize(
    ("rooms_bytes", "counts"),
    [((1 << 34, 1 << 34), [6, 0]), ((1 << 34, -(1 << 28)), [6, 0]), ((0, 0), [3, 3])],
    ids=["enough", "none on the other rank", "of a pipeline"],
)
def test_one_rank_is_taken_if_it_has_room(rooms_bytes: tuple[int, ...], counts: list[int], tmp_path: Path) -> None:
    """Over a slow link; the memory is what a pipeline needs, more, or less."""
    checkpoint = open_checkpoint(ModelSource(tiny_models.make_checkpoint("llama", tmp_path)))
    info, link = model_info(checkpoint, KVSettings()), LinkTimes(((1, 1.0),), ((1, 1.0),))
    enough = plan_split(info, [Machine("mini", 1 << 34)] * 2, 256, [3, 3]).stages[0]
    needed = enough.machine.memory_bytes - enough.margin_bytes
    machines = [Machine(f"mini{rank}", needed + room) for rank, room in enumerate(rooms_bytes)]
    planner = LayoutPlanner(checkpoint, info, machines, PlanConstraints(None, 256, parallel="auto"), QUIET)
    shards = planner.widths()
    whole, split, none = ((seconds,) * len(SHAPES) for seconds in (1.0, 0.9, 0.0))
    kind = KindTimes(tuple(range(info.num_layers)), whole, split, {"mlp.down_proj": split}, {"mlp.down_proj": (1,)})
    found = planner.planned(shards, [Timed(RankTimes((kind,), none, none), link)] * 2, include_sums=False)
    assert found.split.counts == counts
    assert ("rank 0 has " in found.notes[-1]) == (counts[1] > 0)


def test_a_layout_is_taken_by_its_name(tmp_path: Path) -> None:
    """Without times it is the same as if it had been chosen by them."""
    checkpoint = open_checkpoint(ModelSource(tiny_models.make_checkpoint("llama", tmp_path)))
    info, machines = model_info(checkpoint, KVSettings()), [Machine(f"mini{rank}", 1 << 34) for rank in range(4)]

    def asking(**asked: Any) -> LayoutPlanner:
        return LayoutPlanner(checkpoint, info, machines, PlanConstraints(None, 256, parallel="auto", **asked), QUIET)

    shards, link = asking().widths(), LinkTimes(((1, 1.0),), ((1, 1.0),))
    same = (1.0,) * len(SHAPES)
    blocks = dict.fromkeys(("self_attn.o_proj", "mlp.down_proj"), same)
    kind = KindTimes(tuple(range(info.num_layers)), same, same, blocks, dict.fromkeys(blocks, (1,)))
    timed = [Timed(RankTimes((kind,), same, same), link)] * 4
    comparison = asking().compare(shards, timed, include_sums=False)
    names = [one.name for one in comparison.predictions()]
    assert set(names) >= {
        "pipeline",
        "one rank alone",
        "tensor",
        "mlp only",
        "self_attn only, head whole",
        "tensor, 2 stages",
    }
    for name in names:
        others = {other: "not now" for other in names if other != name}
        planner = asking()
        planner._problems = lambda others=others: dict(others)  # type: ignore[method-assign]
        chosen, named = planner.choose(shards, comparison), asking(layout=name).plan()
        assert named.name == chosen.name == name
        assert (named.split, named.shards) == (chosen.split, chosen.shards)


def test_a_name_of_no_layout_is_refused(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(ModelSource(tiny_models.make_checkpoint("llama", tmp_path)))
    info, machines = model_info(checkpoint, KVSettings()), [Machine(f"mini{rank}", 1 << 34) for rank in range(2)]
    asked = PlanConstraints(None, 256, parallel="auto", layout="attention")
    with pytest.raises(UserError) as refused:
        LayoutPlanner(checkpoint, info, machines, asked, QUIET).plan()
    assert str(refused.value).startswith(
        "--layout 'attention' isn't among the layouts of this model on 2 ranks: 'pipeline', 'one "
    )


@pytest.mark.parametrize(("width_split", "num_whole"), [((1, 1), 0), ((3, 1), 6)])
def test_caches_that_are_held_twice_are_told_of(width_split: tuple[int, ...], num_whole: int, tmp_path: Path) -> None:
    """There are four heads, and two of them share each KV head."""
    checkpoint = open_checkpoint(ModelSource(tiny_models.make_checkpoint("llama", tmp_path)))
    info, machines = model_info(checkpoint, KVSettings()), [Machine(f"mini{rank}", 1 << 34) for rank in range(2)]
    asked = PlanConstraints(None, 256, parallel="tensor", width_split=width_split)
    notes = LayoutPlanner(checkpoint, info, machines, asked, QUIET).plan().notes
    said = f"the caches of {num_whole} layers are whole on every rank, which needs all of them"
    assert notes == ((said,) if num_whole else ())


def test_trying_is_told_before_the_first_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise rank 0 counts as silent for as long as that takes, with all the time limits of one that waits."""
    told: list[Any] = []
    control: Any = SimpleNamespace(progress=lambda what, activity: told.append(activity))
    asking = planner(2, parallel="tensor")
    monkeypatch.setattr(asking, "_control", control)
    monkeypatch.setattr(asking, "_twin", lambda: told.append("opened"))
    monkeypatch.setattr(layout_planner, "plan_shards", lambda *given, **options: None)
    asking.widths()
    assert told == [Activity.COMPUTING, "opened"]
