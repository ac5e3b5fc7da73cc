"""The walk as a Triton kernel; import only where Triton is, which CUDA builds of PyTorch bring.

Decisions depend on those before them: one program goes through the candidates of one image, and
programs run beside each other.
"""

import triton
import triton.language as tl


@triton.jit
def walk(near, blocked, room, taken, candidates, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Arguments as of `trio.pruning.walk.launch`, bytes for bools; `WIDTH`: a power of two."""
    image = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, WIDTH)
    inside = place < candidates
    is_blocked = tl.load(blocked + image * candidates + place, mask=inside, other=1).to(tl.int32)
    is_taken = tl.zeros([WIDTH], dtype=tl.int32)
    left = tl.load(room + image).to(tl.int32)
    row = near + image * candidates * candidates
    for candidate in range(candidates):
        here = place == candidate
        free = 1 - tl.max(tl.where(here, is_blocked, 0), axis=0)
        takes = tl.where(left > 0, free, 0)
        suppressed = tl.load(row + candidate * candidates + place, mask=inside, other=0)
        is_blocked = is_blocked | (suppressed.to(tl.int32) * takes)
        is_taken = tl.where(here, takes, is_taken)
        left -= takes
    tl.store(taken + image * candidates + place, is_taken.to(tl.uint8), mask=inside)
