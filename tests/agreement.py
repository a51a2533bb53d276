"""How near two ways to one output must come: no kernel promises equal bits to both.

Sums are rounded by the number of threads, the batch's size and where in memory a tensor begins. Weights, and
the same call of the same model made again, are compared by bits instead.
"""

import torch

#: Of float32; others round more by how much coarser they are.
ABSOLUTE, RELATIVE = 1e-5, 3e-5


def outputs_agree(ours, theirs, message=None):
    """Whether two computations of one output differ by rounding alone.

    A rounding error has the size of the numbers that were added, not of their sum, so the absolute tolerance
    grows with the largest value.
    """
    coarser = torch.finfo(theirs.dtype).eps / torch.finfo(torch.float32).eps
    largest = max(1.0, theirs.abs().max().item()) if theirs.numel() else 1.0
    torch.testing.assert_close(
        ours, theirs, atol=ABSOLUTE * largest * coarser, rtol=RELATIVE * coarser, msg=message
    )
