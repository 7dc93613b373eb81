"""The products as Inductor compiles them for GPUs that are not there: what is fused, which instructions, registers, no spills."""

from __future__ import annotations

import os
import re
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fake_gpu import Generated, fake_gpu, generate
from offline import SHARED_MEMORY, stack_bytes

import quartet_compile.kernels.lowerings  # noqa: F401  (registers them)
from quartet_compile.kernels.format import swizzle_scales
from quartet_compile.kernels.lowerings import common, packed
from quartet_compile.kernels.triton_kernels.launch import target_for
from quartet_compile.kernels.triton_kernels.packed_product import product_tiles

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the compiler")

quartet = torch.ops.quartet
TENSOR_CORES = {90: "wgmma.mma_async", 100: "tcgen05.mma", 103: "tcgen05.mma", 120: "mma.sync"}
NATIVE = (100, 103, 120)


def matrix(rows: int, columns: int) -> list[Tensor]:
    codes = torch.empty((rows, columns // 2), dtype=torch.uint8, device="cuda")
    scales = torch.empty((rows, columns // 16), dtype=torch.float8_e4m3fn, device="cuda")
    return [codes, scales, torch.empty((), device="cuda")]


def dense(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def plain(*args: Any) -> Tensor:
    *operands, bias, residual = args
    return torch.relu(quartet.matmul(*operands, bias, 1 / 128, torch.bfloat16)) * 2 + residual


def swizzled(a: Tensor, a_scales: Tensor, a_g: Tensor, b: Tensor, b_scales: Tensor, b_g: Tensor, *rest: Tensor) -> Tensor:
    bias, residual = rest
    y = quartet.matmul_swizzled(a, quartet.swizzle(a_scales), a_g, b, quartet.swizzle(b_scales), b_g, bias, 1 / 128, torch.bfloat16)
    return torch.relu(y) * 2 + residual


def operands(rows: int = 250, columns: int = 384, k: int = 512, bias: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Of a product [rows, columns] over k elements: both matrices, a bias, and a residual to add."""
    return [*matrix(rows, k), *matrix(columns, k), dense(columns, dtype=bias), dense(rows, columns)]


def only_template(kernels: list[Generated]) -> Generated:
    (template,) = (kernel for kernel in kernels if "triton_tem" in kernel.name)
    return template


def check_binary(binary: Any, capability: int, folder: Any, native: bool) -> None:
    assert binary.metadata.shared <= SHARED_MEMORY[capability]
    # None: cuobjdump of an older Triton cannot read the binary. 8: its ptxas zeroes 8 bytes of stack beside each descriptor on sm_120, and
    # never reads them.
    assert stack_bytes(binary, folder) in ((0, 8, None) if capability == 120 else (0, None))
    ptx = binary.asm["ptx"]
    assert re.search(rf"{re.escape(TENSOR_CORES[capability])}\S*kind::mxf4nvf4" if native else re.escape(TENSOR_CORES[capability]), ptx)


@pytest.mark.parametrize("bias", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("function", [plain, swizzled])
@pytest.mark.parametrize("capability", NATIVE)
def test_one_kernel_on_fp4_tensor_cores(capability: int, function: Any, bias: torch.dtype, tmp_path: Any) -> None:
    """Bias, activation, factor and residual are fused into the product; nothing of [M, N] is stored but the result."""
    with fake_gpu(capability):
        program, kernels = generate(function, lambda: operands(bias=bias))
        template = only_template(kernels)
        assert program.count("empty_strided_cuda((250, 384)") == 1
        assert len(kernels) == (1 if function is plain else 3)
        assert template.source.count("tl.store(") == 1
        check_binary(template.compiled(capability), capability, tmp_path, native=True)


@pytest.mark.parametrize("capability", NATIVE)
def test_scales_and_codes_arrive_by_tma(capability: int) -> None:
    with fake_gpu(capability):
        _, kernels = generate(swizzled, operands)
        ptx = only_template(kernels).compiled(capability).asm["ptx"]
    assert "cp.async.bulk.tensor.5d" in ptx  # scales
    assert "cp.async.bulk.tensor.2d" in ptx  # codes
    if capability < 120:
        assert "tcgen05.cp" in ptx  # scales, from shared memory straight to tensor memory


@pytest.mark.parametrize("shape", [(250, 32), (128, 4), (3, 5)])
def test_scales_are_put_where_the_format_has_them(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The lowering of `swizzle`, compiled for the CPU."""
    monkeypatch.setattr(packed, "has_tma", lambda device: True)
    torch._dynamo.reset()
    scales = torch.randint(0, 127, shape, dtype=torch.uint8).view(torch.float8_e4m3fn)
    with torch._inductor.config.patch(force_disable_caches=True):
        ours = torch.compile(lambda s: quartet.swizzle(s), dynamic=False)(scales)
    assert torch.equal(ours.view(torch.uint8), swizzle_scales(scales).view(torch.uint8))


def test_decoded_on_hopper(tmp_path: Any) -> None:
    with fake_gpu(90):
        _, kernels = generate(swizzled, operands)
        check_binary(only_template(kernels).compiled(90), 90, tmp_path, native=False)


@pytest.fixture
def choices(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Names of the choices offered for products, and which one is taken, unmeasured: the first whose name contains `prefer`."""

    class Choices:
        def __init__(self) -> None:
            self.names: list[str] = []
            self.prefer = ""

    found = Choices()
    select = common.autotune_select_algorithm

    def take(name: str, offered: list[Any], *args: Any, **kwargs: Any) -> Any:
        found.names = [choice.name for choice in offered]
        return select(name, [next(choice for choice in offered if found.prefer in choice.name)], *args, **kwargs)

    monkeypatch.setattr(common, "autotune_select_algorithm", take)
    return found


def product(a: Tensor, a_scales: Tensor, a_g: Tensor, b: Tensor, b_scales: Tensor, b_g: Tensor) -> Tensor:
    return quartet.matmul_swizzled(a, quartet.swizzle(a_scales), a_g, b, quartet.swizzle(b_scales), b_g, None, 1.0, torch.bfloat16)


@pytest.mark.parametrize("capability", NATIVE)
def test_library_and_every_tile_are_choices(capability: int, choices: Any) -> None:
    tiles = product_tiles(target_for(capability, 1), swizzled=True)
    with fake_gpu(capability):
        choices.prefer = "library"
        program, _ = generate(product, lambda: operands()[:6], max_autotune=True)
        assert "extern_kernels.quartet_library_product(" in program
        assert len(choices.names) == len(tiles) + 1
        choices.prefer = ""
        generate(product, lambda: operands()[:6])
        assert len(choices.names) == 1  # nothing to measure where nobody asked for it


@pytest.mark.slow
@pytest.mark.parametrize("capability", NATIVE)
def test_every_tile_compiles(capability: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    for tile in product_tiles(target_for(capability, 1), swizzled=True):
        monkeypatch.setattr(packed, "product_tiles", lambda *_, tile=tile: [tile])
        with fake_gpu(capability):
            _, kernels = generate(product, lambda: operands()[:6])
            check_binary(only_template(kernels).compiled(capability), capability, tmp_path, native=True)


# ---------------------------------------------------------------- products of values


def values(a: Tensor, b: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    return torch.relu(quartet.matmul_values(a, b, bias, torch.bfloat16)) * 2 + residual


def value_operands(bias: torch.dtype = torch.bfloat16) -> list[Tensor]:
    return [dense(256, 512), dense(384, 512), dense(384, dtype=bias), dense(256, 384)]


def test_values_go_to_the_library(choices: Any) -> None:
    """Without autotuning: one call of cuBLAS, which adds a bfloat16 bias itself, and one kernel for what follows."""
    with fake_gpu(90):
        program, kernels = generate(values, value_operands)
    assert choices.names == ["quartet_product_with_bias"]
    assert program.count("extern_kernels.") == 1
    assert len(kernels) == 1


@pytest.mark.parametrize("bias", [torch.float32, torch.float16])
def test_another_bias_is_added_to_the_float32_sums(bias: torch.dtype, choices: Any) -> None:
    with fake_gpu(90):
        program, kernels = generate(values, lambda: value_operands(bias))
    assert choices.names == ["quartet_product"]
    assert "empty_strided_cuda((256, 384), (384, 1), torch.float32)" in program
    assert len(kernels) == 1


@pytest.mark.parametrize("capability", [80, 89, 90])
@pytest.mark.parametrize("bias", [torch.bfloat16, torch.float32])
def test_templates_of_inductor_are_choices(capability: int, bias: torch.dtype, choices: Any) -> None:
    """With autotuning: Inductor's templates, bias and what follows fused into them."""
    choices.prefer = "triton_mm"
    with fake_gpu(capability):
        _, kernels = generate(values, lambda: value_operands(bias), max_autotune=True)
        assert len(choices.names) > 5
        binary = only_template(kernels).compiled(capability)
    assert len(kernels) == 1
    assert re.search("wgmma.mma_async|mma.sync", binary.asm["ptx"])


def test_other_devices_call_the_operators() -> None:
    """On a CPU, and in C++ wrappers, which know torch's own library calls only, an operator stays a call."""
    with fake_gpu(90):
        program, kernels = generate(plain, operands)
    assert "torch.ops.quartet.matmul.default(" in program  # no FP4 tensor cores: the operator itself
    assert not any("triton_tem" in kernel.name for kernel in kernels)
