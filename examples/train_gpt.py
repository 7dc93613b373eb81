"""Train a GPT twice on the same batches, in ordinary precision and in NVFP4, and compare.

    python examples/train_gpt.py                                # minutes on two CPU cores; about 100M parameters where there is a GPU
    python examples/train_gpt.py --preset small --steps 500
    python examples/train_gpt.py --data book.txt notes/*.txt    # your own text
    python examples/train_gpt.py --resume                       # go on after Ctrl-C

The model (`gpt_model.py`) is plain PyTorch. What differs between the two trainings is one argument of `torch.compile`: see
`compile_arguments` in `gpt_training.py`. Everything lands in one folder, `runs/PRESET` unless `--out` names another: settings,
checkpoints, results.json, curves.png and the report of the linears.
"""

import argparse
import contextlib
import json
import math
import platform
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median

try:
    import torch
    from gpt_data import Corpus, DataError, load_corpus, training_batch
    from gpt_display import Progress, comparison_table, console, notes, plot_curves, print_linears
    from gpt_model import GPT
    from gpt_training import PRESETS, Curves, Settings, Training, autocast, compile_arguments, reproducible

    import quartet_compile as quartet  # for the report at the end; training needs no import
except ModuleNotFoundError as error:
    package = str(error.name).partition(".")[0]
    sys.exit(f'The package {package} is missing: pip install "quartet-compile[demo]"')


class StopSignal:
    """Turns the first Ctrl-C or SIGTERM into a request to stop after the current step; a second one ends the program at once."""

    def __init__(self) -> None:
        self.requested: int | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator["StopSignal"]:
        before = {number: signal.signal(number, self.handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def __call__(self) -> bool:
        return self.requested is not None

    def handle(self, number: int, frame: object) -> None:
        self.requested = number
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        console.print("\nStopping after this step; a checkpoint follows. (Once more ends at once.)")


def explain_linears(recipe: str, settings: Settings, corpus: Corpus) -> object:
    """The report of `quartet_compile.explain`: what the recipe does to each linear of the model, and what is saved for the backward."""
    preset = PRESETS[settings.preset]
    model = GPT(preset.model).to(settings.device)
    batch = training_batch(corpus.train, step=0, seed=settings.seed, batch=settings.batch, context=preset.model.context)
    tokens, targets = (part.to(settings.device) for part in batch)
    with autocast(settings):
        return quartet.explain(model, tokens, targets, options=compile_arguments(recipe)["options"])


def gap(losses: list[float], baseline: list[float]) -> tuple[float, float | None]:
    """Mean difference of two lists of losses of the same batches, and its standard error (None for a single batch).

    The batches are the same, so the differences vary far less than the losses do. The error covers the choice of validation text only:
    another seed would give both models other weights, and moves the gap too.
    """
    differences = [a - b for a, b in zip(losses, baseline, strict=True)]
    mean = sum(differences) / len(differences)
    if len(differences) < 2:
        return mean, None
    variance = sum((difference - mean) ** 2 for difference in differences) / (len(differences) - 1)
    return mean, math.sqrt(variance / len(differences))


def summarize(curves: dict[str, Curves], reports: dict[str, object], settings: Settings, corpus: Corpus) -> dict:
    """Everything the table and the plot show, as plain data for results.json. Losses are nats per token, times seconds."""
    recipes: dict[str, dict] = {}
    for recipe, curve in curves.items():
        tail = curve.losses[-max(1, len(curve.losses) // 20) :]
        last = curve.validation[max(curve.validation)]
        report = reports.get(recipe) or next(iter(reports.values()), None)
        when = "before" if recipe == "baseline" else "after"
        recipes[recipe] = {
            "train_loss": sum(tail) / len(tail),
            "validation_loss": sum(last) / len(last),
            "gap": None,
            "gap_standard_error": None,
            "step_seconds": median(curve.step_seconds) if curve.step_seconds else None,
            "first_step_seconds": curve.first_step_seconds,
            "saved_bytes": getattr(report, f"saved_bytes_{when}", None),
            "saved_input_bytes": sum(getattr(linear, f"saved_{when}") for linear in report.linears) if report else None,
            "peak_bytes": curve.peak_bytes or None,
            "curves": asdict(curve),
        }
        if recipe != "baseline" and "baseline" in curves:
            baseline = curves["baseline"]
            recipes[recipe]["gap"], recipes[recipe]["gap_standard_error"] = gap(last, baseline.validation[max(baseline.validation)])
    native = settings.device == "cuda" and torch.cuda.get_device_capability()[0] >= 10
    return {
        "settings": asdict(settings),
        "model": {**asdict(PRESETS[settings.preset].model), "parameters": GPT(PRESETS[settings.preset].model).parameter_count()},
        "text": {"source": corpus.source, "train_tokens": len(corpus.train), "validation_tokens": len(corpus.validation)},
        "device": torch.cuda.get_device_name() if settings.device == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "native_nvfp4": native,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "recipes": recipes,
    }


def run(settings: Settings, out: Path, *, corpus: Corpus, save_every: int = 100) -> int:
    """Train every recipe from where its checkpoint is, then compare. Returns the exit status of the program."""
    parameters = GPT(PRESETS[settings.preset].model).parameter_count()
    console.print(
        f"[bold]{settings.preset}[/]: {parameters / 1e6:.1f}M parameters, {settings.steps} steps of "
        f"{settings.batch} x {PRESETS[settings.preset].model.context} tokens, {settings.dtype} on {settings.device}\n"
        f"Text: {corpus.source}, {len(corpus.train):,} tokens to train on and {len(corpus.validation):,} to validate",
        highlight=False,
        soft_wrap=True,
    )
    curves: dict[str, Curves] = {}
    stop = StopSignal()
    with stop.listening(), reproducible(settings.device):
        for recipe in settings.recipes:
            torch._dynamo.reset()  # each recipe compiles afresh, so that no time of one counts for another
            training = Training(recipe, settings, corpus, out)
            training.load()
            with Progress(recipe, settings.steps, training.curves, curves.get("baseline")) as progress:
                training.train(save_every=save_every, after_step=progress.update, stop=stop)
            if stop() and not training.finished:
                console.print(f"Stopped: {recipe} has done {training.step} of {settings.steps} steps. To go on:")
                console.print(f"    python {sys.argv[0]} --resume --out {out}", soft_wrap=True, highlight=False)
                return 128 + stop.requested
            curves[recipe] = training.curves
            del training
    reports = {recipe: explain_linears(recipe, settings, corpus) for recipe in settings.recipes if recipe != "baseline"}
    results = summarize(curves, reports, settings, corpus)
    (out / "results.json").write_text(json.dumps(results, indent=1))
    for recipe, report in reports.items():
        (out / f"linears_{recipe}.txt").write_text(f"{report}\n")
        print_linears(recipe, report)
    plot_curves(results, out / "curves.png")
    console.print(comparison_table(results))
    console.print(f"{notes(results)}\n\nCurves:  {out / 'curves.png'}\nNumbers: {out / 'results.json'}", soft_wrap=True, highlight=False)
    return 0


def positive(kind: type) -> object:
    def parse(text: str) -> float:
        value = kind(text)
        if not value > 0:
            raise ValueError
        return value

    parse.__name__ = f"positive {kind.__name__}"  # argparse puts it into its message
    return parse


def arguments(argv: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    presets = "\n".join(f"  {name:7} {preset.about}" for name, preset in PRESETS.items())
    examples = "\n".join(line[2:] for line in (__doc__ or "").splitlines() if line.startswith("    python"))
    parser = argparse.ArgumentParser(
        description="Train a GPT in ordinary precision and in NVFP4 on the same batches, and compare.",
        epilog=f"presets:\n{presets}\n\nexamples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    recipes = ["baseline", *(name for name in quartet.RECIPES if name != "bf16")]  # bf16 rewrites nothing: the baseline again
    parser.add_argument("--preset", choices=PRESETS, help="size of the model and its training (default: gpu with a CUDA GPU, else tiny)")
    parser.add_argument("--data", nargs="+", metavar="FILE", help="your own text (default: the sources of Python's standard library)")
    parser.add_argument(
        "--recipes", nargs="+", choices=recipes, metavar="NAME",
        help=f"trainings to compare, of {', '.join(recipes)} (default: baseline quartet2)",
    )  # fmt: skip
    parser.add_argument("--steps", type=positive(int), help="optimizer steps of each training")
    parser.add_argument("--batch", type=positive(int), help="sequences in a step")
    parser.add_argument("--lr", type=positive(float), help="peak learning rate")
    parser.add_argument("--seed", type=int, help="of the weights, the batches and the stochastic rounding (default: 0)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="bfloat16 is autocast (default: bfloat16 on cuda, float32 on cpu)")
    parser.add_argument("--out", type=Path, help="folder for everything this writes (default: runs/PRESET)")
    parser.add_argument("--save-every", type=positive(int), default=100, metavar="STEPS", help="steps between checkpoints (default: 100)")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on with the run in the folder, with the settings it was started with")
    again.add_argument("--overwrite", action="store_true", help="start over in a folder that already holds a run")
    return parser, parser.parse_args(argv)


FREE_ON_RESUME = ("recipes", "fingerprint")
"""Settings that a resumed run may change: a recipe can be added later."""


def resolve(args: argparse.Namespace) -> tuple[Settings, Path]:
    """Settings and folder of the run that the options ask for. Raises ValueError with advice where they make no sense."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA GPU here")
    name = args.preset or ("gpu" if device == "cuda" else "tiny")
    out = args.out or Path("runs") / name
    stored = out / "settings.json"
    given = {key: value for key in Settings.__dataclass_fields__ if (value := getattr(args, key, None)) is not None}
    if args.data:
        given["data"] = [str(Path(file).resolve()) for file in args.data]
    if args.resume:
        if not stored.exists():
            raise ValueError(f"--resume: {out} holds no run; name its folder with --out")
        settings = Settings(**json.loads(stored.read_text()))
        for key, value in given.items():
            if key not in FREE_ON_RESUME and value != getattr(settings, key):
                raise ValueError(f"--{key} {value}: the run in {out} has {getattr(settings, key)}, and a resumed run keeps its settings")
        return replace(settings, **{key: value for key, value in given.items() if key in FREE_ON_RESUME}), out
    if stored.exists() and not args.overwrite:
        raise ValueError(f"{out} already holds a run: go on with it (--resume), start over (--overwrite), or choose another folder (--out)")
    preset = PRESETS[name]
    defaults = {
        "preset": name, "data": [], "steps": preset.steps, "batch": preset.batch, "lr": preset.lr, "seed": 0,
        "device": device, "dtype": "bfloat16" if device == "cuda" else "float32", "recipes": ["baseline", "quartet2"],
    }  # fmt: skip
    return Settings(**{**defaults, **given}), out


def main(argv: list[str] | None = None) -> int:
    parser, args = arguments(argv)
    try:
        settings, out = resolve(args)
        tokenizer = out / "tokenizer.json"
        if not args.resume:
            for old in (tokenizer, *out.glob("checkpoint_*.pt")):
                old.unlink(missing_ok=True)
        model = PRESETS[settings.preset].model
        files = [Path(file) for file in settings.data]
        corpus = load_corpus(files, vocab=model.vocab, context=model.context, cache=tokenizer)
        if args.resume and settings.fingerprint != corpus.fingerprint:
            raise ValueError(f"--resume: the text has changed since the run in {out} began")
        settings = replace(settings, fingerprint=corpus.fingerprint)
        out.mkdir(parents=True, exist_ok=True)
        (out / "settings.json").write_text(json.dumps(asdict(settings), indent=1))
        return run(settings, out, corpus=corpus, save_every=args.save_every)
    except (DataError, ValueError, FloatingPointError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
