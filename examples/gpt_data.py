"""Text for a small language model: which files to read, how to turn them into tokens, and which batch belongs to which step.

Everything here is a function of the files and the seed. Batch 17 of seed 0 is the same whether a run starts there, passes through or
resumes, so two recipes can be compared on exactly the same batches.
"""

import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

SKIPPED_FOLDERS = {
    "__phello__", "__pycache__", "dist-packages", "ensurepip", "site-packages",  # not the library itself
    "idle_test", "test", "tests", "turtledemo",  # tests and demonstrations repeat themselves
    "encodings", "lib2to3", "pydoc_data",  # character tables, grammars, a copy of the manual
}  # fmt: skip
FILE_SEPARATOR = b"\n\n"


class DataError(Exception):
    """The text cannot be used as asked; the message says what to change."""


@dataclass(frozen=True)
class Corpus:
    """A tokenized text in two parts."""

    source: str
    """Where the text came from, for people."""
    train: np.ndarray
    """Token numbers, `[tokens]`, uint8 or uint16."""
    validation: np.ndarray
    vocab: int
    fingerprint: str
    """A hash of both parts: equal fingerprints mean equal batches."""


def standard_library_files(root: Path | None = None) -> list[Path]:
    """Every Python source of the standard library, sorted by its path, without tests, data tables and installed packages."""
    root = root or Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in root.rglob("*.py") if not SKIPPED_FOLDERS.intersection(path.relative_to(root).parts[:-1])]
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def unique_texts(files: Iterable[Path]) -> Iterator[tuple[Path, bytes]]:
    """The bytes of each file, exact copies and empty files left out."""
    seen = set()
    for path in files:
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            raise DataError(f"there is no file {path}") from None
        except IsADirectoryError:
            raise DataError(f"{path} is a folder; name the files in it, for instance --data {path}/*.txt") from None
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from None
        digest = hashlib.sha256(text).digest()
        if text.strip() and digest not in seen:
            seen.add(digest)
            yield path, text


def split_standard_library(root: Path | None = None) -> tuple[bytes, bytes]:
    """Training and validation text. About one file in twelve validates, chosen by a hash of its name, so that no file is in both."""
    root = root or Path(sysconfig.get_paths()["stdlib"])
    train, validation = [], []
    for path, text in unique_texts(standard_library_files(root)):
        name = path.relative_to(root).as_posix()
        validates = hashlib.sha256(name.encode()).digest()[0] % 12 == 0
        (validation if validates else train).append(text)
    return FILE_SEPARATOR.join(train), FILE_SEPARATOR.join(validation)


def split_files(files: Iterable[Path]) -> tuple[bytes, bytes]:
    """Training and validation text of the user's own files: the last tenth of each file validates."""
    train, validation = [], []
    for _, text in unique_texts(files):
        cut = len(text) * 9 // 10
        train.append(text[:cut])
        validation.append(text[cut:])
    return FILE_SEPARATOR.join(train), FILE_SEPARATOR.join(validation)


def bpe_tokens(train: bytes, validation: bytes, vocab: int, cache: Path) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of a byte-level BPE tokenizer with `vocab` entries, which learns from `train` unless `cache` holds one from before."""
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError:
        raise DataError('the library tokenizers is missing: pip install "quartet-compile[demo]"') from None

    texts = [part.decode("utf-8", errors="replace") for part in (train, validation)]
    if cache.exists():
        tokenizer = Tokenizer.from_file(str(cache))
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=vocab, initial_alphabet=alphabet, show_progress=False, min_frequency=2)
        tokenizer.train_from_iterator(texts[0].splitlines(keepends=True), trainer)
        cache.parent.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(cache))
    # One line at a time: the same tokens as the whole text at once for almost all text, and far less memory.
    encoded = []
    for text in texts:
        lines = tokenizer.encode_batch_fast(text.splitlines(keepends=True))
        encoded.append(np.concatenate([np.asarray(line.ids, dtype=np.uint16) for line in lines]) if lines else np.empty(0, np.uint16))
    return encoded[0], encoded[1]


def load_corpus(files: list[Path] | None, *, vocab: int, context: int, cache: Path) -> Corpus:
    """Read and tokenize the standard library, or `files` if given.

    A vocabulary of 256 means bytes; a larger one means a BPE tokenizer, kept at `cache`.
    """
    if files:
        train, validation = split_files(files)
        source = ", ".join(str(path) for path in files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")
    else:
        train, validation = split_standard_library()
        source = "the Python standard library"
    if vocab == 256:
        parts = [np.frombuffer(part, dtype=np.uint8) for part in (train, validation)]
    else:
        parts = list(bpe_tokens(train, validation, vocab, cache))
    for part, name in zip(parts, ("training", "validation"), strict=True):
        needed = 4 * (context + 1)
        if len(part) < needed:
            raise DataError(
                f"{source} is too little text: {len(part):,} tokens for {name}, and sequences of {context} need at least {needed:,}. "
                "Name more or longer files, or a preset with a shorter context."
            )
    fingerprint = hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()[:16]
    return Corpus(source, parts[0], parts[1], vocab, fingerprint)


def rows(tokens: np.ndarray, starts: Iterable[int], context: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and the targets one token later, each int64 `[len(starts), context]`."""
    windows = torch.from_numpy(np.stack([tokens[start : start + context + 1] for start in starts]).astype(np.int64))
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def training_batch(tokens: np.ndarray, *, step: int, seed: int, batch: int, context: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The batch of one step: random windows that depend on the seed and the step alone."""
    starts = np.random.default_rng([seed, step]).integers(0, len(tokens) - context, size=batch)
    return rows(tokens, starts, context)


def validation_batches(tokens: np.ndarray, *, count: int, batch: int, context: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Up to `count` batches of windows that do not overlap, spread evenly over the validation text; the same for every run and step."""
    available = (len(tokens) - 1) // context
    count = min(count, max(1, available // batch))
    windows = np.linspace(0, available - 1, count * batch).astype(np.int64)
    return [rows(tokens, windows[i * batch : (i + 1) * batch] * context, context) for i in range(count)]
