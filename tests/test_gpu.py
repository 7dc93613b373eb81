"""The whole path on an NVIDIA GPU: the same numbers as on a CPU, one rounding, packed memory, fresh noise under CUDA graphs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import float64_recipe as independent
import pytest
import torch
from support import off_by_more_than_rounding, relative_error
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

import quartet_compile as quartet
from quartet_compile.kernels import ops, reference  # noqa: F401  (registers torch.ops.quartet)
from quartet_compile.kernels.format import Quantized

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def differing(a: torch.Tensor, b: torch.Tensor) -> int:
    return int((a.cpu().view(torch.uint8) != b.cpu().view(torch.uint8)).sum())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_operators_agree_with_the_cpu_but_for_counted_near_ties(dtype: torch.dtype) -> None:
    x = torch.randn(1000, 1100).to(dtype)
    seeds = torch.randint(-(2**62), 2**62, (2,))
    on_cpu: dict[str, Any] = {"quantize": torch.ops.quartet.quantize(x, "four_over_six")}
    on_gpu: dict[str, Any] = {"quantize": torch.ops.quartet.quantize(x.cuda(), "four_over_six")}
    for name, transpose in (("grad", False), ("grad transposed", True)):
        on_cpu[name] = torch.ops.quartet.quantize_grad(x, seeds, 0, "ms_eden", transpose)
        on_gpu[name] = torch.ops.quartet.quantize_grad(x.cuda(), seeds.cuda(), 0, "ms_eden", transpose)
    on_cpu["requantize"] = torch.ops.quartet.requantize(*on_cpu["quantize"], 1100, seeds, 1, "ms_eden")
    packed = tuple(t.cuda() for t in on_cpu["quantize"])
    on_gpu["requantize"] = torch.ops.quartet.requantize(*packed, 1100, seeds.cuda(), 1, "ms_eden")
    for name in on_cpu:
        codes, scales = (differing(a, b) for a, b in zip(on_cpu[name][:2], on_gpu[name][:2], strict=True))
        print(f"{dtype} {name}: {codes} of {on_cpu[name][0].numel()} code bytes, {scales} of {on_cpu[name][1].numel()} scales differ")
        # Four-over-six sums in a fixed order. Rotations add 128 numbers in the order of the tensor core: an error of about 2^-22 of the
        # largest, which moves a code when its quotient is that close to a midpoint, 7 of them in a range of 6, and a scale likewise.
        assert codes <= (0 if name == "quantize" else 2e-5 * on_cpu[name][0].numel())
        assert scales <= (0 if name == "quantize" else 2e-5 * on_cpu[name][1].numel() + 2)
        assert on_cpu[name][2] == on_gpu[name][2].cpu()


@pytest.mark.feature("Ways to write a linear", "linear")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
def test_a_training_step_equals_the_independent_recipe(dtype: torch.dtype, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from quartet_compile.kernels import triton_kernels

    seen: dict[bool, int] = {}
    original = triton_kernels.grad_values

    def watching(e: torch.Tensor, rotations: torch.Tensor, seeds: torch.Tensor, index: int, transposed_index: int, *rest: Any) -> Any:
        if not isinstance(seeds, FakeTensor):  # those of a rehearsal (`passes.precompile`)
            seen.update({False: int(seeds[index]), True: int(seeds[transposed_index])})
        return original(e, rotations, seeds, index, transposed_index, *rest)

    monkeypatch.setattr(triton_kernels, "grad_values", watching)
    model = nn.Linear(200, 150, bias=bias).to("cuda", dtype)
    x = torch.randn(130, 200, device="cuda", dtype=dtype, requires_grad=True)
    y = torch.compile(model, backend="quartet")(x)
    e = torch.randn_like(y)
    y.backward(e)
    x64, w64, e64 = (t.detach().double().cpu().numpy() for t in (x, model.weight, e))
    expected = torch.tensor(independent.linear(x64, w64)) + (model.bias.detach().double().cpu() if bias else 0)
    results = {
        "y": (y.cpu(), expected),
        "dx": (x.grad.cpu(), independent.dgrad(e64, w64, seen[False])),
        "dw": (model.weight.grad.cpu(), independent.wgrad(e64, x64, seen[True])),
    }
    for name, (ours, exact) in results.items():
        if dtype is torch.bfloat16:
            # one moved code in a rotated operand changes a row of the product by less than a rounding in most elements
            assert off_by_more_than_rounding(ours, exact) < 1e-2, name
        else:
            assert relative_error(ours, exact) < 1e-5, name


@pytest.fixture(params=[True, False], ids=["reduced_allowed", "reduced_refused"])
def reduced_precision_sums(request: pytest.FixtureRequest) -> Iterator[bool]:
    """cuBLAS allowed, or not, to add partial sums in the output's dtype."""
    settings, names = torch.backends.cuda.matmul, [f"allow_{dtype}_reduced_precision_reduction" for dtype in ("bf16", "fp16")]
    before = [getattr(settings, name) for name in names]
    for name in names:
        setattr(settings, name, request.param)
    yield request.param
    for name, value in zip(names, before, strict=True):
        setattr(settings, name, value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_emulation_is_one_rounding_of_the_float32_sum(dtype: torch.dtype, bias: bool, reduced_precision_sums: bool) -> None:
    def packed(rows: int) -> tuple[torch.Tensor, ...]:
        return torch.ops.quartet.quantize(torch.randn(rows, 4096, device="cuda", dtype=dtype), "four_over_six")

    a, b = packed(256), packed(192)
    offset = torch.randn(192, device="cuda", dtype=dtype) if bias else None
    y = torch.ops.quartet.matmul(*a, *b, offset, 1 / 128, dtype).double()
    exact = reference.matmul(Quantized(*a), Quantized(*b), 1 / 128) + (offset.double() if bias else 0)
    once = exact.to(dtype).double()
    assert float((y - exact).norm()) == pytest.approx(float((once - exact).norm()), rel=1e-2)
    assert torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction == reduced_precision_sums


@pytest.mark.feature("Ways to compile", "CUDA graphs (reduce-overhead): fresh noise at each replay")
def test_noise_is_fresh_at_every_replay_of_a_cuda_graph() -> None:
    model, x = nn.Linear(256, 256).cuda().bfloat16(), torch.randn(128, 256, device="cuda", dtype=torch.bfloat16)
    compiled = torch.compile(model, backend="quartet", options={"quartet.mode": "reduce-overhead"})

    def gradients(count: int) -> list[torch.Tensor]:
        found = []
        for _ in range(count):
            torch.compiler.cudagraph_mark_step_begin()
            model.zero_grad(set_to_none=True)
            compiled(x).float().square().sum().backward()
            assert model.weight.grad is not None
            found.append(model.weight.grad.clone())
        return found

    gradients(3)  # warming up and recording
    torch.manual_seed(7)
    first = gradients(20)
    for a, b in itertools.combinations(first, 2):
        assert not torch.equal(a, b), "a step is a function of its seed, so these are two seeds, hence two rotations"
        assert float((a - b).norm() / a.norm()) < 0.5
    torch.manual_seed(7)
    assert all(torch.equal(a, b) for a, b in zip(first, gradients(20), strict=True)), "the seed reproduces all of them"


def gelu_layers() -> tuple[nn.Module, torch.Tensor]:
    layers = nn.Sequential(*(nn.Sequential(nn.Linear(1024, 1024, bias=False), nn.GELU()) for _ in range(8))).cuda().bfloat16()
    return layers, torch.randn(8192, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)


def kept_bytes(layers: nn.Module, x: torch.Tensor, **settings: Any) -> int:
    """What is allocated between a forward and its backward, the result of the forward included."""
    torch._dynamo.reset()
    compiled = torch.compile(layers, **settings)
    compiled(x).sum().backward()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = compiled(x)
    kept = torch.cuda.memory_allocated() - before
    del y
    return kept


def test_memory_kept_for_the_backward_pass_is_packed() -> None:
    layers, x = gelu_layers()
    kept = {backend: kept_bytes(layers, x, backend=backend) for backend in ("inductor", "quartet")}
    print({k: f"{v / 2**20:.1f} MiB" for k, v in kept.items()})
    report = quartet.explain(layers, x)
    assert report.saved_bytes_after < report.saved_bytes_before
    assert kept["quartet"] < kept["inductor"]


def test_recomputed_operands_are_not_kept() -> None:
    """Gradients from the same seeds agree; a code may differ where Inductor contracts a product and a sum in one of both places only."""
    layers, x = gelu_layers()
    kept, gradients = {}, {}
    for choice in ("none", "weights", "operands"):
        settings = {"backend": "quartet", "options": {"quartet.recompute": choice}}
        kept[choice] = kept_bytes(layers, x, **settings)
        layers.zero_grad()
        torch.manual_seed(1)
        torch.compile(layers, **settings)(x).float().square().sum().backward()
        gradients[choice] = torch.cat([p.grad.flatten() for p in layers.parameters()])
    print({k: f"{v / 2**20:.1f} MiB" for k, v in kept.items()})
    weights, inputs = (n * 1024 * 9 // 16 for n in (8 * 1024, 7 * 8192))  # the first input is nobody's to make again
    assert kept["none"] - kept["weights"] == pytest.approx(weights, rel=0.01)
    assert kept["weights"] - kept["operands"] == pytest.approx(inputs, rel=0.01)
    for choice in ("weights", "operands"):
        assert relative_error(gradients[choice].cpu(), gradients["none"].cpu()) < 1e-3


@pytest.mark.feature("Ways to compile", "max-autotune")
def test_automatic_tuning() -> None:
    """Automatic tuning, with CUDA graphs: the same forward pass but for rounding, fresh noise in the backward pass."""
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).cuda().bfloat16()
    x = torch.randn(128, 256, device="cuda", dtype=torch.bfloat16)
    plain = torch.compile(model, backend="quartet")(x).detach()
    tuned = torch.compile(model, backend="quartet", options={"quartet.mode": "max-autotune"})
    gradients = []
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        model.zero_grad(set_to_none=True)
        y = tuned(x)
        # GELU is fused into the first product, so its input is not rounded to bfloat16: off by up to 2^-9 of itself. A code flips where
        # that crosses a midpoint, and then moves by a step, up to 1/4 of the largest of its group: sqrt(2^-9 / 4), 2%, of an operand.
        assert float((y.detach() - plain).norm() / plain.norm()) < 0.05
        y.float().square().sum().backward()
        gradients.append(model[0].weight.grad.clone())
    assert not torch.equal(gradients[2], gradients[3])


@pytest.mark.feature("Ways to compile", "compiled autograd")
def test_compiled_autograd() -> None:
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).cuda().bfloat16()
    x = torch.randn(128, 256, device="cuda", dtype=torch.bfloat16)
    exact = torch.autograd.grad(model(x).float().square().sum(), list(model.parameters()))
    compiled = torch.compile(model, backend="quartet")
    found = []
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="quartet")):
            compiled(x).float().square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for one, two, expected in zip(*found, exact, strict=True):
        assert expected.dim() == 1 or not torch.equal(one, two), "fresh noise"
        assert float((one - expected).norm() / expected.norm()) < 0.5
