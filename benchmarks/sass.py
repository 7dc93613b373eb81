"""How many instructions a thread issues, read off the machine code (SASS) of a compiled kernel.

nvdisasm, which ships with Triton, lists the instructions; they are cut into basic blocks and joined to a control-flow graph. A count is the
*longest path* through that graph: of the two sides of a branch the longer one, an instruction whose predicate is false like any other,
since it takes an issue slot too. Four things are not followed:
    slow paths    blocks that call a subroutine for operands out of the ordinary (IEEE division of subnormal numbers) or a trap
    rare          blocks of device functions that the caller names, because they hardly ever run
    elected       blocks that issue tcgen05.mma, which one warp does for all (`UTC?MMA`)
    repetition    every loop but the longest is gone through once: waits for the tensor cores, mostly. `Count.inner` tells of them.
Other subroutines (64-bit integer division) are counted at each call.
"""

from __future__ import annotations

import inspect
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_LABEL = re.compile(r"\s*([.$][\w.$]+|\w+):\s*$")
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_SOURCE = re.compile(r'"([^"]+)", line (\d+)')
_TARGET = re.compile(r"`\((\S+?)\)")
_LIBRARY = "/triton/language/"
"""In the paths of Triton's own functions, which are told by the line that uses them."""
_ELECTED = re.compile(r"UTC\wMMA")
_SLOW = ("slowpath", "trap")
"""In the names of subroutines that ordinary operands never reach. (``CALL.ABS`` calls the driver: a failed assertion.)"""

Line = tuple[str, int]
Issued = Counter[tuple[str, Line | None]]
"""What a path issues: (opcode without modifiers, line of the source) -> how many."""


class ToolError(RuntimeError):
    """A program that comes with Triton is missing or failed."""


@dataclass(frozen=True)
class Instruction:
    """opcode: with its modifiers. lines: (file name, line) of the source, innermost first, then those that it was inlined into."""

    opcode: str
    predicate: str
    operands: str
    lines: tuple[Line, ...] = ()

    @property
    def family(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.split(".")[0]

    @property
    def target(self) -> str | None:
        """The label that it jumps to."""
        found = _TARGET.search(self.operands)
        return found.group(1) if found else None

    @property
    def conditional(self) -> bool:
        """A jump that may not be taken: predicated, or with a predicate for operand (``BRA.U UP0, `(label)``)."""
        return bool(self.predicate) or not self.operands.startswith("`(")


@dataclass(frozen=True)
class Count:
    """Instructions a thread issues: `once`, and `body` in each pass through the longest loop (0: no loop of `LOOP` instructions).

    issued: those of the body, or of everything without a loop. inner: instructions of the longest other loop, gone through once.
    """

    once: int
    body: int
    issued: Issued = field(default_factory=Counter)
    inner: int = 0

    def opcodes(self) -> Counter[str]:
        """How many of each, modifiers dropped."""
        return _summed((family, n) for (family, _), n in self.issued.items())

    def sources(self) -> Counter[Line | None]:
        """How many from each line of the source."""
        return _summed((line, n) for (_, line), n in self.issued.items())


LOOP = 12
"""Instructions from which a loop is one of work: shorter ones wait for a barrier."""


# ---------------------------------------------------------------- listing


def tool(name: str) -> str:
    """The path of "ptxas" or "nvdisasm", as Triton finds it."""
    import triton

    try:
        found = getattr(triton.knobs.nvidia, name)
    except RuntimeError as error:
        raise ToolError(f"{name}, which comes with Triton on Linux, is missing: {error}") from error
    return found.path


def disassemble(cubin: bytes) -> str:
    """nvdisasm's listing with source lines."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool("nvdisasm"), "-gi", "-c", file.name], capture_output=True, text=True)
    if done.returncode:
        raise ToolError(f"nvdisasm: {done.stderr.strip() or done.returncode}")
    return done.stdout


def parse(listing: str) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions in order, and the index of the instruction behind each label."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    lines: list[Line] = []
    fresh = True
    for text in listing.splitlines():
        if text.lstrip().startswith("//## File"):
            if fresh:
                lines, fresh = [], False
            places = _SOURCE.findall(text)
            lines += [(Path(name).name, int(number)) for name, number in places if _LIBRARY not in name]
        elif found := _INSTRUCTION.match(text):
            predicate, opcode, operands = found.groups()
            instructions.append(Instruction(opcode, predicate or "", operands, tuple(lines)))
            fresh = True
        elif found := _LABEL.match(text):
            labels[found.group(1)] = len(instructions)
    return instructions, labels


# ---------------------------------------------------------------- control flow


class Graph:
    """Basic blocks, each named by the index of its first instruction, and the edges between them."""

    def __init__(self, listing: str, rare: Iterable[Any] = ()) -> None:
        self.instructions, self.labels = parse(listing)
        if not self.instructions:
            raise ToolError("no instructions in the listing")
        self._rare = [_lines_of(function) for function in rare]
        ends = {i + 1 for i, at in enumerate(self.instructions) if at.family in ("BRA", "BRX", "JMX", "EXIT", "RET", "CALL")}
        starts = sorted({0, *self.labels.values(), *ends} - {len(self.instructions)})
        self.blocks = {start: range(start, end) for start, end in zip(starts, [*starts[1:], len(self.instructions)], strict=True)}
        self._issued: dict[int, Issued] = {}
        self.after = {start: self._successors(block) for start, block in self.blocks.items()}

    def _successors(self, block: range) -> tuple[int, ...]:
        last = self.instructions[block[-1]]
        follows = (block.stop,) if block.stop < len(self.instructions) else ()
        match last.family:
            case "BRA":
                if last.target not in self.labels:
                    raise ToolError(f"a jump to an unknown place: {last.operands}")
                return (*follows, self.labels[last.target]) if last.conditional else (self.labels[last.target],)
            case "EXIT" | "RET":
                return follows if last.predicate else ()
            case "BRX" | "JMX":
                raise ToolError("an indirect jump: paths cannot be counted")
        return follows

    def avoided(self, start: int) -> bool:
        """A slow path, or mostly instructions of a rare function."""
        block = [self.instructions[i] for i in self.blocks[start]]
        if any(at.family == "CALL" and _is_slow(at) for at in block):
            return True
        rare = sum(any(lines.intersection(at.lines) for lines in self._rare) for at in block)
        return 2 * rare > len(block)

    def issued(self, start: int) -> Issued:
        """What a block issues, with the subroutines that it calls, which are put down to the line that calls them."""
        if start in self._issued:
            return self._issued[start]
        counted = self._issued[start] = Counter()
        if any(_ELECTED.fullmatch(self.instructions[i].family) for i in self.blocks[start]):
            return counted
        for i in self.blocks[start]:
            at = self.instructions[i]
            line = at.lines[0] if at.lines else None
            counted[at.family, line] += 1
            if at.family == "CALL":
                if at.target not in self.labels:
                    raise ToolError(f"a call to an unknown place: {at.operands}")
                for (family, _), n in self.longest(self.labels[at.target]).items():
                    counted[family, line] += n
        return counted

    def reachable(self, entry: int) -> tuple[list[int], set[tuple[int, int]]]:
        """Blocks from `entry` on, successors first, and the edges that close loops; without avoided blocks."""
        done: list[int] = []
        state: dict[int, str] = {}
        back: set[tuple[int, int]] = set()
        stack = [(entry, iter(self.after[entry]))]
        state[entry] = "open"
        while stack:
            block, successors = stack[-1]
            following = next(successors, None)
            if following is None:
                state[block] = "done"
                done.append(block)
                stack.pop()
            elif state.get(following) == "open":
                back.add((block, following))
            elif following not in state and not self.avoided(following):
                state[following] = "open"
                stack.append((following, iter(self.after[following])))
        return done, back

    def loops(self, entry: int) -> dict[int, set[int]]:
        """Header -> the blocks of its loop: those from which an edge back to the header can be reached."""
        done, back = self.reachable(entry)
        before: dict[int, set[int]] = {block: set() for block in done}
        for block in done:
            for following in self.after[block]:
                if following in before:
                    before[following].add(block)
        found: dict[int, set[int]] = {}
        for last, header in back:
            loop = found.setdefault(header, {header})
            todo = [last]
            while todo:
                block = todo.pop()
                if block not in loop:
                    loop.add(block)
                    todo += before[block]
        return found

    def longest(self, entry: int, within: Set[int] | None = None, without: Set[int] = frozenset()) -> Issued:
        """The longest path from `entry` to an end, or back to it. within: stay in these blocks; without: do not count these."""
        done, back = self.reachable(entry)
        length: dict[int, int] = {}
        following: dict[int, int | None] = {}
        for block in done:
            if within is not None and block not in within:
                continue
            onward = [after for after in self.after[block] if after in length and (block, after) not in back]
            closes = any((block, after) in back for after in self.after[block])
            ends = within is None and self.instructions[self.blocks[block][-1]].family in ("EXIT", "RET")  # if its predicate is true
            if not onward and not closes and not ends and self.after[block]:
                continue  # what follows is never run, so neither is this
            following[block] = best = max(onward, key=length.__getitem__, default=None)
            own = 0 if block in without else self.issued(block).total()
            length[block] = own + (0 if best is None else length[best])
        if entry not in length:
            raise ToolError("every path ends in a slow one")
        path: Issued = Counter()
        at: int | None = entry
        while at is not None:
            if at not in without:
                path.update(self.issued(at))
            at = following[at]
        return path


def _summed(counts: Iterable[tuple[Any, int]]) -> Counter[Any]:
    total: Counter[Any] = Counter()
    for key, n in counts:
        total[key] += n
    return total


def _is_slow(at: Instruction) -> bool:
    return at.opcode.startswith("CALL.ABS") or any(word in at.operands for word in _SLOW)


def _lines_of(function: Any) -> frozenset[Line]:
    """(file name, line) of a Triton function's source."""
    source, first = inspect.getsourcelines(function.fn)
    name = Path(inspect.getsourcefile(function.fn) or "").name
    return frozenset((name, first + i) for i in range(len(source)))


# ---------------------------------------------------------------- counts


def count(listing: str, rare: Sequence[Any] = ()) -> Count:
    """The count of the one kernel in a listing. rare: Triton functions that are taken never to run."""
    graph = Graph(listing, rare)
    entry = next((i for label, i in graph.labels.items() if label.startswith(".text.")), 0)
    loops = graph.loops(entry)
    sizes = {header: sum(len(graph.blocks[block]) for block in loop) for header, loop in loops.items()}
    main = max(sizes, key=sizes.__getitem__, default=None)
    if main is None or sizes[main] < LOOP:
        path = graph.longest(entry)
        return Count(path.total(), 0, path, max(sizes.values(), default=0))
    body = graph.longest(main, within=loops[main])
    once = graph.longest(entry, without=loops[main])
    return Count(once.total(), body.total(), body, max((size for header, size in sizes.items() if header != main), default=0))
