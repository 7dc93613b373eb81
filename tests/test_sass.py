"""Instructions of a thread, counted in listings and in compiled kernels whose counts are known beforehand.

A listing here is what nvdisasm prints, cut to what `sass` reads.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

import sass  # noqa: E402
import triton.language as tl  # noqa: E402
from offline import Case, compiled  # noqa: E402

needs_compiler = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the compiler")


def listing(text: str) -> str:
    """Labels and instructions, one a line, with the addresses and semicolons that nvdisasm prints; lines of comments as they are."""
    lines = []
    for line in text.split("\n"):
        line = line.strip()
        plain = not line or line.startswith("//") or line.endswith(":")
        lines.append(line if plain else f"        /*0000*/   {line} ;")
    return "\n".join([".text.kernel:", *lines])


# ---------------------------------------------------------------- counting in listings


def test_of_two_branches_the_longer_one_counts():
    count = sass.count(listing("""
        ISETP P0, R0
        @P0 BRA `(.L_else)
        FADD R1
        BRA `(.L_end)
        .L_else:
        FMUL R1
        FMUL R2
        FMUL R3
        .L_end:
        @!P0 STG R1
        EXIT
    """))
    assert (count.once, count.body) == (2 + 3 + 2, 0)
    assert count.opcodes() == {"ISETP": 1, "BRA": 1, "FMUL": 3, "STG": 1, "EXIT": 1}


def test_a_loop_is_told_from_what_runs_once():
    body = "\n".join(["FFMA R1"] * 30)
    count = sass.count(listing(f"""
        MOV R0
        MOV R1
        .L_loop:
        {body}
        @P0 BRA `(.L_loop)
        STG R1
        EXIT
    """))
    assert (count.once, count.body, count.inner) == (2 + 2, 31, 0)
    assert count.opcodes() == {"FFMA": 30, "BRA": 1}


def test_waiting_for_a_barrier_is_no_loop_of_work():
    count = sass.count(listing("""
        BAR.SYNC 0x0
        .L_wait:
        SYNCS.PHASECHK P0, [UR4]
        @!P0 BRA `(.L_wait)
        BRA.U UP0, `(.L_end)
        NOP
        .L_end:
        EXIT
    """))
    assert (count.once, count.body, count.inner) == (6, 0, 2)


def test_what_one_warp_does_for_all_is_left_out():
    count = sass.count(listing("""
        BAR.SYNC 0x0
        BRA.U UP0, `(.L_others)
        UMOV UR9, 0x4008
        UTCOMMA.4X gdesc[UR8], gdesc[UR10]
        UTCBAR [UR6], URZ
        .L_others:
        BAR.SYNC 0x0
        EXIT
    """))
    assert count.opcodes() == {"BAR": 2, "BRA": 1, "EXIT": 1}


def test_a_conditional_exit_ends_a_path_whose_rest_is_slow():
    count = sass.count(listing("""
        FMUL R1
        @P0 EXIT
        CALL.REL.NOINC `($trap)
        EXIT
        $trap:
        EXIT
    """))
    assert count.once == 2


def test_slow_paths_are_skipped_and_other_subroutines_counted_at_each_call():
    count = sass.count(listing("""
        FCHK P0, R1
        @!P0 BRA `(.L_fine)
        MOV R4
        MOV R5
        MOV R6
        MOV R7
        MOV R8
        MOV R9
        MOV R10
        MOV R11
        MOV R12
        @P1 BRA `(.L_checked)
        CALL.ABS.NOINC R28
        .L_checked:
        CALL.REL.NOINC `($__internal_0_$__cuda_sm3x_div_rn_noftz_f32_slowpath)
        .L_fine:
        CALL.REL.NOINC `($__internal_1_$__cuda_sm20_div_s64)
        CALL.REL.NOINC `($__internal_1_$__cuda_sm20_div_s64)
        EXIT
        $__internal_0_$__cuda_sm3x_div_rn_noftz_f32_slowpath:
        FMUL R1
        RET.REL.NODEC R6 `(kernel)
        $__internal_1_$__cuda_sm20_div_s64:
        IMAD R1
        IMAD R2
        RET.REL.NODEC R6 `(kernel)
    """))
    assert count.once == 2 + 2 * (1 + 3) + 1
    assert count.opcodes()["IMAD"] == 4
    assert count.opcodes()["FMUL"] == count.opcodes()["MOV"] == 0


@triton.jit
def seldom(x):
    return x * 2


def test_functions_said_to_be_rare_are_skipped():
    line = seldom.fn.__code__.co_firstlineno
    text = listing(f"""
        //## File "/elsewhere/{Path(__file__).name}", line 1
        ISETP P0, R0
        @P0 BRA `(.L_end)
        //## File "/elsewhere/{Path(__file__).name}", line {line} inlined at "/elsewhere/{Path(__file__).name}", line 1
        FMUL R1
        FMUL R1
        .L_end:
        //## File "/elsewhere/{Path(__file__).name}", line 1
        EXIT
    """)
    assert sass.count(text).once == 5
    assert sass.count(text).sources() == {(Path(__file__).name, 1): 3, (Path(__file__).name, line): 2}
    assert sass.count(text, rare=[seldom]).once == 3


def test_a_jump_that_cannot_be_followed_is_an_error():
    with pytest.raises(sass.ToolError, match="indirect"):
        sass.count(listing("BRX R2\nEXIT"))
    with pytest.raises(sass.ToolError, match="no instructions"):
        sass.count("")


# ---------------------------------------------------------------- counting in compiled kernels


@triton.jit
def ten_fma(x, out, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at)
    for _ in tl.static_range(10):
        value = tl.fma(value, value, 0.5)
    tl.store(out + at, value)


@triton.jit
def ten_fma_over_tiles(x, out, tiles, BLOCK: tl.constexpr):
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        at = tile * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(x + at)
        for _ in tl.static_range(10):
            value = tl.fma(value, value, 0.5)
        tl.store(out + at, value)


@triton.jit
def quotient(x, y, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.div_rn(tl.load(x + at), tl.load(y + at)))


def counted(kernel, types, block, capability=90):
    """Four warps: block / 128 elements a thread."""
    binary = compiled(Case(kernel, types, {"BLOCK": block}, {"num_warps": 4}), capability)
    return sass.count(sass.disassemble(binary.asm["cubin"]))


POINTERS = {"x": "*fp32", "out": "*fp32"}


@needs_compiler
@pytest.mark.parametrize("elements", [1, 4])
@pytest.mark.parametrize("capability", [90, 120])
def test_ten_fma_an_element(elements, capability):
    straight = counted(ten_fma, POINTERS, 128 * elements, capability)
    assert straight.body == 0
    assert straight.opcodes()["FFMA"] == 10 * elements
    assert straight.opcodes()["LDG"] == straight.opcodes()["STG"] == 1  # 16 bytes at most
    assert straight.sources()[Path(__file__).name, ten_fma.fn.__code__.co_firstlineno + 5] >= 10 * elements
    looped = counted(ten_fma_over_tiles, {**POINTERS, "tiles": "i32"}, 128 * elements, capability)
    assert looped.body >= 10 * elements
    assert looped.opcodes()["FFMA"] == 10 * elements
    assert looped.once < straight.once


@needs_compiler
def test_a_division_is_counted_without_its_slow_path():
    opcodes = counted(quotient, {**POINTERS, "y": "*fp32"}, 128).opcodes()
    assert opcodes["MUFU"] == opcodes["FCHK"] == 1
    assert opcodes["CALL"] == opcodes["RET"] == 0
