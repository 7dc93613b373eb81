"""The demo: its text and batches are reproducible, its presets have the sizes they name, an interrupted training goes on as if it had not
stopped, and a run leaves its table, plot and numbers. The last test trains with quartet2 and is slow."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import gpt_data  # noqa: E402
import gpt_display  # noqa: E402
import gpt_training  # noqa: E402
import train_gpt  # noqa: E402
from gpt_model import GPT, GPTConfig  # noqa: E402

SMALLEST = gpt_training.Preset(
    "for tests", GPTConfig(vocab=256, context=32, layers=1, heads=1, dim=64, hidden=64), batch=2, steps=8, lr=3e-3, validation_batches=3
)


class FakeReport:
    saved_bytes_before, saved_bytes_after = 8192, 5248
    linears = (SimpleNamespace(saved_before=3072, saved_after=864), SimpleNamespace(saved_before=1024, saved_after=288))

    def __str__(self) -> str:
        return "layers.0.attn.q_proj  quartet2"


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Train the smallest model without Inductor. Returns a function that runs the command line and gives the folder."""
    monkeypatch.setitem(gpt_training.PRESETS, "smallest", SMALLEST)
    monkeypatch.setattr(gpt_training, "compile_arguments", lambda recipe: {"backend": "eager"})
    monkeypatch.setattr(train_gpt, "explain_linears", lambda *_: FakeReport())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # these tensors are too small to share
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i} of a text that repeats itself, {i * i}\n" for i in range(400)))

    def run(name: str, *options: str, data: Path = text) -> Path:
        out = tmp_path / name
        preset = () if "--resume" in options else ("--preset", "smallest", "--device", "cpu", "--data", str(data))
        assert train_gpt.main([*preset, "--out", str(out), *options]) == 0
        return out

    yield run
    torch.set_num_threads(threads)


def losses(out: Path, recipe: str = "baseline") -> list[float]:
    return json.loads((out / "results.json").read_text())["recipes"][recipe]["curves"]["losses"]


# ---------------------------------------------------------------- text and batches


def test_standard_library_files_leave_out_tests_and_installed_packages(tmp_path):
    for name in ("b.py", "a.py", "json/x.py", "json/test/y.py", "site-packages/z.py", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("pass")
    assert [path.relative_to(tmp_path).as_posix() for path in gpt_data.standard_library_files(tmp_path)] == ["a.py", "b.py", "json/x.py"]


def test_standard_library_splits_by_file(tmp_path):
    for i in range(200):
        (tmp_path / f"module_{i}.py").write_text(f"<{i}>")
    (tmp_path / "copy.py").write_text("<7>")
    train, validation = (set(part.split(gpt_data.FILE_SEPARATOR)) for part in gpt_data.split_standard_library(tmp_path))
    assert not train & validation
    assert len(train | validation) == 200
    assert 4 <= len(validation) <= 40


def test_own_files_validate_on_the_last_tenth(tmp_path):
    path = tmp_path / "digits.txt"
    path.write_bytes(bytes(range(100)))
    assert gpt_data.split_files([path]) == (bytes(range(90)), bytes(range(90, 100)))


def test_the_same_files_give_the_same_corpus(tmp_path):
    first, second = (gpt_data.load_corpus(None, vocab=256, context=64, cache=tmp_path / "none.json") for _ in range(2))
    assert first.fingerprint == second.fingerprint
    assert len(first.train) > 1_000_000
    assert len(first.validation) > 100_000


def test_a_batch_depends_on_seed_and_step_alone():
    tokens = torch.arange(5000).numpy().astype("uint16")

    def batch(step: int, seed: int) -> torch.Tensor:
        return gpt_data.training_batch(tokens, step=step, seed=seed, batch=4, context=16)[0]

    assert torch.equal(batch(3, 0), batch(3, 0))
    assert not torch.equal(batch(3, 0), batch(4, 0))
    assert not torch.equal(batch(3, 0), batch(3, 1))
    inputs, targets = gpt_data.training_batch(tokens, step=0, seed=0, batch=4, context=16)
    assert torch.equal(inputs + 1, targets)


def test_validation_windows_do_not_overlap():
    tokens = torch.arange(2000).numpy().astype("uint16")
    batches = gpt_data.validation_batches(tokens, count=4, batch=3, context=50)
    seen = torch.cat([inputs.flatten() for inputs, _ in batches])
    assert len(batches) == 4
    assert len(seen.unique()) == len(seen) == 4 * 3 * 50


def test_bpe_comes_back_from_its_cache(tmp_path):
    pytest.importorskip("tokenizers")
    text = tmp_path / "text.txt"
    text.write_text("the cat and the dog and the cat, quantized größe\n" * 200)
    cache = tmp_path / "run" / "tokenizer.json"
    first, second = (gpt_data.load_corpus([text], vocab=300, context=8, cache=cache) for _ in range(2))
    assert cache.exists()
    assert first.fingerprint == second.fingerprint
    assert 0 < first.train.max() < 300
    assert len(first.train) < len(text.read_bytes()) / 3


# ---------------------------------------------------------------- the model


@pytest.mark.parametrize(("preset", "millions"), [("tiny", (1.2, 1.8)), ("small", (9, 11)), ("gpu", (90, 110))])
def test_presets_have_the_sizes_they_name(preset, millions):
    config = gpt_training.PRESETS[preset].model
    with torch.device("meta"):
        model = GPT(config)
    assert millions[0] < model.parameter_count() / 1e6 < millions[1]
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert min(module.in_features, module.out_features) >= 64, name


def test_the_model_sees_no_future():
    torch.manual_seed(0)
    model = GPT(SMALLEST.model)
    tokens = torch.randint(256, (1, 16))
    changed = tokens.clone()
    changed[0, 10] = (changed[0, 10] + 1) % 256
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :10], after[:, :10])
    assert not torch.allclose(before[:, 10:], after[:, 10:])


def test_an_untrained_model_guesses_evenly():
    torch.manual_seed(0)
    tokens = torch.randint(256, (4, 33))
    loss = GPT(SMALLEST.model)(tokens[:, :-1], tokens[:, 1:])
    assert loss.item() == pytest.approx(math.log(256), abs=0.1)


# ---------------------------------------------------------------- a run


def test_a_run_leaves_table_plot_and_numbers(quick, capsys):
    out = quick("run")
    shown = capsys.readouterr().out
    for text in ("baseline 8/8", "quartet2 8/8", "validation gap", "layers.0.attn.q_proj"):
        assert text in shown
    for text in ("8 KiB", "5.12 KiB (0.64x)", "4 KiB", "1.12 KiB (0.28x)"):  # of FakeReport
        assert text in shown
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "linears_quartet2.txt").read_text() == "layers.0.attn.q_proj  quartet2\n"
    results = json.loads((out / "results.json").read_text())
    # Both ran on the same batches from the same weights with the same backend: nothing may differ.
    assert losses(out) == losses(out, "quartet2")
    assert results["recipes"]["quartet2"]["gap"] == 0
    assert len(losses(out)) == 8
    # The plot can be drawn again from the file.
    gpt_display.plot_curves(results, out / "again.png")


def test_seeds_change_weights_and_batches(quick):
    assert losses(quick("a", "--recipes", "baseline")) != losses(quick("b", "--recipes", "baseline", "--seed", "1"))


@pytest.mark.parametrize("at", [1, 3, 7])
def test_an_interrupted_training_resumes_exactly(quick, monkeypatch, capsys, at):
    whole = quick("whole", "--recipes", "baseline")

    train_step = gpt_training.Training.train_step

    def interrupted(training) -> None:
        train_step(training)
        if training.step == at:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(gpt_training.Training, "train_step", interrupted)
    with pytest.raises(AssertionError, match="130"):
        quick("broken", "--recipes", "baseline")
    shown = capsys.readouterr().out
    assert f"baseline has done {at} of 8 steps" in shown
    assert "--resume --out" in shown

    monkeypatch.setattr(gpt_training.Training, "train_step", train_step)
    resumed = quick("broken", "--resume")
    assert losses(resumed) == losses(whole)
    checkpoints = [torch.load(out / "checkpoint_baseline.pt", weights_only=True) for out in (whole, resumed)]
    torch.testing.assert_close(*(checkpoint["model"] for checkpoint in checkpoints), rtol=0, atol=0)
    assert checkpoints[0]["curves"]["validation"] == checkpoints[1]["curves"]["validation"]


def test_random_numbers_go_on_after_a_resume(quick, tmp_path):
    """Stochastic rounding draws its seeds from torch's generator, so the checkpoint has to hold its state."""
    out = quick("run", "--recipes", "baseline")
    settings = gpt_training.Settings(**json.loads((out / "settings.json").read_text()))
    corpus = gpt_data.load_corpus([Path(settings.data[0])], vocab=256, context=32, cache=tmp_path / "none")
    training = gpt_training.Training("baseline", settings, corpus, out)
    torch.rand(3)
    training.save()
    expected = torch.rand(5)
    torch.rand(7)
    training.load()
    assert torch.equal(torch.rand(5), expected)


def test_a_recipe_can_be_added_to_a_finished_run(quick):
    out = quick("run", "--recipes", "baseline")
    before = losses(out)
    quick("run", "--resume", "--recipes", "baseline", "quartet2")
    assert losses(out) == before == losses(out, "quartet2")


def test_gap_is_the_mean_difference_with_its_standard_error():
    mean, error = train_gpt.gap([1.1, 2.3, 3.2], [1.0, 2.0, 3.0])
    assert mean == pytest.approx(0.2)
    assert error == pytest.approx(0.1 / math.sqrt(3))


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--preset", "huge"], "tiny"),
        (["--data", "no_such_file.txt"], "no file"),
        (["--data", "."], "is a folder"),
        (["--steps", "0"], "positive int"),
        (["--recipes", "fp3"], "quartet2"),
        (["--resume"], "holds no run"),
    ],
)
def test_mistakes_are_explained(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        train_gpt.main(["--device", "cpu", "--out", str(tmp_path / "run"), *options])
    assert message in capsys.readouterr().err


def test_too_little_text_is_explained(quick, tmp_path, capsys):
    short = tmp_path / "short.txt"
    short.write_text("hello")
    with pytest.raises(SystemExit, match="2"):
        quick("run", data=short)
    assert "too little text" in capsys.readouterr().err


def test_a_run_is_not_overwritten_or_changed_by_accident(quick, capsys):
    quick("run", "--recipes", "baseline")
    with pytest.raises(SystemExit, match="2"):
        quick("run", "--recipes", "baseline")
    assert "--overwrite" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        quick("run", "--resume", "--steps", "9")
    assert "keeps its settings" in capsys.readouterr().err
    quick("run", "--recipes", "baseline", "--overwrite")


@pytest.mark.parametrize("package", ["rich", "matplotlib", "numpy"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(package):
    code = f"import sys; sys.modules[{package!r}] = None; sys.path.insert(0, {str(EXAMPLES)!r}); import train_gpt"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == f'The package {package} is missing: pip install "quartet-compile[demo]"'


def test_missing_tokenizers_are_named_with_the_command_that_installs_them(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(gpt_data.DataError, match="quartet-compile\\[demo\\]"):
        gpt_data.bpe_tokens(b"text", b"text", 300, tmp_path / "tokenizer.json")


# ---------------------------------------------------------------- the real thing


@pytest.mark.slow
def test_a_real_training_learns_and_resumes_exactly(tmp_path):
    """Through the command line and Inductor: train, stop by SIGTERM, resume, and have an uninterrupted run's losses to the last bit."""
    recipe = "quartet2"

    def command(name: str, *options: str) -> list[str]:
        return [sys.executable, str(EXAMPLES / "train_gpt.py"), "--out", str(tmp_path / name), *options]

    options = ("--preset", "tiny", "--device", "cpu", "--steps", "24", "--recipes", recipe)
    subprocess.run(command("whole", *options), check=True)
    whole = losses(tmp_path / "whole", recipe)
    assert sum(whole[-5:]) / 5 < whole[0] - 1.5

    stopped = subprocess.Popen(command("stopped", *options, "--save-every", "1"))
    while stopped.poll() is None and not (tmp_path / "stopped" / f"checkpoint_{recipe}.pt").exists():
        time.sleep(0.2)
    stopped.terminate()
    assert stopped.wait() == 128 + signal.SIGTERM
    subprocess.run(command("stopped", "--resume"), check=True)
    assert losses(tmp_path / "stopped", recipe) == whole
