"""What a report says of the choice that Inductor took for each product, against what Inductor measured."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import ir
from torch._inductor.lowering import lowerings
from torch._inductor.select_algorithm import AlgorithmSelectorCache, ExternKernelChoice, add_feedback_saver, get_algorithm_selector_cache

import quartet_compile as quartet
from quartet_compile import account
from quartet_compile.kernels import chosen
from quartet_compile.kernels.chosen import Choice
from quartet_compile.kernels.cpu import build
from quartet_compile.reports import Report

operators = torch.ops.quartet


def quick_product(*operands: Tensor, scale: float, out: Tensor) -> Tensor:
    return out.copy_(operators.matmul(*operands, None, scale, out.dtype))


def slow_product(*operands: Tensor, scale: float, out: Tensor) -> Tensor:
    time.sleep(0.02)
    return quick_product(*operands, scale=scale, out=out)


SLOW, QUICK = ExternKernelChoice(slow_product), ExternKernelChoice(quick_product)


@pytest.fixture
def choices_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products on the CPU are lowered to two choices, of which the second is the quick one; those with 80 columns to this one alone."""
    pytest.importorskip("triton")  # for the package of lowerings
    from quartet_compile.kernels.lowerings import common

    build.load()  # before caches are emptied

    def lower(a: Any, a_scales: Any, a_g: Any, b: Any, b_scales: Any, b_g: Any, bias: Any, scale: float, dtype: torch.dtype) -> Any:
        inputs = [ir.ExternKernel.require_contiguous(ir.ExternKernel.realize_input(x)) for x in (a, a_scales, a_g, b, b_scales, b_g)]
        layout = ir.FixedLayout(inputs[0].get_device(), dtype, [inputs[0].get_size()[0], inputs[3].get_size()[0]])
        offered: list[Any] = []
        for choice in (QUICK,) if layout.size[1] == 80 else (SLOW, QUICK):
            choice.maybe_append_choice(offered, input_nodes=inputs, layout=layout, scale=scale)
        return common.add_bias(common.best("product", offered, inputs, layout), bias, dtype)

    monkeypatch.setitem(lowerings, operators.matmul.default, lower)
    monkeypatch.setattr(account, "implementation", lambda device, grouped, autotuned: "bfloat16 values, autotuned")


@pytest.fixture
def measured() -> Iterator[list[dict[Any, float]]]:
    """Choice -> time of each product that Inductor measures meanwhile."""
    seen: list[dict[Any, float]] = []
    add_feedback_saver(lambda timings, *_: seen.append(timings))
    yield seen
    get_algorithm_selector_cache().feedback_saver_fns.pop()


def trained(model: nn.Module, x: Tensor) -> Report:
    torch._dynamo.reset()
    step = torch.compile(model, backend="quartet", mode="max-autotune-no-cudagraphs")
    step(x).sum().backward()
    return quartet.report(step)


@pytest.fixture
def uncached() -> Iterator[None]:
    """No graph comes from torch's caches."""
    with torch._inductor.config.patch(fx_graph_cache=False), torch._functorch.config.patch(enable_autograd_cache=False):
        yield


def test_the_fastest_is_named(choices_on_the_cpu: None, uncached: None, measured: list[dict[Any, float]]) -> None:
    model = nn.Sequential()
    model.up, model.down = nn.Linear(64, 96, bias=False), nn.Linear(96, 64)
    report = trained(model, torch.randn(32, 64, requires_grad=True))
    assert [linear.chosen.keys() for linear in report.linears] == [{"y", "dx", "dw"}] * 2
    taken = [choice for linear in report.linears for choice in linear.chosen.values()]
    assert sorted(choice.name for choice in taken) == sorted(min(times, key=times.__getitem__).name for times in measured)
    assert {(choice.name, choice.tile, choice.measured) for choice in taken} == {("quick_product", None, 2)}
    assert "  Inductor took cuBLAS for up (y dx dw), down (y dx dw)" in str(report).splitlines()
    assert "not known" not in str(report)
    assert report.to_dict()["graphs"][0]["linears"][0]["chosen"]["dw"] == {"name": "quick_product", "tile": None, "measured": 2}


@pytest.mark.slow
def test_torchs_cache_keeps_no_choices(choices_on_the_cpu: None, fresh_caches: None) -> None:
    model, x = nn.Sequential(nn.Linear(64, 64)), torch.randn(32, 64, requires_grad=True)
    assert [linear.chosen.keys() for linear in trained(model, x).linears] == [{"y", "dx", "dw"}]
    report = trained(model, x)
    assert [linear.chosen for linear in report.linears] == [{}]
    assert "  what Inductor takes is not known of 3 products: their code came from torch's cache" in str(report).splitlines()


def test_a_single_choice_is_not_measured(choices_on_the_cpu: None, uncached: None) -> None:
    report = trained(nn.Sequential(nn.Linear(64, 80)), torch.randn(32, 64))
    (linear,) = report.linears
    assert linear.products == ("y", "dw")
    assert set(linear.chosen) == {"dw"}  # [80, 64]; y is [32, 80]
    assert "  what Inductor takes is not known of 1 products: nothing was measured in this process" in str(report).splitlines()


def test_on_the_cpu_there_is_no_choice(uncached: None) -> None:
    report = trained(nn.Sequential(nn.Linear(64, 64)), torch.randn(32, 64))
    assert report.rewritten
    assert [linear.chosen for linear in report.linears] == [{}]
    assert "emulated on the CPU" in str(report)
    assert "Inductor" not in str(report)


def test_nothing_is_noted_of_other_compilations(choices_on_the_cpu: None, uncached: None, monkeypatch: pytest.MonkeyPatch) -> None:
    noted: list[Any] = []
    monkeypatch.setattr(chosen, "_Offer", lambda *args: noted.append(args))
    q = [torch.zeros(64, 32, dtype=torch.uint8), torch.ones(64, 4).to(torch.float8_e4m3fn), torch.ones(())]

    @torch.compile(options={"max_autotune": True})
    def squared(*q: Tensor) -> Tensor:
        return operators.matmul(*q, *q, None, 1.0, torch.float32)

    assert squared(*q).shape == (64, 64)
    assert noted == []


# ---------------------------------------------------------------- products on GPUs


def of_values(a: Tensor, b: Tensor) -> Tensor:
    return operators.matmul_values(a, b, None, torch.bfloat16)


def of_packed(codes: Tensor, scales: Tensor, g: Tensor) -> Tensor:
    matrix = codes, operators.swizzle(scales), g
    return operators.matmul_swizzled(*matrix, *matrix, None, 1.0, torch.bfloat16)


def values() -> list[Tensor]:
    return [torch.empty((rows, 512), dtype=torch.bfloat16, device="cuda") for rows in (256, 384)]


def packed() -> list[Tensor]:
    forms = ((256, 256), torch.uint8), ((256, 32), torch.float8_e4m3fn), ((), torch.float32)
    return [torch.empty(shape, dtype=dtype, device="cuda") for shape, dtype in forms]


H100, B200 = (90, of_values, values), (100, of_packed, packed)
LIBRARIES = ("quartet_product", "quartet_library_product")


@pytest.mark.parametrize("deferred", [True, False], ids=["settled by the scheduler", "at once"])
@pytest.mark.parametrize(
    ("gpu", "fastest"),
    [(H100, "quartet_product"), (H100, "triton_mm"), (B200, "quartet_library_product"), (B200, "triton_quartet_packed_product")],
    ids=lambda value: value if isinstance(value, str) else f"sm_{value[0]}",
)
def test_what_the_program_for_a_gpu_runs_is_named(gpu: Any, fastest: str, deferred: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With made-up times, and the program that Inductor generates for a GPU that is not there as the witness."""
    pytest.importorskip("triton")
    from fake_gpu import fake_gpu, generate

    import quartet_compile.kernels.lowerings  # noqa: F401  (registers them)

    capability, product, inputs = gpu

    def product_and_more(*operands: Tensor) -> Tensor:
        return torch.relu(product(*operands)) * 2

    offered: list[str] = []

    def timings(self: Any, name: str, nodes: Any, layout: Any, generators: Any, key: str, choices: list[Any], *_: Any, **__: Any) -> Any:
        offered.extend(choice.name for choice in choices)
        winner = [choice for choice in choices if choice.name.startswith(fastest)][-1]
        return {choice: 1.0 if choice is winner else 2.0 for choice in choices}

    monkeypatch.setattr(AlgorithmSelectorCache, "do_autotuning", timings)
    found: dict[str, Choice] = {}
    with fake_gpu(capability), chosen.heard(found):
        # Deferred, Inductor would measure what follows together with the product, and there is no GPU.
        function = product if deferred else product_and_more
        program, kernels = generate(function, inputs, max_autotune=True, benchmark_epilogue_fusion=deferred)
    (taken,) = found.values()
    assert taken.name == [name for name in offered if name.startswith(fastest)][-1]
    assert taken.measured == len(offered) > 4
    templates = [kernel.source for kernel in kernels if "triton_tem" in kernel.name]
    if fastest in LIBRARIES:
        assert f"extern_kernels.{fastest}(" in program
        assert not templates
        assert taken.tile is None
    else:
        (source,) = templates
        sizes = dict(re.findall(r"(BLOCK_[MNK]) : tl.constexpr = (\d+)", source))
        assert taken.tile == tuple(int(sizes[name]) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
        assert str(taken).startswith("Triton tiles of ")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_one_of_the_measured_choices_is_named(uncached: None, measured: list[dict[Any, float]]) -> None:
    with torch.device("cuda"):
        report = trained(nn.Sequential(nn.Linear(512, 256, dtype=torch.bfloat16)), torch.randn(256, 512).bfloat16().requires_grad_())
    (linear,) = report.linears
    assert set(linear.chosen) == {"y", "dx", "dw"}
    for choice in linear.chosen.values():
        assert choice.measured > 5
        offered = next(one for times in measured for one in times if one.name == choice.name)
        assert (offered.info_dict()["backend"] == "extern") == (choice.tile is None)
    assert "  Inductor took " in str(report)
    assert "not known" not in str(report)
