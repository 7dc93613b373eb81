"""The second launch of an operator begins while the first one ends: programmatic dependent launch, from sm_90 on.

The second needs everything of the first, so it waits; but by then it has been launched, its programs sit on the multiprocessors that the
first one's have left, and nothing is lost between the two. (PTX ISA, "griddepcontrol"; launched with the option ``launch_pdl``.)
EARLY, a constant of the kernels, is `Target.early`.
"""

import triton
import triton.language as tl


@triton.jit
def let_next_begin(EARLY: tl.constexpr):
    """In a first launch: the second one's programs may be placed where there is room."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_first(EARLY: tl.constexpr):
    """In a second launch, before it reads anything: until the first one has ended and all that it wrote is seen."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
