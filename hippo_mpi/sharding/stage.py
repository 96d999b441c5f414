"""Layers [start, stop) of any mlx-lm model: one rank's part of the pipeline.

The model keeps its own `__call__`, its full list of layers and its full list of caches. A layer that lives on
another rank becomes a *phantom*: the same object, whose call returns what arrived from the rank before (or zeros,
where nothing reads them) and feeds its cache rows of width 0, so that masks, positions and look-ups such as
`cache[self.fa_idx]` stay right on every rank. `tracing.trace` finds out what crosses a cut.

Knows one model and one split. Must not know ranks, messages, sequences or sampling.

Legend: B rows, L tokens per row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from greenlet import getcurrent, greenlet

from hippo_mpi.checkpoint.checkpoint import Checkpoint, load_weights
from hippo_mpi.errors import DesyncError
from hippo_mpi.tracing import nested_arrays
from hippo_mpi.tracing.dataflow import (
    ArgumentRef,
    CacheEffect,
    Dataflow,
    Dim,
    LayerCall,
    Returned,
    ReturnedArray,
    ReturnedSequence,
    Shape,
)
from hippo_mpi.tracing.nested_arrays import Opaque, Path
from hippo_mpi.tracing.observer import all_caches

Place = tuple[int, Path]
"""Identifies an array that crosses a cut: (call, path of an output or of a prepared input)."""


class Stage:
    """The layers [start, stop) of `model`, ready to run steps.

    Args:
        model: an mlx-lm model, complete in structure; weights of other stages' layers are never read.
        flow: what `trace` found for the same model.
        start: first layer held here; with 0, the stage also holds embedding, norm and head.
        stop: the layer after the last one held here.
        shares_head: whether every stage holds norm and head, receives their input, and returns logits.
    """

    def __init__(self, model: nn.Module, flow: Dataflow, start: int, stop: int, shares_head: bool = False) -> None:
        self.model, self.flow, self.start, self.stop = model, flow, start, stop
        self.leads = start == 0  # steps begin here, and their results come back here
        self.holds_embedding = start == 0
        self.holds_head = start == 0 or shares_head
        self.run_model = partial(type(model).__call__, model)  # the model's own code, whatever its class becomes
        self.is_whole = stop - start == flow.num_layers
        self.is_sharded = False  # whether other ranks take part in each layer
        self.is_lazy = True  # whether a step can be built without being computed, as far as the stage goes
        self.crossing = {cut: crossing(flow, cut) for cut in range(1, len(flow.calls) + 1)}
        self._running: Forward | None = None
        if not self.is_whole:
            self._hook_layers()

    def _hook_layers(self) -> None:
        for index, layer in enumerate(self.model.layers):
            layer.__class__ = _hooked(type(layer), index, self)

    def shared(self, array: mx.array) -> mx.array:
        """Return what the first rank of this stage has for an array that is made or received by it alone."""
        return array

    def received(
        self, cut: int, incoming: Sequence[mx.array] | None, rows_tokens: tuple[int, int]
    ) -> dict[Place, mx.array]:
        """Return the arrays that arrived at the cut before call `cut`.

        Raises:
            DesyncError: other arrays are expected.
        """
        places = self.crossing[cut]
        if incoming is None or len(incoming) != len(places):
            got = "nothing" if incoming is None else f"{len(incoming)} arrays"
            raise DesyncError(f"expected {len(places)} arrays at the cut before layer {cut}, got {got}")
        return dict(zip(places, incoming, strict=True))

    def forward(self, tokens: mx.array, cache: list[Any], wants_logits: bool = True, **options: Any) -> Forward:
        """Begin a step.

        Args:
            tokens: (B, L); stages other than the first look at the shape only.
            cache: the full list of layers' caches.
            wants_logits: whether the step returns logits.
            options: further arguments of the model's own code.
        """
        return Forward(self, tokens, cache, wants_logits, options)

    @property
    def sends(self) -> bool:
        """Whether this rank sends to another stage what this one has made."""
        return not self.is_whole

    @property
    def hands_over_early(self) -> bool:
        """Whether the next stage gets what it needs as soon as this stage's last layer has run."""
        return self.start > 0

    @property
    def is_alone(self) -> bool:
        """True if no other rank takes part in steps."""
        return self.is_whole and not self.is_sharded

    def is_local(self, layer: int) -> bool:
        """Return whether this stage holds a layer."""
        return self.start <= layer < self.stop


class Forward:
    """One step through this stage, which pauses wherever it must wait for another stage.

    The model's code runs in a greenlet, so that a layer call in the middle of it can wait for another stage's arrays
    while this stage begins the next step. It builds graphs and evaluates nothing. On the first stage:

        forward = stage.forward(tokens, cache)
        forward.run(None)
        send(forward.outgoing)               # None if nothing leaves this stage
        if not forward.is_done: forward.run(arrays that came round the ring)
        forward.logits                       # (B, L, V), if they are wanted

    On others:

        forward.run(arrays that arrived)
        send(forward.outgoing)
        forward.run(None)                    # through the phantoms after this stage, while outgoing is computed
    """

    def __init__(
        self,
        stage: Stage,
        tokens: mx.array,
        cache: list[Any],
        wants_logits: bool,
        options: dict[str, Any],
    ) -> None:
        self.stage, self.tokens, self.cache, self.wants_logits = stage, tokens, cache, wants_logits
        self._options = options
        self.outgoing: list[mx.array] | None = None
        self.logits: mx.array | None = None
        self._next_call = 0
        self._held: dict[Place, mx.array] = {}  # what crossed, or will cross, a cut
        self._opaque = Opaque(all_caches(cache))
        self._greenlet = greenlet(self._call_model)

    @property
    def is_done(self) -> bool:
        """True if the model's code has returned."""
        return bool(self._greenlet.dead)

    @property
    def num_rows_tokens(self) -> tuple[int, int]:
        """Shape (B, L) of the step's tokens."""
        return self.tokens.shape[0], self.tokens.shape[1]

    def run(self, incoming: Sequence[mx.array] | None) -> None:
        """Run the model's code to its next wait, or to its end.

        Args:
            incoming: the arrays that the stage before sent; None at a start or a wait that needs none.

        Raises:
            DesyncError: other arrays are expected here, or the model calls its layers differently than when traced.
        """
        self.outgoing = None
        previous, self.stage._running = self.stage._running, self
        try:
            self._greenlet.parent = getcurrent()
            self._greenlet.switch(incoming)
        finally:
            self.stage._running = previous

    def _call_model(self, incoming: Sequence[mx.array] | None) -> None:
        if not self.stage.holds_embedding:
            self._held.update(self.stage.received(self.stage.start, incoming, self.num_rows_tokens))
        logits = self.stage.run_model(self.tokens, cache=self.cache, **self._options)
        if self._next_call != len(self.stage.flow.calls) and not self.stage.is_whole:
            raise DesyncError(f"the model called {self._next_call} layers, not {len(self.stage.flow.calls)}")
        if self.stage.holds_head and self.wants_logits:
            self.logits = logits

    def _on_layer(self, layer: Any, index: int, args: Any, kwargs: Any, real: Any) -> Any:
        """Handle the call of layer `index`: run it if this stage holds it, otherwise act as its phantom."""
        number, self._next_call = self._next_call, self._next_call + 1
        flow = self.stage.flow
        if number >= len(flow.calls) or flow.calls[number].layer != index:
            raise DesyncError(f"the model called layer {index} as its call {number}, unlike when it was traced")
        call, inputs = flow.calls[number], {"args": args, "kwargs": kwargs}
        if self.stage.is_local(index):
            for path in sorted(call.prepared, key=repr):
                replace_argument(inputs, path, self.stage.shared(self._prepared(number, path, inputs)))
            result = real(layer, *inputs["args"], **inputs["kwargs"])
            if index == self.stage.stop - 1 and not self.stage.is_whole:
                self._keep_outputs(number, result, inputs)
                if self.stage.hands_over_early:
                    self.outgoing = self._collect(number + 1)
                    self._greenlet.parent.switch()
            return result
        if self.stage.holds_embedding or (self.stage.is_sharded and index >= self.stage.stop):
            self._keep_prepared(number, call, inputs)
        for effect in call.effects:
            _apply(effect, inputs, self.num_rows_tokens)
        self._maybe_wait(number)
        return self._stand_in(number, call, inputs)

    def _keep_outputs(self, number: int, result: Any, inputs: dict[str, Any]) -> None:
        for call, path in self.stage.crossing[number + 1]:
            if call == number:
                self._held[call, path] = _own(argument({"return": result, **inputs}, path))

    def _keep_prepared(self, number: int, call: LayerCall, inputs: dict[str, Any]) -> None:
        for path in sorted(call.prepared, key=repr):
            self._held[number, path] = self.stage.shared(_own(self._prepared(number, path, inputs)))

    def _prepared(self, number: int, path: Path, inputs: dict[str, Any]) -> mx.array:
        """Return what the first stage has made of the tokens for a call, as far as this rank has it."""
        held = self._held.get((number, path))
        prepared: mx.array = argument(inputs, path) if held is None else held
        return prepared

    def _collect(self, cut: int) -> list[mx.array] | None:
        """Return the arrays that the next stage needs; None if this is the result and no logits are wanted."""
        if cut == len(self.stage.flow.calls) and not self.wants_logits:
            return None
        return [self._held[place] for place in self.stage.crossing[cut]]

    def _maybe_wait(self, number: int) -> None:
        """In the last phantom before this stage's next layers (or the head): hand out what is due, wait for input."""
        flow, stage = self.stage.flow, self.stage
        next_is_local = number + 1 < len(flow.calls) and flow.calls[number + 1].layer == stage.start
        is_last = number + 1 == len(flow.calls)
        if not stage.hands_over_early and (is_last or (stage.start == 0 and next_is_local)):
            self.outgoing = self._collect(number + 1 - (flow.num_layers - stage.stop))
            if not stage.leads or (is_last and not self.wants_logits):
                return
        elif not (next_is_local and number >= flow.num_layers) and not (is_last and stage.holds_head):
            return
        incoming = self._greenlet.parent.switch()
        self._held.update(Stage.received(stage, number + 1, incoming, self.num_rows_tokens))  # on rank 0 alone

    def _stand_in(self, number: int, call: LayerCall, inputs: dict[str, Any]) -> Any:
        """Return what the layer would: arrays that arrived, or zeros of the same shape."""

        def array(path: Path) -> mx.array:
            held = self._held.get((number, path))
            if held is not None:
                return held
            shape = call.outputs[path]
            return mx.zeros(shape(*self.num_rows_tokens), shape.dtype)

        def build(returned: Returned) -> Any:
            if isinstance(returned, ReturnedArray):
                return array(returned.path)
            if isinstance(returned, ArgumentRef):
                return argument(inputs, returned.path)
            if isinstance(returned, ReturnedSequence):
                items = [build(item) for item in returned.items]
                return returned.kind(*items) if hasattr(returned.kind, "_fields") else returned.kind(items)
            return returned.value

        for path in call.outputs:
            if path[0] != "return":
                replace_argument(inputs, path, array(path))
        return build(call.returns)


def crossing(flow: Dataflow, cut: int) -> list[Place]:
    """Return what crosses the cut before call `cut`, in the order in which it is sent.

    First the outputs of the previous call that the next one (or the head) reads, then inputs of later calls of the
    same round that the first stage has prepared.
    """
    last = cut == len(flow.calls)
    reads = flow.head_reads if last else flow.calls[cut].reads
    places: list[Place] = [(cut - 1, path) for path in sorted(reads, key=repr)]
    round_end = cut if cut % flow.num_layers == 0 else cut - cut % flow.num_layers + flow.num_layers
    for number in range(cut, round_end):
        places += [(number, path) for path in sorted(flow.calls[number].prepared, key=repr)]
    return places


def _hooked(kind: type, index: int, stage: Stage) -> type:
    """Return a subclass of a layer's class whose calls go through the running Forward of `stage`."""

    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        assert stage._running is not None, "a layer of a stage was called outside a step"
        return stage._running._on_layer(layer, index, args, kwargs, kind.__call__)

    return type(kind.__name__, (kind,), {"__call__": call})


def _own(array: mx.array) -> mx.array:
    """Return a separate handle: models change arrays in place (gemma3n's head changes the last layer's output)."""
    return mx.stop_gradient(array)


def argument(root: Any, path: Path) -> Any:
    """Return what lies at a path inside the arguments, or the result, of a layer's call."""
    for key in path:
        is_indexed = isinstance(root, dict | list | tuple)
        root = cast(Any, root)[key] if is_indexed else getattr(root, str(key))
    return root


def replace_argument(inputs: dict[str, Any], path: Path, value: Any) -> None:
    """Set an argument, or an array inside one."""
    if len(path) == 2 and path[0] == "args":
        values = list(inputs["args"])
        values[int(path[1])] = value
        inputs["args"] = tuple(values)
    else:
        nested_arrays.assign(argument(inputs, path[:-1]), path[-1], value)


def _apply(effect: CacheEffect, inputs: dict[str, Any], rows_tokens: tuple[int, int]) -> None:
    """Do to a cache what the real layer does to it, with rows of width 0."""
    cache = argument(inputs, effect.cache)
    if cache is None:
        return

    def filled(value: Any) -> Any:
        if isinstance(value, Shape):
            return mx.zeros(value(*rows_tokens), value.dtype)
        return value(*rows_tokens) if isinstance(value, Dim) else value

    getattr(cache, effect.method)(*(filled(value) for value in effect.arguments))


def load_stage(
    checkpoint: Checkpoint,
    start: int,
    stop: int,
    on_progress: Callable[[int], None] = lambda done_bytes: None,
    shares_head: bool = False,
) -> Stage:
    """Load the layers [start, stop) of a model, whatever its type.

    Args:
        checkpoint: the model's structure, from `open_checkpoint`.
        start: first layer; with 0, the stage also holds embedding, norm and head. No cut may be one of
            `checkpoint.flow.forbidden_cuts()`.
        stop: the layer after the last one.
        on_progress: called with the bytes read so far.
        shares_head: whether every rank gets norm and head.

    Raises:
        ModelError: a file can't be read or downloaded.
    """
    model = load_weights(checkpoint, checkpoint.flow.stage_weights(start, stop, shares_head), on_progress)
    return Stage(model, checkpoint.flow, start, stop, shares_head)
