"""A reduction that several programs share: each leaves a partial sum in global memory, the last to arrive adds them up.

Synchronisation: no program waits for another. Every program stores its partial sum and then counts itself at an atomic
counter, which must start at zero. The one that counts last has all partial sums before it, and reads them from L2
(cache_modifier=".cg"), since its own L1 may hold stale lines. It adds them in a fixed order, so that equal inputs give
equal bits whichever program comes last.
"""

import triton
import triton.language as tl

# Programs of a launch that occupy a large GPU: three per multiprocessor of an H200. With fewer, it is worth sharing a
# reduction; with more, adding up the partial sums costs more than it gains.
FULL_OCCUPANCY = 400


@triton.jit
def is_last_to_arrive(counter, programs):
    """Count this program's arrival, after its stores; true for the last of `programs`."""
    tl.debug_barrier()  # all threads of this program have stored before one of them counts
    return tl.atomic_add(counter, 1, sem="acq_rel") == programs - 1
