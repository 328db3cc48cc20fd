"""Selection without sorting: the k largest of an array or of a whole tree, and the masks made of
them.

One order holds everywhere: numbers by size, subnormals as zero, NaN below every number, and below
NaN what an earlier mask (`before=`) left out. So NaN is the first to go and stays only where more
entries are asked for than there are numbers. Outside `jit` NaN is refused, with the path of its
array.

A mask is a tree of bool arrays, True = keep, with the structure of the tree it applies to.
"""

from sparsity_jax.masks.counts import ROUNDINGS as ROUNDINGS
from sparsity_jax.masks.counts import Rounding as Rounding
from sparsity_jax.masks.counts import count_of as count_of
from sparsity_jax.masks.counts import num_pruned as num_pruned
from sparsity_jax.masks.select import apply as apply
from sparsity_jax.masks.select import full as full
from sparsity_jax.masks.select import k_largest_mask as k_largest_mask
from sparsity_jax.masks.select import sparsity as sparsity
from sparsity_jax.masks.thresholds import kth_largest as kth_largest
from sparsity_jax.masks.thresholds import nonzero as nonzero
from sparsity_jax.masks.thresholds import random_mask as random_mask
