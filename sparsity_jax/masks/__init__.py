"""Selection without sorting: the k largest of an array or of a whole tree, and the masks made of
them.

One order holds everywhere: numbers by size, subnormals as zero, NaN below every number, and below
NaN what an earlier mask (`before=`) left out. So NaN is the first to go and stays only where more
entries are asked for than there are numbers. Outside `jit` NaN is refused, with the path of its
array.

There are two ways to the k largest, and both give the same masks: `probes` on a CPU, `digits` on an
accelerator, where a loop that ends when data says so waits for the host. The platform a program is
compiled for decides, see `platforms`.

A mask is a tree of bool arrays, True = keep, with the structure of the tree it applies to.
"""

from sparsity_jax.masks.counts import ROUNDINGS, Rounding, count_of, num_pruned
from sparsity_jax.masks.select import apply, full, k_largest_mask, k_largest_masks, sparsity
from sparsity_jax.masks.thresholds import kth_largest, nonzero, random_mask

__all__ = [
    "ROUNDINGS",
    "Rounding",
    "apply",
    "count_of",
    "full",
    "k_largest_mask",
    "k_largest_masks",
    "kth_largest",
    "nonzero",
    "num_pruned",
    "random_mask",
    "sparsity",
]
