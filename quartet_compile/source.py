"""A graph as a Python file that one can read and run.

Run as a program, it calls the graph with inputs of its shapes and prints the shapes of its results. Numbers are random, and integers zeros,
since they may be indices; constants of the graph are written down if they are small.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from quartet_compile.flops import hint

SMALL = 64
"""Elements of the largest constant that is written down."""

HEADER = '''\
import torch
from math import inf, nan
from torch import device

import quartet_compile.backend  # registers the operators


'''

FOOTER = '''

def tensor(shape, stride, dtype, where):
    """A tensor of this form: random numbers, or zeros for integers, which may be indices."""
    x = torch.empty_strided(shape, stride, dtype=dtype, device=where)
    if dtype == torch.uint8:
        return x.random_(0, 256)
    return x.copy_(torch.randn(shape)) if dtype.is_floating_point else x.zero_()


def inputs():
    return [{inputs}]


def graph():
    module = GraphModule()
    {attributes}
    return module


if __name__ == "__main__":
    with torch.no_grad():
        results = graph()(*inputs())
    for result in torch.utils._pytree.tree_leaves(results):
        print(tuple(result.shape) if isinstance(result, torch.Tensor) else result)
'''


def source(gm: GraphModule | None) -> str:
    """The file; "" for no graph."""
    if gm is None:
        return ""
    code = gm.print_readable(print_output=False).replace("class <lambda>(", "class GraphModule(", 1).strip()
    inputs = "".join(f"\n        {_input(node)},  # {node.name}" for node in gm.graph.find_nodes(op="placeholder"))
    attributes = _attributes(gm, "module", "GraphModule")
    return HEADER + code + FOOTER.format(inputs=inputs + "\n    " if inputs else "", attributes="\n    ".join(attributes) or "pass")


def _input(placeholder: Node) -> str:
    value = placeholder.meta.get("val")
    if isinstance(value, torch.Tensor):
        return _tensor(value)
    return repr(hint(value)) if isinstance(value, (int, torch.SymInt)) else repr(value)


def _tensor(value: torch.Tensor) -> str:
    shape, stride = (tuple(hint(n) for n in sizes) for sizes in (value.shape, value.stride()))
    return f"tensor({shape}, {stride}, {value.dtype}, {str(value.device)!r})"


def _attributes(gm: GraphModule, name: str, of: str) -> list[str]:
    """Statements that give the module its constants, and the graphs of regions and branches."""
    statements: dict[str, None] = {}
    for node in gm.graph.find_nodes(op="get_attr"):
        value: Any = gm
        for part in str(node.target).split("."):
            value = getattr(value, part)
        target = f"{name}.{node.target}"
        if isinstance(value, GraphModule):
            # the class inside has the same name, and would be found before a submodule
            statements[f'vars({name})["{node.target}"] = {of}.{node.target}()'] = None
            statements |= dict.fromkeys(_attributes(value, target, f"{of}.{node.target}"))
        elif isinstance(value, torch.Tensor):
            small = value.numel() <= SMALL and not isinstance(value, torch._subclasses.FakeTensor)
            made = f"torch.tensor({value.tolist()}, dtype={value.dtype}, device={str(value.device)!r})" if small else _tensor(value)
            statements[f"{target} = {made}"] = None
    return list(statements)
