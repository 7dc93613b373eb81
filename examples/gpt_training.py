"""One training: the settings, the presets, a step, validation, and checkpoints from which it goes on as if it had never stopped."""

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.utils.deterministic
from gpt_data import Corpus, training_batch, validation_batches
from gpt_model import GPT, GPTConfig

WARM_STEPS = 5
"""Steps after each start that are not timed: they compile, load caches and choose kernels."""

VALIDATIONS = 6
"""How often a training looks at the validation text, evenly spread, the last time at its end."""


@dataclass(frozen=True)
class Preset:
    """A model and a training that suits it."""

    about: str
    model: GPTConfig
    batch: int
    steps: int
    lr: float
    validation_batches: int


PRESETS = {
    "tiny": Preset(
        "1.4M parameters on bytes, minutes on two CPU cores",
        GPTConfig(vocab=256, context=128, layers=2, heads=4, dim=256, hidden=512),
        batch=8, steps=500, lr=3e-3, validation_batches=16,
    ),
    "small": Preset(
        "10M parameters on BPE tokens, minutes on a GPU, an hour or more on a CPU",
        GPTConfig(vocab=4096, context=256, layers=4, heads=6, dim=384, hidden=1024),
        batch=16, steps=500, lr=2e-3, validation_batches=16,
    ),
    "gpu": Preset(
        "98M parameters on BPE tokens, for a GPU",
        GPTConfig(vocab=8192, context=1024, layers=12, heads=12, dim=768, hidden=2048),
        batch=16, steps=400, lr=6e-4, validation_batches=12,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """All that decides the numbers of a run. Written to settings.json, and kept by --resume."""

    preset: str
    data: list[str]
    """The user's files; empty for the Python standard library."""
    steps: int
    batch: int
    lr: float
    seed: int
    device: str
    dtype: str
    """"float32", or "bfloat16" for autocast: what everything outside the NVFP4 products is computed in."""
    recipes: list[str]
    fingerprint: str = ""
    """Hash of the tokenized text."""


def compile_arguments(recipe: str) -> dict:
    """What `torch.compile` is told: the only difference between the trainings that this script compares."""
    if recipe == "baseline":
        return {"backend": "inductor"}
    return {"backend": "quartet", "options": {"quartet.recipe": recipe}}


def autocast(settings: Settings) -> contextlib.AbstractContextManager:
    return torch.autocast(settings.device, torch.bfloat16) if settings.dtype == "bfloat16" else contextlib.nullcontext()


@contextlib.contextmanager
def reproducible(device: str) -> Iterator[None]:
    """On a CPU, the same program gives the same losses to the last bit: without this, threads add up the embedding's gradient in any order.

    On a GPU this would cost speed, so there a run repeats itself, or goes on after a stop, up to the rounding of float32 sums.
    """
    before, filled = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(device == "cpu" or before)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = filled


def learning_rate(step: int, settings: Settings) -> float:
    """Linear warm-up over the first tenth, then a cosine down to a tenth of the peak."""
    warm_up = max(1, settings.steps // 10)
    if step < warm_up:
        return settings.lr * (step + 1) / warm_up
    progress = (step - warm_up) / max(1, settings.steps - warm_up)
    return settings.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


@dataclass
class Curves:
    """What a training has shown so far. Plain numbers, so that it goes into checkpoints and JSON as it is."""

    losses: list[float] = field(default_factory=list)
    """Training loss of every step, nats per token."""
    validation: dict[int, list[float]] = field(default_factory=dict)
    """Steps done -> loss of each validation batch."""
    step_seconds: list[float] = field(default_factory=list)
    """Durations of the steps after warm-up."""
    first_step_seconds: float = 0.0
    """Duration of the very first step, compilation included."""
    peak_bytes: int = 0
    """Most GPU memory held by tensors at once; 0 on a CPU."""


class Training:
    """One model being trained with one recipe, and its checkpoint."""

    def __init__(self, recipe: str, settings: Settings, corpus: Corpus, out: Path) -> None:
        self.recipe, self.settings, self.corpus, self.out = recipe, settings, corpus, out
        self.preset = PRESETS[settings.preset]
        torch.manual_seed(settings.seed)  # equal seeds: every recipe starts from the same weights
        self.model = GPT(self.preset.model).to(settings.device)
        matrices = [parameter for parameter in self.model.parameters() if parameter.dim() >= 2]
        vectors = [parameter for parameter in self.model.parameters() if parameter.dim() < 2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95), fused=True)
        self.compiled = torch.compile(self.model, **compile_arguments(recipe))
        self.curves = Curves()
        self.steps_since_start = 0

    @property
    def step(self) -> int:
        """How many steps are done."""
        return len(self.curves.losses)

    @property
    def finished(self) -> bool:
        return self.step >= self.settings.steps

    @property
    def checkpoint(self) -> Path:
        return self.out / f"checkpoint_{self.recipe}.pt"

    def train_step(self) -> None:
        settings, context = self.settings, self.preset.model.context
        batch = training_batch(self.corpus.train, step=self.step, seed=settings.seed, batch=settings.batch, context=context)
        tokens, targets = (part.to(settings.device) for part in batch)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, settings)

        start = time.perf_counter()
        with autocast(settings):
            loss = self.compiled(tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        value = loss.item()
        if settings.device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start

        if not math.isfinite(value):
            raise FloatingPointError(f"{self.recipe}: the loss of step {self.step + 1} is {value}; a lower --lr may help")
        if self.step == 0:
            self.curves.first_step_seconds = seconds
        if self.steps_since_start >= WARM_STEPS:
            self.curves.step_seconds.append(seconds)
        self.steps_since_start += 1
        self.curves.losses.append(value)

    @torch.no_grad()
    def validate(self) -> None:
        """Loss of each validation batch with the weights of this step."""
        settings, preset = self.settings, self.preset
        batches = validation_batches(
            self.corpus.validation, count=preset.validation_batches, batch=settings.batch, context=preset.model.context
        )
        self.model.eval()
        losses = []
        for batch in batches:
            tokens, targets = (part.to(settings.device) for part in batch)
            with autocast(settings):
                losses.append(self.compiled(tokens, targets).item())
        self.model.train()
        self.curves.validation[self.step] = losses

    def train(self, *, save_every: int, after_step: Callable[[Curves], None], stop: Callable[[], bool]) -> None:
        """Train to the last step, or until `stop()` is true; either way a checkpoint of the last step done is left."""
        settings = self.settings
        validate_after = {round(settings.steps * part / VALIDATIONS) for part in range(1, VALIDATIONS + 1)}
        if settings.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        while not self.finished and not stop():
            self.train_step()
            if self.step in validate_after:
                self.validate()
            if settings.device == "cuda":
                self.curves.peak_bytes = max(self.curves.peak_bytes, torch.cuda.max_memory_allocated())
            if self.finished or self.step % save_every == 0 or stop():
                self.save()
            after_step(self.curves)

    def save(self) -> None:
        """Write the checkpoint; a crash while writing leaves the one before. A finished training needs no optimizer any more."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": None if self.finished else self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state() if self.settings.device == "cuda" else None,
            "curves": asdict(self.curves),
        }
        unfinished = self.checkpoint.with_suffix(".partial")
        torch.save(state, unfinished)
        os.replace(unfinished, self.checkpoint)

    def load(self) -> None:
        """Go on from the checkpoint if there is one. The next batch follows from the number of steps done."""
        if not self.checkpoint.exists():
            return
        state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        self.model.load_state_dict(state["model"])
        if state["optimizer"] is not None:
            self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"])
        self.curves = Curves(**state["curves"])
