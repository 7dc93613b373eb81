"""`quartet explain package.module:factory`: what would become of each linear of a model, without a line of code."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quartet_compile.cli import loading
from quartet_compile.cli.output import UserError, print_json, print_report, waiting

if TYPE_CHECKING:
    from quartet_compile.reports import Report

DEVICES = ("cpu", "meta", "cuda")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "quartet explain MODULE:FACTORY [--input SHAPE:DTYPE ...] [options]"
    parser.add_argument(
        "factory", metavar="MODULE:FACTORY",
        help="a function without arguments that returns a model, (model, args) or (model, args, kwargs),\n"
        "or a module or its class; the current folder is searched, too",
    )  # fmt: skip
    parser.add_argument(
        "--input", action="append", default=[], metavar="[NAME=]SHAPE[:DTYPE]",
        help="an argument of the model, for instance 8x1024:int64 (zeros) or 8x64 (float32, normal numbers); may be repeated.\n"
        "Those without NAME take the place of the factory's",
    )  # fmt: skip
    parser.add_argument(
        "--device", choices=DEVICES, default="cpu",
        help="where to make the model and run it once; meta: shapes only, as on the CPU, for models of any size (default: cpu)",
    )  # fmt: skip
    parser.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE",
        help="of torch.compile, for instance quartet.exclude=*.gate; a key that is repeated is a list",
    )  # fmt: skip
    parser.add_argument("--autocast", metavar="DTYPE", help="run the model under torch.autocast, for instance bfloat16")
    parser.add_argument("--inference", action="store_true", help="explain inference (eval, no_grad) instead of training")
    parser.add_argument("--save", metavar="FILE", help="write the report as a page (report.html) or as data (report.json)")
    parser.add_argument("--graphs", metavar="FOLDER", help="write the rewritten graphs as Python")
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")


def run(arguments: argparse.Namespace) -> int:
    """0, or 2 through `UserError`; what the model's own code raises in eager mode is not caught."""
    options = loading.options(arguments.option)
    if arguments.save:
        check_path(arguments.save)
    # What the user's module prints is no part of the report.
    with waiting(f"explaining {arguments.factory}"), contextlib.redirect_stdout(sys.stderr):
        report = explained(arguments, options)
    if arguments.save:
        save(report, arguments.save)
    if arguments.graphs:
        written = report.write_graphs(arguments.graphs)
        print(f"wrote {len(written)} graphs to {arguments.graphs}", file=sys.stderr)
    if arguments.json:
        print_json(report.to_dict())
    else:
        print_report(str(report))
    return 0


def explained(arguments: argparse.Namespace, options: dict[str, Any]) -> Report:
    import torch

    from quartet_compile.capture import explain
    from quartet_compile.options import split_options
    from quartet_compile.passes import compat

    try:
        ours, others = split_options(options)
        compat.inductor_settings(ours.mode, others)
    except (ValueError, TypeError, RuntimeError) as error:  # which torch raises for unknown options
        raise UserError(str(error).partition(", known options are")[0]) from error  # torch goes on with the 600 that there are
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU here (quartet doctor tells why). --device meta needs none")
    found = loading.find(arguments.factory)
    with numbers(arguments.device) as shapes_only:
        with torch.device("cuda") if arguments.device == "cuda" else contextlib.nullcontext():
            call = loading.make(found, arguments.factory)
            loading.add_inputs(call, arguments.input)
        move(call, arguments.device, shapes_only)
        if not call.args and not call.kwargs:
            raise UserError(
                "nothing says what the model is called with: give --input, for instance --input 8x1024:int64, or let the factory return"
                " (model, args)"
            )
        loading.check_arguments(call)
        with mode(arguments, call.model), told_what_to_do(arguments.device):
            return explain(call.model, *call.args, options=options, **call.kwargs)


@contextlib.contextmanager
def numbers(device: str) -> Iterator[Any]:
    """On "meta", tensors made inside have shapes and no numbers: fake tensors of the CPU, so that what is traced is what a CPU would run.

    Yields the mode that makes them, or None.
    """
    if device != "meta":
        yield None
        return
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        yield fake


def move(call: loading.Call, device: str, shapes_only: Any) -> None:
    """Bring a model that was made before, and its arguments, to where they are explained."""
    import torch
    from torch import nn
    from torch._subclasses.fake_tensor import FakeTensor
    from torch.utils._pytree import tree_map_only

    def there(t: torch.Tensor) -> torch.Tensor:
        if shapes_only is None:
            return t.to(device)
        return t if isinstance(t, FakeTensor) else shapes_only.from_tensor(t)

    if isinstance(call.model, nn.Module):
        if shapes_only is None:
            call.model.to(device)
        else:
            for module in call.model.modules():
                tensors: tuple[dict[str, Any], ...] = module._parameters, module._buffers
                for own in tensors:
                    own.update({name: there(t) for name, t in own.items() if t is not None})
    call.args, call.kwargs = tree_map_only(torch.Tensor, there, (call.args, call.kwargs))


@contextlib.contextmanager
def mode(arguments: argparse.Namespace, model: Any) -> Iterator[None]:
    """Training or inference, with or without autocast."""
    import torch
    from torch import nn

    with contextlib.ExitStack() as stack:
        if arguments.inference:
            stack.enter_context(torch.no_grad())
            if isinstance(model, nn.Module):
                model.eval()
        if arguments.autocast:
            dtype = getattr(torch, arguments.autocast, None)
            if not isinstance(dtype, torch.dtype):
                raise UserError(f"--autocast {arguments.autocast}: torch has no such dtype; there are bfloat16 and float16")
            stack.enter_context(torch.autocast("cuda" if arguments.device == "cuda" else "cpu", dtype))
        yield


@contextlib.contextmanager
def told_what_to_do(device: str) -> Iterator[None]:
    """Numbers that are read on meta, linears that quartet.strict stops at, arguments of the wrong shape."""
    from torch._dynamo.exc import BackendCompilerFailed, TorchRuntimeError
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException

    from quartet_compile.passes.place import UnsupportedLinear

    try:
        yield
    except BackendCompilerFailed as error:
        if not isinstance(error.inner_exception, UnsupportedLinear):
            raise
        raise UserError(str(error.inner_exception)) from error
    except TorchRuntimeError as error:
        raise UserError(f"the model fails with these arguments: {error}") from error
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException) as error:
        if device != "meta":
            raise
        raise UserError(f"the model reads numbers, which there are none of on meta ({error}): use --device cpu") from error


def check_path(path: str) -> None:
    """Before what may take minutes."""
    from quartet_compile.reports import SUFFIXES

    if Path(path).suffix not in SUFFIXES:
        raise UserError(f"--save {path}: valid suffixes are {' and '.join(SUFFIXES)}")
    if not Path(path).parent.is_dir():
        raise UserError(f"--save {path}: there is no folder {Path(path).parent}")


def save(report: Report, path: str) -> None:
    """Write the page."""
    try:
        report.save(path)
    except ImportError as error:
        raise UserError(f"--save: {error}") from error
    print(f"wrote {path}", file=sys.stderr)
