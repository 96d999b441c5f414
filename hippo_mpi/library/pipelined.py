"""Turns an mlx-lm model into a pipelined one: this rank's layers, called as if the whole model were here."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from hippo_mpi.checkpoint.adapters import adapt
from hippo_mpi.checkpoint.checkpoint import hold_weights
from hippo_mpi.errors import ForeignError, HippoError, LaunchError, UserError
from hippo_mpi.parallel.peer import Peer
from hippo_mpi.parallel.sharded_peer import ShardedPeer
from hippo_mpi.planning.costs import CacheCost, ModelInfo
from hippo_mpi.planning.layer_split import Machine, plan_split
from hippo_mpi.sharding.stage import Stage
from hippo_mpi.tracing.dataflow import Dataflow
from hippo_mpi.tracing.trace import trace
from hippo_mpi.tracing.twin import blank_twin
from hippo_mpi.transport.pulse import Activity
from hippo_mpi.transport.script_ring import Group, ScriptRing, join

START_TIMEOUT_S = 30.0
TIMEOUT_S = 30.0


def pipeline(
    model: nn.Module,
    group: Group | None = None,
    layer_split: Sequence[int] | None = None,
    *,
    timeout: float = TIMEOUT_S,
    start_timeout: float = START_TIMEOUT_S,
) -> None:
    """Cut a model into stages, one per rank of a group; every rank of it calls this with the same model.

    Afterwards the model is called as before (by `mlx_lm.generate`, `stream_generate`, `batch_generate`), on all ranks
    with the same tokens, and returns the same logits on each. The weights of other ranks' layers are released; if the
    model was loaded lazily, they are never read. MLX's random state becomes rank 0's on all ranks, so that samplers
    choose the same tokens everywhere.

    Args:
        model: an mlx-lm model, loaded or lazily loaded.
        group: from `mx.distributed.init()`; None: the one that the launcher's environment describes.
        layer_split: layers per rank; None: as even as the model allows, by bytes of weights.
        timeout: seconds that a rank may be silent, or a call without progress, before all ranks end with status 3.
        start_timeout: seconds that ranks wait for each other to start.

    Raises:
        UserError: on a single rank, the model can't be used. Several ranks end with its line and status 2.
    """
    ring = join(group, start_timeout, timeout)
    if ring.world.size == 1:
        return
    ring.control.progress("tracing the model", Activity.COMPUTING)
    try:
        if getattr(model, "is_pipelined", False):
            raise UserError("this model is already pipelined")
        adapt(model, str(getattr(model, "model_type", "")))
        flow = find_dataflow(model)
        counts = _agree(ring, model, flow, layer_split)
        stage = take_stage(
            model, flow, counts, ring.world.rank, lambda: ring.control.progress("computing weights", Activity.COMPUTING)
        )
    except HippoError as error:
        ring.control.fail(error)
    connect(stage, ring)


def enable() -> None:
    """Give every mlx-lm model class the method `pipeline(group)`, including classes that are defined later."""

    def is_model(kind: type) -> bool:
        return kind.__name__ == "Model" and kind.__module__.startswith("mlx_lm.models.")

    def equip(kind: type[nn.Module]) -> None:
        if is_model(kind):
            kind.pipeline = pipeline

    def init_subclass(cls: type[nn.Module], /, **kwargs: Any) -> None:
        super(nn.Module, cls).__init_subclass__(**kwargs)
        equip(cls)

    nn.Module.__init_subclass__ = classmethod(init_subclass)
    known = list(nn.Module.__subclasses__())
    while known:
        kind = known.pop()
        equip(kind)
        known += kind.__subclasses__()


def connect(stage: Stage, ring: ScriptRing) -> None:
    """Make calls of a stage's model go through all ranks of a script."""
    share_random_state(ring)
    if not stage.is_whole:
        name = f"{ring.next_number()} ({type(stage.model).__module__.rpartition('.')[2]})"
        peer = Peer(stage, ring.channel, ring.world.rank, ring.world.size, ring.control.progress, name)
        route_calls(stage.model, peer, ring)
    ring.control.idle()


def share_random_state(ring: ScriptRing) -> None:
    """Set MLX's random state on every rank to rank 0's, so that all sample the same tokens."""
    if ring.world.size > 1:
        key = ring.control.share(_random_key() if ring.world.rank == 0 else None, list[int])
        mx.random.seed(key[0] << 32 | key[1])  # the state's key is the two halves of a seed


def _random_key() -> list[int]:
    state: Any = mx.random.state
    key: list[int] = state[0].tolist()
    return key


def route_calls(model: nn.Module, peer: Peer | ShardedPeer, ring: ScriptRing | None = None) -> None:
    """Make calls of a model go through all ranks.

    Args:
        model: gets a class of its own.
        peer: this rank's side of a call.
        ring: ends all ranks if a call fails; None: the call raises.
    """
    kind = type(model)
    signature = inspect.signature(kind.__call__)

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> mx.array:
        _, (_, tokens), *others = signature.bind(self, *args, **kwargs).arguments.items()
        options = dict(others)
        for parameter in signature.parameters.values():
            if parameter.kind == inspect.Parameter.VAR_KEYWORD:
                options |= options.pop(parameter.name, {})
        cache = options.pop("cache", None)
        if ring is None:
            return peer.call(tokens, cache, options)
        ring.settle()
        try:
            return peer.call(tokens, cache, options)
        except HippoError as error:
            ring.control.fail(error)
        finally:
            ring.control.idle()

    methods = {"__call__": call, "__module__": kind.__module__, "__qualname__": kind.__qualname__, "is_pipelined": True}
    model.__class__ = type(kind.__name__, (kind,), methods)


def take_stage(
    model: nn.Module, flow: Dataflow, counts: Sequence[int], rank: int, on_progress: Callable[[], None] = lambda: None
) -> Stage:
    """Turn a whole model into a rank's stage, and release the weights of the other ranks' layers.

    Args:
        model: changed in place.
        flow: its dataflow.
        counts: layers per rank.
        rank: this rank.
        on_progress: called as weights are read.
    """
    start = sum(counts[:rank])
    stop = start + counts[rank]
    hold_weights(model, flow.stage_weights(start, stop, shares_head=True), lambda _: on_progress())
    return Stage(model, flow, start, stop, shares_head=True)


def find_dataflow(model: nn.Module) -> Dataflow:
    """Find a model's dataflow, and leave the model as it was.

    Raises:
        ModelError: the model can't be cut.
        ForeignError: the model's own code raises something.
    """
    twin = blank_twin(model)
    try:
        return trace(twin)
    except HippoError:
        raise
    except Exception as error:  # whatever a model's own code raises
        raise ForeignError.caused_by(error, f"{type(model).__module__} can't be run") from error


def split_evenly(
    flow: Dataflow, weight_bytes: dict[str, int], num_ranks: int, layer_split: Sequence[int] | None = None
) -> list[int]:
    """Return layers per rank that make the largest stage as small as possible, or check the given ones.

    Args:
        flow: the model's dataflow.
        weight_bytes: by name of a weight.
        num_ranks: number of stages.
        layer_split: layers per rank to check instead.

    Raises:
        PlanError: the model can't be cut into that many stages, or not at these layers.
    """
    layers: list[set[str]] = [set() for _ in range(flow.num_layers)]
    for call in flow.calls:
        layers[call.layer] |= call.weights
    sizes = [sum(weight_bytes[name] for name in names) for names in layers]
    head = sum(weight_bytes[name] for name in flow.output_weights)  # every rank has it, so it doesn't affect the split
    work = [float(size) for size in sizes]
    info = ModelInfo(
        flow.num_layers, sizes, work, work, head, 0.0, [CacheCost()] * flow.num_layers,
        flow.forbidden_cuts(), None, True, 0, shared_bytes=head,
    )  # fmt: skip
    without_limit = [Machine(f"rank {rank}", 1 << 62) for rank in range(num_ranks)]  # the model may be loaded already
    return plan_split(info, without_limit, layer_split=layer_split).counts


def _agree(ring: ScriptRing, model: nn.Module, flow: Dataflow, layer_split: Sequence[int] | None) -> list[int]:
    """Return the layers per rank, after checking that all ranks have the same model, split and versions.

    Raises:
        HippoError: they differ, or the model can't be cut like this.
    """
    weights = tree_flatten(model.parameters())
    counts = split_evenly(flow, {name: weight.nbytes for name, weight in weights}, ring.world.size, layer_split)
    check_same(ring, {"model": f"{structure_of(model)} {flow.digest()}", "layer split": ",".join(map(str, counts))})
    return counts


def structure_of(model: nn.Module) -> str:
    """Return a model's code and a short hash of the names, shapes and types of its weights."""
    weights = sorted((name, weight.shape, str(weight.dtype)) for name, weight in tree_flatten(model.parameters()))
    return f"{type(model).__module__} {hashlib.sha256(repr(weights).encode()).hexdigest()[:16]}"


def check_same(ring: ScriptRing, mine: dict[str, str]) -> None:
    """Check that all ranks say the same, and have the same versions of what they run.

    Args:
        ring: the ranks.
        mine: what this rank says, by name.

    Raises:
        LaunchError: they don't.
    """
    mine = {**mine, "versions": " ".join(f"{name} {version(name)}" for name in ("mlx", "mlx-lm", "hippo-mpi"))}
    for rank, other in enumerate(ring.control.gather(mine) or ()):
        for what in mine:
            if other.get(what) != mine[what]:
                raise LaunchError(f"rank 0 and rank {rank} have different {what}: {mine[what]} and {other.get(what)}")
    ring.control.meet()
