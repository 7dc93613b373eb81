"""What the roofline model has to know of a GPU, from NVIDIA's documents. All peaks are dense, tensor cores accumulate in float32."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """clock: Hz, boost. bandwidth: of DRAM, bytes a second. bf16, fp4: tensor cores, FLOP a second.

    cublas: the fraction of `bf16` that cuBLAS was seen to reach on large products, where a measurement is known.
    """

    name: str
    capability: int
    processors: int
    clock: float
    bandwidth: float
    bf16: float
    fp4: float
    cublas: float | None = None

    @property
    def issue_rate(self) -> float:
        """Instructions of threads a second: each of an SM's four schedulers issues one instruction for 32 threads in a cycle."""
        return self.processors * 4 * 32 * self.clock


GPUS = (
    # HGX B200 data sheet, 8 GPUs: FP4 72 PFLOPS dense (144 sparse), BF16 36 PFLOPS *sparse*, hence 2.25 dense a GPU, 62 TB/s.
    # 148 SMs: CUDA device properties. The data sheet names no clock: this is the one that its peaks imply, with 8192 BF16 FLOP a cycle
    # and SM (tcgen05.mma); the highest one that the driver reports, 1.965 GHz, would be kinder to the kernels that issue bounds.
    Gpu("B200", 100, processors=148, clock=1.856e9, bandwidth=7.75e12, bf16=2.25e15, fp4=9.0e15),
    # NVIDIA RTX Blackwell GPU Architecture whitepaper, appendix on GB202: 170 SMs, boost 2407 MHz, 1792 GB/s, BF16 with FP32 accumulation
    # 209.5 TFLOPS (419 sparse): on GeForce half of the rate with FP16 accumulation. FP4 1676 TFLOPS; the "3352 AI TOPS" are sparse.
    # cuBLAS was measured at 224 to 240 TFLOP/s in BF16 (main-horse.github.io/posts/5090-mm-perf; zzc0721/torch-performance-test-data issues
    # 96 and 124): it runs above the boost clock, and a rate that is halved leaves it power. For NVFP4 only "over a petaflop" is known.
    Gpu("RTX 5090", 120, processors=170, clock=2.407e9, bandwidth=1.792e12, bf16=209.5e12, fp4=1676e12, cublas=1.10),
    # NVIDIA RTX PRO Blackwell GPU Architecture whitepaper, RTX PRO 6000 Blackwell Workstation Edition: 188 SMs, boost 2617 MHz, 1792 GB/s,
    # BF16 with FP32 accumulation 503.8 TFLOPS: not halved on professional cards. FP4 2015 TFLOPS; the "4000 AI TOPS" are sparse.
    # (On the Server Edition CUTLASS reached 1629 TFLOP/s in NVFP4, 0.81 of that: NVIDIA/cutlass pull request 3272.)
    Gpu("RTX PRO 6000", 120, processors=188, clock=2.617e9, bandwidth=1.792e12, bf16=503.8e12, fp4=2015e12),
)
