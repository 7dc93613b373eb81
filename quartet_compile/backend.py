"""The backend itself: what `torch.compile(model, backend="quartet")` calls with each captured graph.

It finds out which graph inputs are parameters, turns options and surroundings into a policy, and hands the graph to Inductor with our pass
in front of its own joint-graph passes. Nothing global is touched: all settings are patches of this one compilation. Inputs that are
tables of embeddings are marked as such (`embeddings`).
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import torch
import torch.fx.traceback
from torch.fx import GraphModule

from quartet_compile import embeddings, observer
from quartet_compile.compilations import Compilation
from quartet_compile.kernels.chosen import heard
from quartet_compile.options import Options, split_options
from quartet_compile.passes import compat
from quartet_compile.passes.emulate import EmulationPass
from quartet_compile.passes.locate import dotted
from quartet_compile.passes.match import KEPT_WHOLE
from quartet_compile.passes.native import NativePass
from quartet_compile.passes.pipeline import QuartetPass, Result, fingerprint
from quartet_compile.passes.place import CHANNEL_KEY, MODULE_KEY, OBSERVED_KEY, SCOPE_KEY, Scope
from quartet_compile.passes.precompile import PrecompilePass
from quartet_compile.passes.show import ShowPass
from quartet_compile.passes.tell import tell_decisions

log = logging.getLogger("quartet_compile")

PASS_FIELD = "joint_custom_pre_pass"
DEVICE_FIELD = "post_grad_custom_pre_pass"


def quartet(
    gm: GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """Compile a captured graph with its linears in NVFP4. torch.compile calls it; see `Options` for the ``quartet.*`` options."""
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    ours, inductor_options = split_options(options)
    if mode is not None and ours.said_by.get("mode") == "quartet.mode":
        raise ValueError("give mode= or the option quartet.mode, not both")
    devices = {x.device for x in example_inputs if isinstance(x, torch.Tensor)}
    for device in devices:
        tell_if_emulated(device)
    if any(device.type == "cuda" for device in devices):
        import quartet_compile.kernels.lowerings  # noqa: F401  (registers them)
    scope, tables = active_scope(), embeddings.mark_all(gm, example_inputs)
    parameters, embedded = parameter_names(gm, example_inputs), embeddings.marked(example_inputs)
    compilation = Compilation(gm, example_inputs, parameters, embedded, ours, scope)
    patches = inductor_patches(gm, parameters, embedded, ours, inductor_options, mode, scope, compilation.decided)
    compilation.autotuned = compat.autotunes(patches)
    inner: Any = heard(compilation.chosen)(compile_fx_inner)
    compiled: Any = compile_fx(gm, example_inputs, inner_compile=inner, config_patches=patches, decompositions=Decompositions())
    if compilation.cached and is_listening():
        tell_cached(compilation)
    if scope.observed is not None:
        compiled = observer.heard(compiled, parameters)
    return only_in_scope(embeddings.marking(compilation.kept_by(compiled), tables), scope)


def is_listening() -> bool:
    """Whether somebody reads what we tell: logs, or torch's structured trace, whose handler goes if it has nowhere to write."""
    tracing = torch._logging._internal
    return log.isEnabledFor(logging.INFO) or any(isinstance(h, tracing.LazyTraceHandler) for h in tracing.trace_log.handlers)


def tell_cached(compilation: Compilation) -> None:
    """What the pass would have told, if torch had not found its work in a cache: it is done again for the telling."""
    from quartet_compile.running import look_into  # which imports this file

    for result in look_into([compilation]).results:
        tell_decisions(result.decisions, result.unmatched, cached=True)


def inductor_patches(
    gm: GraphModule, parameters: Mapping[int, str], embedded: Set[int], ours: Options, inductor_options: Mapping[str, Any],
    mode: str | None, scope: Scope, on_result: Callable[[Result], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Inductor's settings for one compilation: the user's own, with our passes behind the user's."""
    patches = compat.inductor_settings(ours.mode or mode, inductor_options)
    if scope.observed is not None and not compat.partitions_cuda_graphs(patches):
        patches["triton.cudagraphs"] = False  # a replay would run no Python, so that nobody would hear of anything
    rewriting = QuartetPass(parameters, ours.policy(scope), ours.recompute, fingerprint(gm), on_result, embedded)
    observing = [] if scope.observed is None else [ShowPass()]
    for field, ours_there in ((PASS_FIELD, [rewriting]), (DEVICE_FIELD, [*observing, EmulationPass(), NativePass(), PrecompilePass()])):
        users = compat.custom_passes(patches.get(field, getattr(torch._inductor.config, field)))
        patches[field] = compat.PassSequence([*users, *ours_there])
    return patches


def parameter_names(gm: GraphModule, example_inputs: Sequence[Any]) -> dict[int, str]:
    """Index -> dotted name of the graph inputs that are nn.Parameters, or stand in for one.

    The inputs themselves tell: placeholders carry fake tensors, and under DDP's splits not even those say what they were.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    weights = _weights_of_linears(gm.graph)
    names = {}
    for index, (node, value) in enumerate(zip(placeholders, example_inputs, strict=True)):
        if isinstance(value, torch.nn.Parameter) or isinstance(node.meta.get("example_value"), torch.nn.Parameter) or node in weights:
            names[index] = _dotted_name(node)
    return names


def _weights_of_linears(graph: torch.fx.Graph) -> set[torch.fx.Node]:
    """Inputs that an nn.Linear, however it came by them, multiplies by: those of `torch.func.functional_call` are plain tensors."""
    found = set()
    for node in graph.find_nodes(op="call_function", target=torch.nn.functional.linear):
        modules = list((node.meta.get("nn_module_stack") or {}).values())
        weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
        if isinstance(weight, torch.fx.Node) and modules and issubclass(modules[-1][1], torch.nn.Linear):
            found.add(weight)
    return found


def _dotted_name(placeholder: torch.fx.Node) -> str:
    """The name that Dynamo's source gives an input, such as "layers.0.q.weight"; its own name where there is none."""
    name = getattr(getattr(placeholder, "_dynamo_source", None), "name", None)
    text = name() if callable(name) else name  # a method up to 2.11, a property later
    if not isinstance(text, str):
        return str(placeholder.target)
    return dotted(text) or re.sub(r"\W+", ".", text[1:]).strip(".")  # "w1" for "L['w1']", an argument of a function


class Decompositions(dict[Any, Callable[..., Any]]):
    """Inductor's decompositions without those of matrix products, which would turn products with a dimension of 1, or with a vector, into
    pointwise code that cannot be recognised as a linear any more.

    Pickles as a call of this class: Inductor puts the table into its cache key, where functions of torch's C++ parts have no place.
    """

    def __init__(self) -> None:
        from torch._inductor.decomposition import select_decomp_table

        super().__init__({op: f for op, f in select_decomp_table().items() if op not in KEPT_WHOLE})

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Decompositions, ()


@functools.cache
def tell_if_emulated(device: torch.device) -> None:
    """Say once, in one line, that a device has no FP4 tensor cores."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 10:
        name = torch.cuda.get_device_name(device)
        log.warning("%s has no FP4 tensor cores: NVFP4 is emulated, with the same numbers and no gain in speed", name)
    if device.type == "cpu":
        log.warning("on the CPU NVFP4 is emulated, with the same numbers and no gain in speed")


# ---------------------------------------------------------------- contexts around a compiled call


def active_scope() -> Scope:
    """The recipes whose contexts eager code is in right now, and whether it is in an observed call."""
    custom = torch.fx.traceback.current_meta.get("custom") or {}
    observed = int(custom[OBSERVED_KEY]) if OBSERVED_KEY in custom else None
    return Scope(custom.get(SCOPE_KEY), custom.get(MODULE_KEY), custom.get(CHANNEL_KEY, Scope.channel), observed)


def only_in_scope(compiled: Callable[..., Any], scope: Scope) -> Callable[..., Any]:
    """`compiled`, refusing to run in another scope than the one it was compiled in.

    `quartet.recipe` makes Dynamo guard on its scopes, so that this does not happen; but where a decorated function breaks the graph in a
    function that it calls, Dynamo itself enters the annotation, without our guard. Better an error than the recipe of the first call.
    """

    @functools.wraps(compiled)
    def checked(*args: Any) -> Any:
        if active_scope() != scope:
            raise RuntimeError(
                f"this graph was compiled under {_describe(scope)} and is now called under {_describe(active_scope())}: a function that "
                "both share breaks the graph, and torch does not guard on the recipe there. Use quartet.set_recipe on the modules instead "
                "of the decorator, or remove the graph break (TORCH_LOGS=graph_breaks shows it)."
            )
        # What a scope is guarded by hears of every call of a torch function: of those in compiled code, for nothing.
        with contextlib.nullcontext() if scope == Scope() else torch._C.DisableTorchFunction():
            return compiled(*args)

    return checked


def _describe(scope: Scope) -> str:
    said = [f"quartet.{where}({name!r})" for where, name in (("recipe", scope.code), ("set_recipe", scope.module)) if name is not None]
    if scope.observed is not None:
        said.append("quartet.observe")
    return " and ".join(said) or "no quartet.recipe context"


# What torch.compile and Dynamo look for on a backend.
quartet.reset = lambda: torch._TorchCompileInductorWrapper(None, None, None).reset()  # type: ignore[attr-defined]
