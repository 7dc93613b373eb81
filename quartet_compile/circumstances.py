"""Under which circumstances Dynamo hands a graph to the backend: whose call it is in, and why the graph begins and ends where it does."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._dynamo import eval_frame
from torch._dynamo.utils import get_metrics_context
from torch.fx import GraphModule


def modules_being_called() -> Iterator[nn.Module]:
    """The modules whose calls are on the stack. Of other functions no locals are read: Python would keep them until the function ends."""
    for frame in _frames():
        if frame.f_code is nn.Module._wrapped_call_impl.__code__:
            yield frame.f_locals["self"]


def contexts_being_called() -> Iterator[Any]:
    """Dynamo's contexts of the compiled calls on the stack: each call of torch.compile makes one."""
    for frame in _frames():
        if frame.f_code.co_name == "compile_wrapper" and frame.f_code.co_filename == eval_frame.__file__:
            yield frame.f_locals["self"]


def _frames() -> Iterator[Any]:
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        yield frame


@dataclass(frozen=True)
class Circumstances:
    """Of one compilation, by Dynamo.

    compile_id: "2/1" for the second compilation of the third frame. graph_break: why the graph ends before its function returns, and
    where, or "". recompiled: which guard failed, if the frame was compiled before, or "". modules, contexts: weak references to those
    being called.
    """

    compile_id: str
    graph_break: str
    recompiled: str
    modules: tuple[weakref.ref[nn.Module], ...]
    contexts: tuple[weakref.ref[Any], ...]

    @property
    def frame(self) -> str:
        """Number of the frame: what its compilations have in common."""
        return self.compile_id.partition("/")[0]

    @property
    def callers(self) -> set[int]:
        """Identities of the modules and contexts that were being called and still live."""
        return {id(one) for reference in (*self.modules, *self.contexts) if (one := reference()) is not None}


def circumstances(gm: GraphModule) -> Circumstances:
    """Those of the graph that Dynamo is handing over right now."""
    return Circumstances(
        str(torch._guards.CompileContext.current_compile_id() or ""), _graph_break(gm), _recompiled(),
        tuple(map(weakref.ref, modules_being_called())), tuple(map(weakref.ref, contexts_being_called())),
    )  # fmt: skip


def _graph_break(gm: GraphModule) -> str:
    reason: Any = getattr(gm, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return ""
    where = f" ({Path(reason.user_stack[-1].filename).name}:{reason.user_stack[-1].lineno})" if reason.user_stack else ""
    return reason.reason.strip().splitlines()[0] + where


def _recompiled() -> str:
    reason = get_metrics_context()._metrics.get("recompile_reason")  # Dynamo sets it before it traces the frame
    guard = str(reason).strip().splitlines()[0].partition("  #")[0].strip() if reason else ""  # its code follows as a comment
    words = next((words for part, words in OUR_GUARDS if part in guard), "")
    return f"{words} ({guard})" if words else guard


OUR_GUARDS = (
    ("___dict_contains('forward'", "a recipe was set on a module, or taken back"),
    ("_quartet_recipe", "a recipe was set on a module, or taken back"),
    ("___check_torch_function_mode_stack", "it is called in another context, such as quartet.recipe or torch.device"),
)
"""Guards that recipes make fail, by a part of their text, in words."""
