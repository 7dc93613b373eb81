"""What the pass tells while it runs: through Python's logging, under "quartet_compile", and as artifacts of torch's structured trace.

    TORCH_LOGS="quartet_compile"     every linear that is left alone, and why; how many are not
    TORCH_LOGS="+quartet_compile"    the linears that are rewritten, too, and the joint graph before and after
    TORCH_TRACE=folder               the same for tlparse: quartet_linears, quartet_joint_before, quartet_joint_after
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

from torch._logging import trace_structured
from torch.fx import Graph, GraphModule

from quartet_compile.passes.place import Decision

log = logging.getLogger("quartet_compile")


def tell_graph(graph: Graph, when: str) -> None:
    """The joint graph, "before" or "after"."""

    def readable() -> str:
        return GraphModule(graph.owning_module or {}, graph).print_readable(print_output=False)

    if log.isEnabledFor(logging.DEBUG):
        log.debug("the joint graph, %s:\n%s", when, readable())
    _artifact(f"quartet_joint_{when}", readable)


def tell_decisions(decisions: Sequence[Decision], unmatched: Sequence[tuple[str, str]], cached: bool = False) -> None:
    """The recipe of every linear. cached: the code comes from torch's cache."""
    rewritten = [d for d in decisions if not d.recipe.is_empty]
    log.info("%d of %d linears in NVFP4%s", len(rewritten), len(decisions), ", from torch's cache" if cached else "")
    for d in decisions:
        log.log(logging.INFO if d.recipe.is_empty else logging.DEBUG, "  %s", _line(d))
    for line in _unmatched(unmatched):
        log.info("  %s", line)
    _artifact("quartet_linears", lambda: "\n".join([*map(_line, decisions), *_unmatched(unmatched)]))


def _line(d: Decision) -> str:
    what = f"left: {d.linear.place}: {d.reason}" if d.recipe.is_empty else f"{d.recipe.name}: {d.linear.place}"
    return f"{what} [{d.decided_by}]"


def _unmatched(globs: Sequence[tuple[str, str]]) -> Iterator[str]:
    return (f"{option}: {glob!r} matches no linear of this graph" for option, glob in globs)


def _artifact(name: str, text: Callable[[], str]) -> None:
    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=text)
