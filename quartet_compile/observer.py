"""`observe`: the numerics of a model while it trains.

Around every N-th call eager code enters a scope, as `recipe` does. Dynamo guards on it and compiles a second version of each graph, with
operators that are measured and shown (`passes.observe`, `passes.show`); the version for all other calls is the one that there would be
without an observer. The backend has each graph of that version `heard`: called under a number by which what is shown, in the backward pass
too, finds the observer and the names of the layers that the graph works for.
"""

from __future__ import annotations

import atexit
import functools
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule

from quartet_compile.kernels import ops
from quartet_compile.kernels.measure import figures
from quartet_compile.kernels.observed_ops import heard_by
from quartet_compile.marks import _Scope
from quartet_compile.names import begins, names_in_model, parameter_paths
from quartet_compile.observations import Observation, Observations
from quartet_compile.passes.locate import WRAPPERS
from quartet_compile.passes.place import OBSERVED_KEY

log = logging.getLogger("quartet_compile")

ELEMENTS = 2**18
"""Numbers that are measured of a tensor: its mean squared error is then known to half a percent."""

_OBSERVED = "_quartet_observed"

CALLS_REMEMBERED = 2**14
"""Calls of graphs whose backward pass may still come."""


def observe(
    compiled: Any, every: int = 100, file: str | Path | None = "numerics.jsonl", *, elements: int | None = ELEMENTS
) -> Observer:
    """Record the numerics of each linear in NVFP4 on the calls 0, `every`, 2 `every`, ... of a model in training, with gradients.

        step = torch.compile(model, backend="quartet")
        observer = quartet.observe(step)
        ...                                     # the training loop, as it is
        print(observer)

    compiled: what torch.compile returned, a module after `module.compile()`, or a module of which parts are compiled so, as FSDP2's blocks.
    Of a compiled function the returned observer is what is to be called from now on. every: calls, not steps of the optimizer. file: lines
    of JSON, one `Observation` each, are appended to it; in a process group each rank has its own, with ".rank0" in its name. None: no file.
    elements: numbers to be measured of a tensor at most, in rows chosen at random, the same ones each time; None: all.

    An observed call runs the operators of any other, and measures beside them. Its graphs are compiled once more, and keep the unquantized
    inputs of linears for the backward pass. Figures are written when the model is called the next time, read from the
    observer, or at the end of the process. Raises TypeError or ValueError for something that is not compiled or was asked for nonsense.
    """
    return Observer(compiled, every, file, elements)


class Observer(Observations):
    """Observes what it was made for until `remove`. What it found is read as from `Observations`."""

    def __init__(self, compiled: Any, every: int, file: str | Path | None, elements: int | None) -> None:
        super().__init__()
        for name, value in (("every", every), ("elements", elements)):
            if (value is not None or name == "every") and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"quartet.observe: {name} is a whole number from 1 on, not {value!r}")
        self.every, self.elements = every, elements
        self.calls = 0
        self._observing = False
        if file is not None:
            Path(file).parent.mkdir(parents=True, exist_ok=True)
        self._log = _Log(self._all, file)
        self._listeners: deque[_Listener] = deque(maxlen=CALLS_REMEMBERED)
        self._undo: list[Callable[[], None]] = []
        self._function: Callable[..., Any] | None = None
        self._attach(compiled)
        atexit.register(self._log.flush)

    def remove(self) -> None:
        """Stop observing; the model is as it was before."""
        while self._undo:
            self._undo.pop()()
        self._observing = False
        self._listeners.clear()
        self._log.flush()
        atexit.unregister(self._log.flush)

    @property
    def records(self) -> list[Observation]:
        """All observations so far."""
        self._log.flush()
        return self._all

    def _nothing(self) -> str:
        if not self.calls:
            return "nothing observed yet: the model has not been called in training mode, with gradients"
        return (
            f"nothing observed in {self.calls} calls: no linear in NVFP4 ran in those that were to be. Is the model compiled with "
            'backend="quartet"? print(quartet.report(compiled)) tells what its linears became'
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The compiled function that this observer is for."""
        if self._function is None:
            raise TypeError("quartet.observe: the observer of a module is not called; call the module as before")
        return self._function(*args, **kwargs)

    # -- where calls begin

    def _attach(self, compiled: Any) -> None:
        """Have calls of a model counted, and those of what is compiled in it enter the scope."""
        if not isinstance(compiled, nn.Module):
            if not callable(compiled) or not hasattr(compiled, "_torchdynamo_orig_callable"):
                raise TypeError(f"quartet.observe takes what torch.compile returned, or a module with compiled parts, not {compiled!r}")
            self._function = self._around(compiled, None, "", begins=True)
            self._undo.append(lambda: setattr(self, "_function", compiled))
            return
        entries = list(_compiled_parts(compiled, ""))
        if not entries:
            raise ValueError(
                f"quartet.observe: no part of {type(compiled).__name__} is compiled; give it what torch.compile returned, or compile first"
            )
        if any(hasattr(module.__dict__[attribute], _OBSERVED) for module, attribute, _ in entries):
            raise ValueError(f"quartet.observe: {type(compiled).__name__} is observed already; remove the other observer first")
        for module, attribute, prefix in entries:
            own = module.__dict__[attribute]
            inner = getattr(module, "_orig_mod", module)
            ours = self._around(own, inner, prefix, begins=module is compiled)
            module.__dict__[attribute] = ours
            self._undo.append(functools.partial(_put_back, module.__dict__, attribute, ours, own))
        if entries[0][0] is not compiled:
            self._undo.append(compiled.register_forward_pre_hook(lambda module, args: self._begin(module), prepend=True).remove)

    def _around(self, call: Callable[..., Any], module: nn.Module | None, prefix: str, begins: bool) -> Callable[..., Any]:
        """A compiled callable that enters the scope where a call is observed. begins: a call of it is one of the model."""

        @functools.wraps(call)
        def entering(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return call(*args, **kwargs)
            if begins:
                self._begin(module)
            if not self._observing or not torch.is_grad_enabled():
                return call(*args, **kwargs)
            with _Scope(str(self.elements or 0), OBSERVED_KEY), _entered(_Entry(self, module, prefix)):
                return call(*args, **kwargs)

        setattr(entering, _OBSERVED, True)
        return entering

    def _begin(self, module: nn.Module | None) -> None:
        """A call of the model: of one before, all that is known by now is written."""
        if self._observing and not self._log.heard:
            log.warning(
                "quartet.observe: call %d was to be observed, but no linear in NVFP4 ran in it; is the model compiled with "
                'backend="quartet"?',
                self.calls - 1,
            )
        self._log.flush()
        self._observing = False
        if torch.is_grad_enabled() and (module is None or module.training):
            self._observing, self._log.heard = self.calls % self.every == 0, False
            self._log.rank = (ops.rank(), _ranks())
            self.calls += 1

    def listener(self, entered: Iterable[tuple[Tensor, str]], module: nn.Module | None, prefix: str) -> _Listener:
        """Of one call of a graph, which these parameters entered, under their names in it."""
        new = _Listener(self._log, self.calls - 1, begins(entered, parameter_paths(module, prefix)))
        if torch._C._current_graph_task_id() != -1:  # a backward pass runs: checkpointing in eager code calls the graph again
            same = (each for each in reversed(self._listeners) if (each.call, each.begins) == (new.call, new.begins) and not each.again)
            first = next(same, None)
            if first is not None:
                first.again, new.again, new.seen = True, True, first.seen
        self._listeners.append(new)
        return new


def _compiled_parts(module: nn.Module, prefix: str) -> Iterator[tuple[nn.Module, str, str]]:
    """(module, attribute that is called, name) of the outermost compiled modules."""
    if isinstance(module, OptimizedModule):
        yield module, "forward", prefix
    elif module.__dict__.get("_compiled_call_impl") is not None:
        yield module, "_compiled_call_impl", prefix
    else:
        for name, child in module.named_children():
            yield from _compiled_parts(child, prefix if name in WRAPPERS else f"{prefix}.{name}" if prefix else name)


def _put_back(state: dict[str, Any], attribute: str, ours: Any, own: Any) -> None:
    if state.get(attribute) is ours:
        state[attribute] = own


def _ranks() -> int:
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


# ---------------------------------------------------------------- calls of graphs


class _Entry(NamedTuple):
    """A compiled module that is being called, and its name in the model."""

    observer: Observer
    module: nn.Module | None
    name: str


_entries: list[_Entry] = []


@contextmanager
def _entered(entry: _Entry) -> Iterator[None]:
    _entries.append(entry)
    try:
        yield
    finally:
        _entries.pop()


def heard(compiled: Callable[..., Any], parameters: Mapping[int, str]) -> Callable[..., Any]:
    """A compiled graph of an observed version, whose operators find the observer. parameters: index of an argument -> name in the graph."""

    @functools.wraps(compiled)
    def called(*args: Any) -> Any:
        observer, module, name = _entries[-1]
        entered = ((args[index], parameter) for index, parameter in parameters.items())
        with heard_by(observer.listener(entered, module, name)):
            return compiled(*args)

    return called


class _Listener:
    """Hears of one call of a graph, and knows the names of its linears in the model. begins: see `names_in_model`."""

    def __init__(self, log: _Log, call: int, begins: Mapping[str, list[str]]) -> None:
        self.log, self.call, self.begins = log, call, begins
        self.seen: set[str] = set()
        """Labels of what was shown: what checkpointing computes again, or a second backward pass of a retained graph, is not recorded."""
        self.again = False
        """Whether the same call of the graph has another listener, as it runs again."""

    def take(self, labels: Sequence[str], sums: Tensor) -> None:
        kinds = [None if each in self.seen else self._kind(each) for each in labels]
        self.seen.update(labels)
        if any(kinds):
            self.log.add(_Shown(self.call, kinds, sums))

    def _kind(self, label: str) -> _Kind:
        rule, *uses = label.split("\n")
        places = []
        for use in uses:
            product, operand, name = use.split(" ", 2)
            places.append((names_in_model(name, self.begins)[0], product, operand.strip("-")))
        return _Kind(rule, places)


# ---------------------------------------------------------------- records


class _Kind(NamedTuple):
    """What sums are of. rule: of the quantizer, "" for a product. places: (linear, product, operand) of each use."""

    rule: str
    places: list[tuple[str, str, str]]


class _Shown(NamedTuple):
    """What a graph has shown in one call. kinds: of the sums [n, parts, 9], None for those that are to be left out."""

    call: int
    kinds: list[_Kind | None]
    sums: Tensor


class _Log:
    """Sums of observed calls, and the observations made of them, which are written to a file."""

    def __init__(self, records: list[Observation], file: str | Path | None) -> None:
        self.records, self.file = records, file
        self.pending: list[_Shown] = []
        self.heard = False
        self.rank = (0, 1)

    def add(self, shown: _Shown) -> None:
        self.pending.append(shown)
        self.heard = True

    def flush(self) -> None:
        """Record what is there. Waits for the device if anything is."""
        if not self.pending:
            return
        pending, self.pending = self.pending, []
        made = []
        for shown in pending:
            found = figures(shown.sums, [kind is not None and kind.rule != "" for kind in shown.kinds])
            made += [
                Observation(shown.call, self.rank[0], *place, kind.rule, **of._asdict())
                for kind, of in zip(shown.kinds, found, strict=True)
                if kind is not None
                for place in kind.places
            ]
        self.records += made
        if self.file is not None:
            with open(self._path(), "a", encoding="utf-8") as lines:
                lines.writelines(f"{each.to_json()}\n" for each in made)

    def _path(self) -> Path:
        path = Path(self.file)  # type: ignore[arg-type]
        rank, ranks = self.rank
        return path if ranks == 1 else path.with_name(f"{path.stem}.rank{rank}{path.suffix}")
