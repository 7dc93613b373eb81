"""What `train_gpt.py` shows: a progress bar while it trains, then a table and a plot of the comparison."""

import time
from collections.abc import Iterable
from pathlib import Path
from statistics import median

import matplotlib

matplotlib.use("Agg")  # writes files, needs no screen

import matplotlib.pyplot as plt
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Table

console = Console()


def duration(seconds: float | None) -> str:
    """Seconds in the unit a person would use."""
    if seconds is None:
        return "-"
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms" if seconds < 0.0995 else f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d} min"


def size(count: int | None) -> str:
    """Bytes in the unit a person would use."""
    if count is None:
        return "-"
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.3g} {unit}" if unit != "B" else f"{count} B"
        value /= 1024
    return f"{value:.3g} GiB"


class Progress:
    """A bar with loss, step time and remaining time on a terminal; about twenty plain lines elsewhere."""

    def __init__(self, recipe: str, steps: int, curves, baseline) -> None:
        self.recipe, self.steps, self.curves, self.baseline = recipe, steps, curves, baseline
        self.started = time.perf_counter()
        self.bar = RichProgress(
            TextColumn("[bold]{task.description:9}"), BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.fields[status]}"),
            console=console,
        )  # fmt: skip
        self.task = self.bar.add_task(recipe, total=steps, completed=len(curves.losses), status="compiling the first step ...")

    def __enter__(self) -> "Progress":
        if console.is_terminal:
            self.bar.start()
        elif len(self.curves.losses) < self.steps:
            console.print(f"{self.recipe}: compiling the first step ...", highlight=False)
        return self

    def __exit__(self, *exception: object) -> None:
        if console.is_terminal:
            if len(self.curves.losses) >= self.steps:
                self.bar.update(self.task, status=self.status(self.curves))
            self.bar.stop()

    def status(self, curves) -> str:
        """Loss, mean difference to the baseline on the same batches, step time, what remains."""
        done = len(curves.losses)
        recent = curves.losses[-10:]
        parts = [f"loss {sum(recent) / len(recent):.3f}"]
        if self.baseline is not None:
            same = self.baseline.losses[max(0, done - 10) : done]
            parts.append(f"gap {(sum(recent) - sum(same)) / len(recent):+.3f}")
        if curves.step_seconds:
            step = median(curves.step_seconds[-50:])
            parts.append(f"{duration(step)}/step")
            if done < self.steps:
                parts.append(f"{duration(max(1.0, step * (self.steps - done)))} left")
        return "  ".join(parts)

    def update(self, curves) -> None:
        """Show the state after a step."""
        done = len(curves.losses)
        if console.is_terminal:
            self.bar.update(self.task, completed=done, status=self.status(curves))
        elif done in (1, self.steps) or done % max(1, self.steps // 20) == 0:
            console.print(f"{self.recipe} {done}/{self.steps}  {self.status(curves)}", highlight=False, soft_wrap=True)


def label(recipe: str, results: dict) -> str:
    """What the products of the linears are computed in: for the baseline, that is the dtype of the run, and is named as such."""
    if recipe == "baseline":
        return "float32" if results["settings"]["dtype"] == "float32" else "BF16 autocast"
    return "NVFP4" if results["native_nvfp4"] else "NVFP4, emulated"


def comparison_table(results: dict) -> Table:
    """One column per recipe; losses in nats per token."""
    recipes = results["recipes"]
    table = Table(title=f"{results['settings']['preset']} on {results['device']}", title_justify="left")
    table.add_column("")
    for recipe in recipes:
        table.add_column(f"{recipe}\n[dim]{label(recipe, results)}[/]", justify="right")

    def row(name: str, cells: Iterable[str]) -> None:
        table.add_row(name, *cells)

    def gap(result: dict) -> str:
        if result["gap"] is None:
            return "-"
        relative = 100 * result["gap"] / (result["validation_loss"] - result["gap"])
        error = result["gap_standard_error"]
        return f"{result['gap']:+.4f} ± {'?' if error is None else format(error, '.4f')} ({relative:+.1f}%)"

    base = recipes.get("baseline", {})

    def ratio(result: dict, key: str) -> str:
        """The value's ratio to the baseline's, where there are both."""
        if result is base or not base.get(key) or not result[key]:
            return ""
        return f" ({result[key] / base[key]:.2f}x)"

    row("train loss, last 5%", (f"{result['train_loss']:.4f}" for result in recipes.values()))
    row("validation loss", (f"{result['validation_loss']:.4f}" for result in recipes.values()))
    row("validation gap", (gap(result) for result in recipes.values()))
    row("step, median", (duration(result["step_seconds"]) + ratio(result, "step_seconds") for result in recipes.values()))
    row("first step, compile or cache", (duration(result["first_step_seconds"]) for result in recipes.values()))
    for name, key in (("kept for backward", "saved_bytes"), ("  of it, inputs of linears", "saved_input_bytes")):
        row(name, (size(result[key]) + ratio(result, key) for result in recipes.values()))
    if any(result["peak_bytes"] for result in recipes.values()):
        row("peak GPU memory", (size(result["peak_bytes"]) + ratio(result, "peak_bytes") for result in recipes.values()))
    return table


def notes(results: dict) -> str:
    """What a reader of the table should know before quoting it."""
    lines = ["± is the paired standard error over validation batches; another seed moves the gap more (--preset tiny: by 0.04)."]
    if any(recipe != "baseline" for recipe in results["recipes"]) and not results["native_nvfp4"]:
        lines.append("This device has no FP4 units: the rounding is NVFP4's, the speed is not.")
    return "\n".join(lines)


def print_linears(recipe: str, report: object) -> None:
    console.print(f"\n[bold]Linears under {recipe}[/]", highlight=False)
    console.print(str(report), markup=False, highlight=False, soft_wrap=True)
    console.print()


COLORS = ["#5b6770", "#d9541e", "#1f77b4", "#2a9d5c", "#8e44ad"]


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Moving average, centred; near the ends over what there is."""
    kernel = np.ones(window)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")


def validation_curve(result: dict) -> dict[int, np.ndarray]:
    """Steps done -> loss of each validation batch. (JSON has made strings of the steps.)"""
    return {int(step): np.array(losses) for step, losses in result["curves"]["validation"].items()}


def plot_curves(results: dict, path: Path) -> None:
    """Write the loss curves, and below them the distance of every recipe to the baseline."""
    recipes = results["recipes"]
    others = [recipe for recipe in recipes if recipe != "baseline" and "baseline" in recipes]
    style = {
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e6e6e6", "axes.axisbelow": True,
        "axes.edgecolor": "#888888", "font.size": 10, "legend.frameon": False,
    }  # fmt: skip
    with plt.rc_context(style):
        heights = [3, 1.4] if others else [1]
        figure, axes = plt.subplots(
            len(heights), 1, sharex=True, squeeze=False, figsize=(8, 6.2 if others else 4.4), height_ratios=heights, layout="constrained"
        )
        top, differences = axes[0, 0], []
        for (recipe, result), color in zip(recipes.items(), COLORS * len(recipes), strict=False):
            losses = np.array(result["curves"]["losses"])
            steps = np.arange(1, len(losses) + 1)
            window = max(1, len(losses) // 25)
            name = f"{recipe} ({label(recipe, results)})"
            top.plot(steps, losses, color=color, alpha=0.22, linewidth=0.8)
            top.plot(steps, smooth(losses, window), color=color, linewidth=1.8, label=f"{name}, training")
            validation = validation_curve(result)
            top.plot(
                list(validation), [batches.mean() for batches in validation.values()], "o" if recipe == "baseline" else "D", color=color,
                markersize=8 if recipe == "baseline" else 5, markeredgecolor="white", label=f"{recipe}, validation",
            )  # fmt: skip
            if recipe in others:
                bottom = axes[1, 0]
                difference = losses - np.array(recipes["baseline"]["curves"]["losses"])
                differences.append(smooth(difference, window))
                bottom.plot(steps, difference, color=color, alpha=0.22, linewidth=0.8)
                bottom.plot(steps, smooth(difference, window), color=color, linewidth=1.8)
                gaps = [batches - validation_curve(recipes["baseline"])[step] for step, batches in validation.items()]
                errors = [2 * gap.std(ddof=1) / len(gap) ** 0.5 if len(gap) > 1 else 0 for gap in gaps]
                bottom.errorbar(
                    list(validation), [gap.mean() for gap in gaps], yerr=errors, fmt="D", color=color, markersize=5, capsize=2.5,
                    markeredgecolor="white", ecolor=color,
                )  # fmt: skip
        losses = np.concatenate([result["curves"]["losses"] for result in recipes.values()])
        first = max(result["curves"]["losses"][min(len(result["curves"]["losses"]) - 1, 2)] for result in recipes.values())
        margin = 0.04 * (first - losses.min()) or 0.1
        top.set_ylim(losses.min() - margin, first + margin)
        top.set_ylabel("loss (nats per token)")
        top.legend(loc="upper right")
        parameters = results["model"]["parameters"]
        count = f"{parameters / 1e6:.1f}M" if parameters < 1e7 else f"{parameters / 1e6:.0f}M"
        top.set_title(f"GPT, {count} parameters, {results['text']['source']}", loc="left", fontsize=11)
        if others:
            bottom.axhline(0, color=COLORS[0], linewidth=1.2)
            reach = max(2.0 * float(np.quantile(np.abs(np.concatenate(differences)), 0.95)), 1e-3)
            bottom.set_ylim(-reach, reach)
            bottom.set_ylabel("gap to baseline")
        axes[-1, 0].set_xlabel("step")
        axes[-1, 0].set_xlim(0, max(len(result["curves"]["losses"]) for result in recipes.values()) * 1.01)
        figure.savefig(path, dpi=150)
        plt.close(figure)
