"""What differs between the versions of torch that are supported, each with the versions it is for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass


def inductor_settings(mode: str | None, options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Inductor's config patches for a mode and options, parsed and checked by torch itself."""
    wrapper = torch._TorchCompileInductorWrapper
    # `name` exists from 2.13 on.
    name = {"name": None} if "name" in inspect.signature(wrapper.__init__).parameters else {}
    return dict(wrapper(mode, dict(options or {}), None, **name).config)


def autotunes(settings: Mapping[str, Any]) -> bool:
    """Whether Inductor measures its choices for products under these patches."""
    fields = ("max_autotune", "max_autotune_gemm")
    return any(settings.get(field, getattr(torch._inductor.config, field)) for field in fields)


def partitions_cuda_graphs(settings: Mapping[str, Any]) -> bool:
    """Whether Inductor makes CUDA graphs of the parts of a graph between operators that cannot be in one."""

    def value(field: str) -> Any:
        return settings.get(field, getattr(torch._inductor.config, field))

    return bool(value("graph_partition")) and not value("cpp_wrapper")


def custom_passes(setting: Any) -> list[Callable[..., Any]]:
    """The passes held by a config field: one pass or None up to 2.12, also a list from 2.13 on."""
    if setting is None:
        return []
    return list(setting) if isinstance(setting, (list, tuple)) else [setting]


class PassSequence(CustomGraphPass):
    """Several graph passes as one, for versions whose config fields hold a single pass."""

    def __init__(self, passes: list[Callable[..., Any]]) -> None:
        self.passes = passes

    def __call__(self, graph: torch.fx.Graph) -> None:
        for each in self.passes:
            each(graph)

    def uuid(self) -> Any:
        """None, which turns Inductor's cache off, as soon as one of the passes cannot be identified."""
        identities = [each.uuid() if isinstance(each, CustomGraphPass) else None for each in self.passes]
        return None if None in identities else tuple(identities)


def fresh_compile_options() -> dict[str, Any]:
    """Arguments of torch.compile that keep its entries apart from other compilations of the same code (from 2.12 on)."""
    return {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}
