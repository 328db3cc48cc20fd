"""Faults that somebody could write into the package, and for each the tests that must notice it.

    python experiments/robustness/mutations.py               # all of them
    python experiments/robustness/mutations.py --only 3 17   # these numbers
    python experiments/robustness/mutations.py --list
    python experiments/robustness/mutations.py --check       # texts and selections, no fault tried
    python experiments/robustness/mutations.py --unmutated   # the tests on the package as it is

Every fault is applied to a copy of the package in a temporary folder, which the tests then
import; the working tree stays as it is. Prints a table; exits 1 if a fault is not caught, or if
its text does not occur exactly once.

The column `what` says the fault in words that hold however the package is written. Who rewrites
a module adapts `file`, `old` and `new` to the new text, and leaves number and words.
"""

import argparse
import collections
import importlib
import os
import pathlib
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from typing import NamedTuple

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
PACKAGE = "sparsity_jax"
SLOWEST = 900  # seconds after which tests are ended: a fault may make a loop endless
LIBRARIES = (  # imported once, before any fork: they take seconds
    "flax.linen",
    "jax",
    "matplotlib.figure",
    "optax",
    "orbax.checkpoint",
    "scipy.linalg",
)
GUARD = """
import pathlib
import pytest
import sparsity_jax

def pytest_collection_finish(session):
    if pathlib.Path(sparsity_jax.__file__).parents[1] != pathlib.Path(__file__).parent:
        pytest.exit("the tests import another sparsity_jax than the changed copy", returncode=9)
"""


class Mutation(NamedTuple):
    """One fault: `old`, which occurs exactly once in `file` of the package, is replaced by `new`.

    Of the tests in the file `tests` those that `select` chooses (pytest's -k) must fail then.
    """

    number: int  # never given to another fault
    kind: str
    what: str
    file: str
    old: str
    new: str
    tests: str
    select: str


MUTATIONS = (
    Mutation(
        1,
        "dropped term",
        "ERK ratios: kernels that stay dense are not taken out of the budget of the others",
        "allocate.py",
        "left = budget - sum(sizes[path] for path in dense)",
        "left = budget",
        "test_allocate.py",
        "erk_is_the_published_rule",
    ),
    Mutation(
        2,
        "comparison",
        "the original's magnitude masks drop the weight at the threshold: > instead of >=",
        "allocate.py",
        "jnp.abs(leaf) >= threshold",
        "jnp.abs(leaf) > threshold",
        "test_allocate.py",
        "magnitude_masks_match_the_original and global",
    ),
    Mutation(
        3,
        "sign",
        "largest remainders: the layers with the smallest remainder lose one more",
        "allocate.py",
        "key=lambda name: removed[name] - shares[name]",
        "key=lambda name: shares[name] - removed[name]",
        "test_allocate.py",
        "layers_share_a_budget_by_largest_remainders",
    ),
    Mutation(
        4,
        "dropped mask",
        "a new mask may keep what an earlier mask left out",
        "allocate.py",
        "return kept if before is None else jax.tree.map(jnp.logical_and, kept, before)",
        "return kept",
        "test_allocate.py",
        "what_an_earlier_mask_left_out_goes_first",
    ),
    Mutation(
        5,
        "off by one",
        "structured pruning at a high ratio empties a layer instead of keeping one filter",
        "allocate.py",
        'least = 1 if selection == "structured" else 0',
        "least = 0",
        "test_allocate.py",
        "no_layer_is_emptied_at_any_ratio and filter",
    ),
    Mutation(
        6,
        "off by one",
        "gradient-flow rounds are counted from 0 instead of 1",
        "budgets.py",
        "i = np.arange(1, num_rounds + 1)\n",
        "i = np.arange(num_rounds)\n",
        "test_budgets.py",
        "round_ratios_of_the_original",
    ),
    Mutation(
        7,
        "off by one",
        "selection by share stops one channel before the number asked for",
        "budgets.py",
        'np.searchsorted(removed, wanted, side="right")',
        'np.searchsorted(removed, wanted, side="left")',
        "test_budgets.py",
        "select_equals_the_slow_reference",
    ),
    Mutation(
        8,
        "order of ties",
        "of channels with equal scores the lower index is removed first, not the higher",
        "budgets.py",
        "(-index, row.score)",
        "(index, row.score)",
        "test_budgets.py",
        "ties_keep_the_lower_index",
    ),
    Mutation(
        9,
        "off by one",
        "the minimum kept of a layer is floor(share * size), without the one more",
        "budgets.py",
        '"floor") + 1, int(size))',
        '"floor"), int(size))',
        "test_budgets.py",
        "what_the_minimum_protects",
    ),
    Mutation(
        10,
        "off by one",
        "only the newest checkpoint stays on disk, not the one before it",
        "checkpoint.py",
        "[-self._keep :]",
        "[-self._keep + 1 :]",
        "test_workdirs.py",
        "evaluation_uses_the_checkpoint_before",
    ),
    Mutation(
        11,
        "dropped check",
        "the first checkpoint is not compared with what was written",
        "checkpoint.py",
        "if not as_written:",
        "if as_written is None:",
        "test_workdirs.py",
        "the_first_checkpoint_is_read_back",
    ),
    Mutation(
        12,
        "factor",
        "a multiply-add of a matrix product counts as one FLOP, not two",
        "cost.py",
        "return 2 * math.prod(out) * math.prod(",
        "return math.prod(out) * math.prod(",
        "test_cost.py",
        "matrix_products_by_hand",
    ),
    Mutation(
        13,
        "comparison",
        "FLOPs without padding: the first pixel of an image counts as padding",
        "cost.py",
        "(positions >= 0)",
        "(positions > 0)",
        "test_cost.py",
        "convolutions_by_hand",
    ),
    Mutation(
        14,
        "dropped factor",
        "FLOPs of a loop of known length count once, not as often as it runs",
        "cost.py",
        'return _scale(count, eqn.params["length"])',
        "return count",
        "test_cost.py",
        "programs_inside_programs",
    ),
    Mutation(
        15,
        "inverted mask",
        "the price of channels is that of the network without the channels that are kept",
        "groups.py",
        "gone = ~np.asarray(keep[name])",
        "gone = np.asarray(keep[name])",
        "test_cost.py",
        "the_price_of_channels",
    ),
    Mutation(
        16,
        "comparison",
        "two latencies: faster and slower are confused",
        "cost.py",
        '"faster" if low > 1 else "slower" if high < 1',
        '"slower" if low > 1 else "faster" if high < 1',
        "test_cost.py",
        "verdicts",
    ),
    Mutation(
        17,
        "wrong formula",
        "normalisation subtracts the mean without dividing it by the deviation",
        "data.py",
        "(1 / (255 * std_array)) - mean_array / std_array",
        "(1 / (255 * std_array)) - mean_array",
        "test_data.py",
        "test_preprocess",
    ),
    Mutation(
        18,
        "wrong key",
        "random shifts: rows are moved by the offset of columns",
        "data.py",
        "jnp.arange(height) + offsets[:, :1]",
        "jnp.arange(height) + offsets[:, 1:]",
        "test_data.py",
        "shift_flip_by_hand",
    ),
    Mutation(
        19,
        "dropped mirror",
        "images are never mirrored: both choices of a flip are the same columns",
        "data.py",
        "jnp.where(flips[:, None], jnp.arange(width)[::-1], jnp.arange(width))",
        "jnp.where(flips[:, None], jnp.arange(width), jnp.arange(width))",
        "test_data.py",
        "shift_flip_by_hand",
    ),
    Mutation(
        20,
        "off by one",
        "a label that equals the number of classes counts as a class",
        "sources.py",
        "if not 0 <= label < num_classes:",
        "if not 0 <= label <= num_classes:",
        "test_sources.py",
        "a_bad_record_is_told",
    ),
    Mutation(
        21,
        "wrong key",
        "EXIF orientation 8 is mirrored top to bottom where orientation 7 should be",
        "decoding.py",
        "if orientation in (3, 4, 7, 8):",
        "if orientation in (3, 4, 6, 8):",
        "test_decoding.py",
        "orientation_is_that_of_exif",
    ),
    Mutation(
        22,
        "rounding",
        "greys of another maximum are rounded down, not to the nearest",
        "decoding.py",
        "(255 * levels + maximum // 2) // maximum",
        "(255 * levels) // maximum",
        "test_decoding.py",
        "greys_of_any_maximum_are_scaled",
    ),
    Mutation(
        23,
        "inverse",
        "compression is bytes of the compact network over those of the dense one",
        "evaluate.py",
        'stock["bytes"] / stock["bytes_compact"]',
        'stock["bytes_compact"] / stock["bytes"]',
        "test_evaluate.py",
        "numbers_of_a_network_with_channels_cut",
    ),
    Mutation(
        232,
        "dropped check",
        "an exported file that was changed is loaded",
        "export.py",
        "if written.get(name) != digest:",
        "if name not in written:",
        "test_evaluate.py",
        "folders_that_cannot_be_loaded",
    ),
    Mutation(
        24,
        "wrong key",
        "every member of a sweep is evaluated with the weights of the first",
        "evaluate.py",
        "lambda leaf, i=i: leaf[i], parts",
        "lambda leaf, i=i: leaf[0], parts",
        "test_evaluate.py",
        "members_trained_at_once",
    ),
    Mutation(
        25,
        "off by one",
        "deviation over seeds divides by n instead of n - 1",
        "evaluate.py",
        "np.std(values, ddof=1)",
        "np.std(values)",
        "test_evaluate.py",
        "single_weights_are_no_compression",
    ),
    Mutation(
        26,
        "off by one",
        "the sample deviation of the report divides by n instead of n - 1",
        "report/series.py",
        "known.std(ddof=1)",
        "known.std(ddof=0)",
        "test_report.py",
        "mean_and_std_leave_missing_values_out",
    ),
    Mutation(
        27,
        "complement",
        "the share removed is the share that is left",
        "report/series.py",
        'return 1 - number(row.get("num_kept")) / whole',
        'return number(row.get("num_kept")) / whole',
        "test_report.py",
        "shares_removed_are_counted",
    ),
    Mutation(
        28,
        "dropped check",
        "a column of the summary takes the nearest ratio, however far it is",
        "report/series.py",
        "tolerance=NEAR",
        "tolerance=None",
        "test_report.py",
        "ratios_are_never_interpolated",
    ),
    Mutation(
        29,
        "logic",
        "a sum counts as zero for a removed channel if one term is, not if all are",
        "channels/rules.py",
        "return all(operand.zero for operand in operands)",
        "return any(operand.zero for operand in operands)",
        "test_groups.py",
        "channels_by_hand_and_nothing_left_out",
    ),
    Mutation(
        30,
        "logic",
        "a product counts as zero for a removed channel only if all factors are",
        "channels/rules.py",
        '"mul and": any_zero',
        '"mul and": all_zero',
        "test_groups.py",
        "channels_by_hand_and_nothing_left_out",
    ),
    Mutation(
        31,
        "off by one",
        "every part of a split axis has the labels of the first part",
        "channels/rules.py",
        "        start += size\n",
        "",
        "test_groups.py",
        "masked_equals_compact and (lstm or vit)",
    ),
    Mutation(
        32,
        "comparison",
        "the largest ratio of a curve that loses nothing is the smallest",
        "geometry.py",
        "return max(good, default=None)",
        "return min(good, default=None)",
        "test_geometry.py",
        "criteria_differ_where_they_should or actual_limits_of_curves",
    ),
    Mutation(
        33,
        "comparison",
        "the bisection for a limit keeps the half where pruning fails",
        "geometry.py",
        "                low = middle\n            else:\n                high = middle\n",
        "                high = middle\n            else:\n                low = middle\n",
        "test_geometry.py",
        "the_limit_of_a_falling_curve_is_found",
    ),
    Mutation(
        34,
        "comparison",
        "the share of weights without curvature counts those that have some",
        "geometry.py",
        "np.asarray(norms) < self.threshold",
        "np.asarray(norms) > self.threshold",
        "test_geometry.py",
        "weights_of_dead_units_have_no_curvature",
    ),
    Mutation(
        35,
        "factor",
        "an L2 penalty moves curvature by its strength, not by twice that",
        "geometry.py",
        "a + 2 * self.l2 * b",
        "a + self.l2 * b",
        "test_geometry.py",
        "an_l2_penalty_moves_all_values",
    ),
    Mutation(
        36,
        "wrong key",
        "all probes of a spectrum start from the same random vector",
        "geometry.py",
        "jax.random.fold_in(key, number)",
        "jax.random.fold_in(key, 0)",
        "test_geometry.py",
        "probes_start_differently_and_repeat",
    ),
    Mutation(
        37,
        "sign",
        "the gap is actual less predicted limit",
        "report/limits.py",
        'pairs["predicted"] - pairs["limit"]',
        'pairs["limit"] - pairs["predicted"]',
        "test_geometry_figures.py",
        "gap_is_worked_by_hand",
    ),
    Mutation(
        38,
        "sign",
        "a falling loss on the way to the prediction is said to make the limit smaller",
        "report/limits.py",
        '"larger" if first < 0 else "smaller"',
        '"larger" if first > 0 else "smaller"',
        "test_geometry_figures.py",
        "verdicts_know_the_gradient",
    ),
    Mutation(
        39,
        "sign",
        "learned scales climb the loss: the Adam step is added",
        "gradinit.py",
        "scale - move, floor",
        "scale + move, floor",
        "test_gradinit.py",
        "scales_match_the_original",
    ),
    Mutation(
        40,
        "off by one",
        "the bias correction of the scales' Adam is that of the next step",
        "gradinit.py",
        "count = state.step + 1",
        "count = state.step + 2",
        "test_gradinit.py",
        "scales_match_the_original",
    ),
    Mutation(
        41,
        "wrong key",
        "a layer pruned alone by filters loses input channels, and the other way round",
        "growing.py",
        'along = axes.outputs if granularity == "filter" else axes.inputs',
        'along = axes.inputs if granularity == "filter" else axes.outputs',
        "test_greg.py",
        "weights_and_input_channels or filters_go_with_all",
    ),
    Mutation(
        42,
        "complement",
        "the ratio of a row is the share of kernel weights that is left",
        "greg.py",
        "ratio=1 - left / trees.size(kernel_masks)",
        "ratio=left / trees.size(kernel_masks)",
        "test_greg.py",
        "filters_go_with_all_that_is_coupled",
    ),
    Mutation(
        43,
        "dropped mask",
        "noise moves weights that are masked",
        "greg.py",
        "kept=state.masks,\n",
        "kept=None,\n",
        "test_greg.py",
        "noise_on_weights",
    ),
    Mutation(
        44,
        "inverted mask",
        "masking a group's channels keeps those that are to go",
        "groups.py",
        "jnp.where(kept.reshape(shape), leaf, jnp.zeros((), leaf.dtype))",
        "jnp.where(kept.reshape(shape), jnp.zeros((), leaf.dtype), leaf)",
        "test_groups.py",
        "masked_equals_compact and (small_cnn or lenet)",
    ),
    Mutation(
        45,
        "logic",
        "an entry that belongs to several channels stays while one of them does, not all",
        "groups.py",
        "stays[index[~kept]] = False",
        "stays[index[~kept]] = False; stays[index[kept]] = True",
        "test_groups.py",
        "test_hostile",
    ),
    Mutation(
        46,
        "dropped check",
        "a group of which no channel stays is accepted",
        "groups.py",
        "jax.core.Tracer) and not np.any(kept):",
        "jax.core.Tracer) and kept is None:",
        "test_groups.py",
        "test_errors",
    ),
    Mutation(
        47,
        "off by one",
        "the largest gap is counted from the first score compared, not from the first of all",
        "growing.py",
        "(jnp.argmax(gaps) + trim + 1)",
        "(jnp.argmax(gaps) + 1)",
        "test_growing.py",
        "largest_gap_leaves_out_the_ends",
    ),
    Mutation(
        48,
        "wrong weight",
        "the smoothed ratio of scores takes 0.9 of the new one and 0.1 of the old",
        "growing.py",
        "0.9 * old.ratio + 0.1 * ratio",
        "0.1 * old.ratio + 0.9 * ratio",
        "test_growing.py",
        "replayed_weights_give_the_penalties_of_the_original",
    ),
    Mutation(
        49,
        "comparison",
        "pushing ends one update late: > instead of >= at the last update",
        "growing.py",
        "done |= updates >= self.plan.pick_updates + self.plan.push_updates",
        "done |= updates > self.plan.pick_updates + self.plan.push_updates",
        "test_growing.py",
        "penalties_and_phases_follow_the_rules",
    ),
    Mutation(
        50,
        "sign",
        "the growing penalty is subtracted from the gradient",
        "growing.py",
        "(update + reg * w)",
        "(update - reg * w)",
        "test_growing.py",
        "penalties_and_phases_follow_the_rules or coupled_groups_are_penalised",
    ),
    Mutation(
        51,
        "swapped",
        "what stays gets the growing penalty, what goes the recovering one",
        "growing.py",
        "jnp.where(keep, reg_kept, reg_pruned)",
        "jnp.where(keep, reg_pruned, reg_kept)",
        "test_growing.py",
        "penalties_and_phases_follow_the_rules",
    ),
    Mutation(
        52,
        "swapped",
        "curves of groups: those that stay have the colour of those that go",
        "report/training.py",
        "KEPT if kept else PRUNED",
        "PRUNED if kept else KEPT",
        "test_growing_figures.py",
        "groups_are_coloured_by_what_happens_to_them",
    ),
    Mutation(
        53,
        "wrong key",
        "norms are drawn against the penalty of what stays",
        "report/training.py",
        '"reg_pruned", {"score_kept"',
        '"reg_kept", {"score_kept"',
        "test_growing_figures.py",
        "norms_by_penalty",
    ),
    Mutation(
        54,
        "dropped term",
        "the checksum of a row leaves out the lines before it",
        "intact.py",
        "total = zlib.crc32(line.encode(), before)",
        "total = zlib.crc32(line.encode())",
        "test_report.py",
        "resume_drops_rows_after_the_checkpoint",
    ),
    Mutation(
        55,
        "dropped check",
        "a changed file is never noticed",
        "intact.py",
        "known is not None and known != digest_of(path)",
        "known is None and known != digest_of(path)",
        "test_workdirs.py",
        "environment_and_rows_say_when_they_were_changed",
    ),
    Mutation(
        56,
        "dropped check",
        "a file that came into a sealed folder without a checksum goes unnoticed",
        "intact.py",
        "for name in sorted({*sums, *there} - {SUMS}):",
        "for name in sorted({*sums} - {SUMS}):",
        "test_workdirs.py",
        "a_file_that_came_into_a_sealed_folder",
    ),
    Mutation(
        57,
        "swapped",
        "layout out_in: inputs and outputs of a kernel are exchanged",
        "kernels.py",
        "return Axes((1,), (0,), tuple(range(2, rank)))",
        "return Axes((0,), (1,), tuple(range(2, rank)))",
        "test_kernels.py",
        "layouts_by_name_or_refused",
    ),
    Mutation(
        58,
        "logic",
        "what is named a kernel stays one although `exclude` names it",
        "kernels.py",
        "chosen = (known | included) - excluded",
        "chosen = known | (included - excluded)",
        "test_kernels.py",
        "names_decide_only_as_far_as_they_tell",
    ),
    Mutation(
        59,
        "comparison",
        "vectors called weight, such as those of norms, count as kernels",
        "kernels.py",
        "if is_kernel(path) and leaf.ndim > 1}",
        "if is_kernel(path) and leaf.ndim > 0}",
        "test_kernels.py",
        "names_decide_only_as_far_as_they_tell",
    ),
    Mutation(
        60,
        "swapped",
        "of two tied labels the higher represents both, so that frozen entries may die",
        "channels/labels.py",
        "self._unite(high, low)",
        "self._unite(low, high)",
        "test_labels.py",
        "ties_and_freezes_make_a_partition",
    ),
    Mutation(
        61,
        "off by one",
        "tying two products of different length leaves out one factor of the longer",
        "channels/labels.py",
        "rest = b[len(a) - 1 :]",
        "rest = b[len(a) :]",
        "test_labels.py",
        "every_constraint_holds_in_the_end or tie_of",
    ),
    Mutation(
        62,
        "off by one",
        "the three-term recurrence of Lanczos subtracts the wrong previous coefficient",
        "linops.py",
        "jnp.where(step > 0, betas[step - 1], 0)",
        "jnp.where(step > 0, betas[step - 2], 0)",
        "test_linops.py",
        "memory_without_basis or all_ritz_values",
    ),
    Mutation(
        63,
        "wrong key",
        "residuals of eigenpairs come from the first components of the Ritz vectors, not the last",
        "linops.py",
        "betas[-1] * np.abs(mixing[-1])",
        "betas[-1] * np.abs(mixing[0])",
        "test_linops.py",
        "top_eigenpairs",
    ),
    Mutation(
        64,
        "wrong formula",
        "Ritz weights are first components of eigenvectors, without the square",
        "linops.py",
        "return values, vectors[0] ** 2\n",
        "return values, np.abs(vectors[0])\n",
        "test_linops.py",
        "quadrature_is_exact_for_polynomials",
    ),
    Mutation(
        65,
        "off by one",
        "the standard error of a trace comes from the deviation that divides by n",
        "linops.py",
        "jnp.std(samples / scale, ddof=1)",
        "jnp.std(samples / scale)",
        "test_linops.py",
        "standard_error_of_a_trace_has",
    ),
    Mutation(
        66,
        "dropped term",
        "Hutch++ leaves out the trace on the known subspace",
        "linops.py",
        "return Trace(known + rest.trace, rest.standard_error)",
        "return Trace(rest.trace, rest.standard_error)",
        "test_linops.py",
        "hutchpp_is_exact_for_low_rank",
    ),
    Mutation(
        67,
        "comparison",
        "a lock of another host ends while it is fresh and holds once it is old",
        "lock.py",
        "if not here and age > stale_seconds:",
        "if not here and age < stale_seconds:",
        "test_lock.py",
        "a_lock_of_another_host_ends",
    ),
    Mutation(
        68,
        "comparison",
        "a process id that was given to another process still holds the lock",
        "lock.py",
        'return owner.get("process") != _process(pid)',
        "return False",
        "test_lock.py",
        "a_process_of_this_host_that_is_gone_holds_nothing",
    ),
    Mutation(
        69,
        "inverse",
        "logits are multiplied by the temperature",
        "losses.py",
        "jnp.promote_types(logits.dtype, jnp.float32)) / temperature",
        "jnp.promote_types(logits.dtype, jnp.float32)) * temperature",
        "test_losses.py",
        "smoothing_mixes_in_the_uniform_distribution",
    ),
    Mutation(
        70,
        "wrong formula",
        "label smoothing sums over classes instead of averaging",
        "losses.py",
        "label_smoothing * log_probabilities.mean(-1)",
        "label_smoothing * log_probabilities.sum(-1)",
        "test_losses.py",
        "smoothing_mixes_in_the_uniform_distribution",
    ),
    Mutation(
        71,
        "off by one",
        "among ties at the k-th largest one entry too many is kept",
        "masks.py",
        "reached & (position < cut)",
        "reached & (position <= cut)",
        "test_masks.py",
        "mask_equals_sorting",
    ),
    Mutation(
        # in place of 72, which was no fault: XLA makes a choice of a product with truth values
        156,
        "wrong formula",
        "a mask leaves the weights as they are",
        "masks.py",
        "jnp.where(mask, leaf, jnp.zeros_like(leaf))",
        "jnp.where(mask, leaf, leaf)",
        "test_masks.py",
        "apply_density_and_sparsity",
    ),
    Mutation(
        73,
        "off by one",
        "a layer of growing regularisation may lose all its groups",
        "masks.py",
        "return min(wanted, size - 1)",
        "return min(wanted, size)",
        "test_growing.py",
        "lose_nothing_are_done_at_once",
    ),
    Mutation(
        74,
        "sign",
        "random masks prefer what an earlier mask left out",
        "masks.py",
        "jnp.where(kept, score, score - 1)",
        "jnp.where(kept, score, score + 1)",
        "test_masks.py",
        "random_masks_count_exactly",
    ),
    Mutation(
        75,
        "rounding",
        "0.29 of 100 are 28: a decimal share is multiplied in floating point without care",
        "masks.py",
        "        product = halves / 2\n",
        "        pass\n",
        "test_masks.py",
        "decimal_shares_mean_what_they_say",
    ),
    Mutation(
        76,
        "dropped case",
        "the first momentum is damped: it is not the gradient itself",
        "optim.py",
        "jnp.where(first, g, momentum * b + share * widen(g))",
        "(momentum * b + share * widen(g))",
        "test_optim.py",
        "optimizers_match_the_original and (projsgd or sfw)",
    ),
    Mutation(
        77,
        "dropped clip",
        "a Frank-Wolfe step may be longer than the way to the vertex",
        "optim.py",
        "jnp.clip(learning_rate * factor, 0, 1), 1.0)",
        "learning_rate * factor, 1.0)",
        "test_optim.py",
        "weights_stay_feasible",
    ),
    Mutation(
        78,
        "factor",
        "the gradient of the L2 penalty lacks its factor 2",
        "optim.py",
        "_add_slope(strength, lambda w: 2 * w)",
        "_add_slope(strength, lambda w: w)",
        "test_optim.py",
        "penalties_are_gradients_of_their_norms",
    ),
    Mutation(
        79,
        "off by one",
        "the original's schedule of iterations changes one iteration late",
        "optim.py",
        "change(following, step + 1)",
        "change(following, step)",
        "test_optim.py",
        "schedules_of_the_one_shot_original",
    ),
    Mutation(
        80,
        "dropped factor",
        "the proximal step ignores momentum in its threshold",
        "optim.py",
        "lambda s: rate * s / (1 - momentum)",
        "lambda s: rate * s",
        "test_optim.py",
        "proximal_and_subgradient_steps_reach_the_same_minimum",
    ),
    Mutation(
        81,
        "comparison",
        "the rate drops one step after the start of its epoch: > instead of >=",
        "optim.py",
        "jnp.sum(step >= boundaries)",
        "jnp.sum(step > boundaries)",
        "test_optim.py",
        "schemes_match_the_original",
    ),
    Mutation(
        82,
        "dropped filter",
        "rows of a stage that a continued run made anew appear twice",
        "pipeline.py",
        'return [row for row in before if row["stage"] not in stages_anew] + rows',
        "return before + rows",
        "test_pipeline.py",
        "a_run_inherits_what_its_origin_inherited",
    ),
    Mutation(
        83,
        "off by one",
        "rows of a training are labelled by the training before it",
        "pipeline.py",
        "(i for i in makes if i <= position)",
        "(i for i in makes if i < position)",
        "test_pipeline.py",
        "rows_say_where_they_come_from",
    ),
    Mutation(
        84,
        "comparison",
        "accuracy by chance is that of the rarest class",
        "pipeline.py",
        "np.bincount(labels).max()",
        "np.bincount(labels).min()",
        "test_pipeline.py",
        "accuracy_by_chance",
    ),
    Mutation(
        85,
        "wrong key",
        "all members of a sweep over seeds start from the seed of the first",
        "pipeline.py",
        'keys = [train.key_of(member.config["seed"]) for member in plan.members]',
        'keys = [train.key_of(plan.members[0].config["seed"]) for _ in plan.members]',
        "test_pipeline.py",
        "members_start_from_the_same_members",
    ),
    Mutation(
        86,
        "sign",
        "the vertex of the k-sparse polytope points along the gradient, not against it",
        "polytopes.py",
        "jnp.where(mask, -_narrow(self.radius, gradient.dtype)",
        "jnp.where(mask, _narrow(self.radius, gradient.dtype)",
        "test_polytopes.py",
        "k_sparse_matches_the_original",
    ),
    Mutation(
        87,
        "logic",
        "weights are shifted inside only if both norms are too large, not one of them",
        "polytopes.py",
        "(length > self.radius * self.k) | (largest > self.radius)",
        "(length > self.radius * self.k) & (largest > self.radius)",
        "test_polytopes.py",
        "k_sparse_matches_the_original or shift_inside_is_feasible",
    ),
    Mutation(
        88,
        "inverse",
        "the vertex of an Lp ball has the exponent p / q instead of q / p",
        "polytopes.py",
        "(magnitude / length) ** (q / self.p)",
        "(magnitude / length) ** (self.p / q)",
        "test_polytopes.py",
        "lp_balls_match_the_original",
    ),
    Mutation(
        89,
        "order",
        "the original's table of norms keeps the first array of a shape, not the last",
        "polytopes.py",
        "or 1.0 for path in order}",
        "or 1.0 for path in order[::-1]}",
        "test_polytopes.py",
        "a_later_array_of_equal_shape_overwrites",
    ),
    Mutation(
        90,
        "inverted flag",
        "a set in another format is replaced unless --overwrite asks for it",
        "prepare.py",
        "if directory and not flags.overwrite else []",
        "if directory and flags.overwrite else []",
        "test_prepare.py",
        "another_format_is_replaced_only_when_asked",
    ),
    Mutation(
        91,
        "wrong axes",
        "kernels of PyTorch keep their outputs before their inputs",
        "pretrained.py",
        "array.transpose(*range(2, array.ndim), 1, 0)",
        "array.transpose(*range(2, array.ndim), 0, 1)",
        "test_pretrained.py",
        "logits_of_the_original_through_a_file",
    ),
    Mutation(
        92,
        "dropped case",
        "flattened images of PyTorch are not brought into channels-last order",
        "pretrained.py",
        "_from_torch(array, flattened.get(path, 1))",
        "_from_torch(array, 1)",
        "test_pretrained.py",
        "flattened_images",
    ),
    Mutation(
        93,
        "comparison",
        "numbered layers are taken in descending order of their numbers",
        "pretrained.py",
        "return one < other",
        "return one > other",
        "test_pretrained.py",
        "numbers_against_the_order_are_refused_or_idle or names_of_a_network_of_ones_own",
    ),
    Mutation(
        94,
        "comparison",
        "the rank of a network counts networks of equal loss, itself too",
        "probes.py",
        "(tried.losses < loss)",
        "(tried.losses <= loss)",
        "test_probes.py",
        "oracle_is_brute_force",
    ),
    Mutation(
        95,
        "inverted mask",
        "the best network keeps what it should lose",
        "probes.py",
        "row[list(groups)] = False",
        "row[:] = ~row\n        row[list(groups)] = True",
        "test_probes.py",
        "oracle_is_brute_force",
    ),
    Mutation(
        96,
        "swapped",
        "filter pruning leaves the first convolution of a block whole, channel pruning the last",
        "ratios.py",
        '{"filter": branch[-1], "channel": branch[0]}',
        '{"filter": branch[0], "channel": branch[-1]}',
        "test_ratios.py",
        "places_of_the_original or ratios_of_the_original",
    ),
    Mutation(
        97,
        "off by one",
        "the last layer of an inclusive range of ratios is left out",
        "ratios.py",
        "paths[first : end + 1]",
        "paths[first:end]",
        "test_ratios.py",
        "ranges_of_the_original",
    ),
    Mutation(
        98,
        "complement",
        "inherited ratios are the shares that the other network keeps",
        "ratios.py",
        "removed = int((~kept).sum())",
        "removed = int(kept.sum())",
        "test_ratios.py",
        "inherited_counts_are_exact or test_inherited",
    ),
    Mutation(
        99,
        "comparison",
        "the search for a speed-up keeps the half that does not reach it",
        "ratios.py",
        "range(most + 1), target, key=speedup",
        "range(most + 1), -target, key=lambda number: -speedup(number)",
        "test_ratios.py",
        "smallest_factor_for_a_speedup",
    ),
    Mutation(
        102,
        "comparison",
        "bold in the summary: the smaller of two deviations decides, not the larger",
        "report/summary.py",
        "mean - other <= max(std, deviation)",
        "mean - other <= min(std, deviation)",
        "test_report.py",
        "bold_needs_more_than_a_deviation",
    ),
    Mutation(
        103,
        "wrong unit",
        "the steps of a curve's events are millionths of the ratio, not billionths",
        "report/events.py",
        '"curve": ("ratio", 10**9)',
        '"curve": ("ratio", 10**6)',
        "test_report.py",
        "tensorboard_tags_and_steps or no_two_events",
    ),
    Mutation(
        104,
        "order",
        "what a run knows about a row replaces what the row says itself",
        "report/runs.py",
        "return {**more, **row}",
        "return {**row, **more}",
        "test_report.py",
        "what_a_row_says_counts_before",
    ),
    Mutation(
        105,
        "wrong key",
        "a config file with a variant is looked for without its ending",
        "run.py",
        'file = f"{name}.py" if variant else name',
        "file = name",
        "test_run.py",
        "mistakes_on_the_command_line",
    ),
    Mutation(
        106,
        "wrong key",
        "GraSP reads the Hessian product at the temperature of the other measure",
        "scores.py",
        '"grasp": Measure(("w", "hg_grasp")',
        '"grasp": Measure(("w", "hg_preserve")',
        "test_scores.py",
        "every_measure_gives_the_originals_scores",
    ),
    Mutation(
        107,
        "swapped",
        "the tracked average gives the old value the weight of the new one",
        "scores.py",
        "(alpha * new + (1 - alpha) * before)",
        "((1 - alpha) * new + alpha * before)",
        "test_scores.py",
        "the_tracker_averages_the_last_steps_of_every_epoch",
    ),
    Mutation(
        108,
        "comparison",
        "layer-adaptive scores leave a filter out of its own sum: > instead of >=",
        "scores.py",
        "jnp.where(squares >= squares[:, None], squares, 0)",
        "jnp.where(squares > squares[:, None], squares, 0)",
        "test_scores.py",
        "whole_kernel_rules_on_kernels_worked_by_hand",
    ),
    Mutation(
        109,
        "dropped factor",
        "mean gradients count every batch alike, whatever its size",
        "batches.py",
        "share = length / num_examples(data) if weighted",
        "share = batch_size / num_examples(data) if weighted",
        "test_scores.py",
        "statistics_are_the_means_their_names_say",
    ),
    Mutation(
        110,
        "dropped mask",
        "distances from the median count filters that are masked to zero",
        "scores.py",
        "jnp.where(present, _norm(rows - row), 0)",
        "_norm(rows - row)",
        "test_scores.py",
        "whole_kernel_rules_on_kernels_worked_by_hand",
    ),
    Mutation(
        111,
        "off by one",
        "of the digits every fifth from the second of a class is test, not from the first",
        "sources.py",
        'np.argsort(digits.target, kind="stable")[::5]',
        'np.argsort(digits.target, kind="stable")[1::5]',
        "test_data.py",
        "digits_",
    ),
    Mutation(
        112,
        "order",
        "versions of a prepared set are compared as text: 9 is newer than 10",
        "sources.py",
        '[int(number) for number in path.name.split(".")]',
        'path.name.split(".")',
        "test_data.py",
        "newest_version_and_single_config_are_found",
    ),
    Mutation(
        113,
        "comparison",
        "slices that only touch count as overlapping",
        "sources.py",
        "max(a.skip, b.skip) < min(a.skip + a.take, b.skip + b.take)",
        "max(a.skip, b.skip) <= min(a.skip + a.take, b.skip + b.take)",
        "test_data.py",
        "slices_cut_splits",
    ),
    Mutation(
        114,
        "dropped factor",
        "in a mean over batches the shorter last batch counts like a whole one",
        "batches.py",
        "share = length / num_examples(data) if weighted",
        "share = batch_size / num_examples(data) if weighted",
        "test_spectrum.py",
        "the_batch_size_changes_rounding_only",
    ),
    Mutation(
        115,
        "factor",
        "the second-order term of a step lacks its half",
        "spectrum.py",
        "first, second / 2)",
        "first, second)",
        "test_spectrum.py",
        "taylor_terms_are_those",
    ),
    Mutation(
        116,
        "rounding",
        "the weight at a quantile is the floor(q n)-th smallest, not the ceil(q n)-th",
        "spectrum.py",
        "np.ceil(np.arange(num) / num * magnitudes.size)",
        "np.floor(np.arange(num) / num * magnitudes.size)",
        "test_spectrum.py",
        "weights_at_quantiles",
    ),
    Mutation(
        117,
        "dropped mask",
        "a network that was pruned before is pruned again as if it were dense",
        "stages.py",
        "allocate.keep_masks(state.params, counts, key, before=state.masks, **options)",
        "allocate.keep_masks(state.params, counts, key, **options)",
        "test_stages.py",
        "random_pruning_of_a_pruned_network or pruning_again_takes",
    ),
    Mutation(
        118,
        "comparison",
        "the histogram counts weights at a threshold as above it",
        "stages.py",
        "leaf > bound, magnitude_thresholds()",
        "leaf >= bound, magnitude_thresholds()",
        "test_stages.py",
        "the_histogram_",
    ),
    Mutation(
        119,
        "dropped case",
        "every ratio of a curve evaluates the network as it is, unpruned",
        "stages.py",
        "kept = pruning(problem, stage, position)(state, counts)",
        "kept = state.masks",
        "test_stages.py",
        "a_curve_equals_evaluating_every_pruned_network",
    ),
    Mutation(
        120,
        "off by one",
        "the first signal ends the process at once, not the second",
        "stopping.py",
        "while seen < 2:",
        "while seen < 1:",
        "test_stopping.py",
        "a_second_signal_ends_at_once or a_signal_inside_a_held_lock",
    ),
    Mutation(
        121,
        "comparison",
        "signals that were ignored are listened to, and the others are not",
        "stopping.py",
        "signal.getsignal(n) is not signal.SIG_IGN",
        "signal.getsignal(n) is not signal.SIG_DFL",
        "test_stopping.py",
        "an_ignored_signal_stays_ignored",
    ),
    Mutation(
        122,
        "wrong unit",
        "a training that goes on skips as many images as it has made steps",
        "stream.py",
        "[start * batch_size :]",
        "[start:]",
        "test_stream.py",
        "a_training_goes_on_anywhere_with_the_same_pixels",
    ),
    Mutation(
        123,
        "wrong value",
        "what fills up the last batch counts as class 0",
        "stream.py",
        "labels = np.full(batch_size, -1, np.int32)",
        "labels = np.full(batch_size, 0, np.int32)",
        "test_stream.py",
        "evaluation_visits_all_images_in_order",
    ),
    Mutation(
        124,
        "inverse",
        "the ratio of a random box is that of height to width",
        "stream.py",
        "h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))",
        "h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))",
        "test_stream.py",
        "ratio_of_a_random_box",
    ),
    Mutation(
        125,
        "dropped mask",
        "momentum of channels that were cut stays in the optimizer's state",
        "structured.py",
        "carried = state.opt_state and groups.mask(state.opt_state, channels, keep)",
        "carried = state.opt_state",
        "test_structured.py",
        "momentum_and_tracked_importance_go_through_cuts",
    ),
    Mutation(
        126,
        "complement",
        "the row of a cut tells the share of channels left as the share removed",
        "structured.py",
        "ratio=1 - num / total,",
        "ratio=num / total,",
        "test_structured.py",
        "one_round_removes_the_least_important",
    ),
    Mutation(
        127,
        "complement",
        "shares by rule: every group loses what it should keep",
        "structured.py",
        "removed = 1 - self.density(place, shares[name])",
        "removed = self.density(place, shares[name])",
        "test_structured.py",
        "every_group_loses_the_share_of_its_rule",
    ),
    Mutation(
        128,
        "dropped mask",
        "weights drawn anew have the variance of the dense network's fan-in",
        "surgery.py",
        "fan_in = jnp.maximum(rows.sum(), 1)",
        "fan_in = rows.size * 1.0",
        "test_surgery.py",
        "normal_has_the_variance_of_the_compact_network",
    ),
    Mutation(
        129,
        "dropped mask",
        "relative noise takes the mean square over all entries, the masked ones too",
        "surgery.py",
        "jnp.maximum(jnp.sum(mask), 1)\n",
        "leaf.size * 1.0\n",
        "test_surgery.py",
        "test_noise",
    ),
    Mutation(
        130,
        "comparison",
        "a range that lies strictly above its lower end contains it",
        "tables.py",
        "value <= self.low if self.above else value < self.low",
        "value < self.low",
        "test_tables.py",
        "ranges_contain_their_ends_unless_above",
    ),
    Mutation(
        131,
        "dropped check",
        "True is accepted as a whole number",
        "tables.py",
        "isinstance(value, bool) and kind is not bool",
        "False",
        "test_tables.py",
        "values_that_do_not_fit",
    ),
    Mutation(
        132,
        "dropped mask",
        "the mask is not applied to the weights after an update",
        "train.py",
        "params = masks.apply(optax.apply_updates(state.params, updates), state.masks)",
        "params = optax.apply_updates(state.params, updates)",
        "test_train.py",
        "pruned_weights_stay_zero",
    ),
    Mutation(
        133,
        "dropped mask",
        "evaluation counts the examples that fill up the last batch",
        "train.py",
        "jnp.where(index < size, labels[inside], -1)",
        "labels[inside]",
        "test_train.py",
        "evaluation_is_exact_for_any_batch_size",
    ),
    Mutation(
        134,
        "wrong key",
        "every epoch visits the examples in the order of the first",
        "train.py",
        "2**31 - 1 - epoch",
        "2**31 - 1",
        "test_train.py",
        "every_epoch_sees_every_example_once",
    ),
    Mutation(
        135,
        "dropped case",
        "the last epoch is not evaluated unless its number is a multiple",
        "train.py",
        "if epoch % fit.evaluate_every == 0 or epoch == fit.epochs:",
        "if epoch % fit.evaluate_every == 0:",
        "test_train.py",
        "evaluations_come_every_few_epochs_and_at_the_end",
    ),
    Mutation(
        136,
        "wrong method",
        "a rule on paths decides for every path that begins with its pattern",
        "trees.py",
        "for path in paths if re.fullmatch(pattern, path)}",
        "for path in paths if re.match(pattern, path)}",
        "test_trees.py",
        "the_first_matching_rule_decides or rules_that_cannot_work",
    ),
    Mutation(
        137,
        "dropped term",
        "reductions leave out the entries that do not fill eight equal slices",
        "trees.py",
        "if total % 8:\n",
        "if total < 0:\n",
        "test_trees.py",
        "fold",
    ),
    Mutation(
        138,
        "dropped factor",
        "the norm of an array whose squares leave the range is told in other units",
        "trees.py",
        "return scale * jnp.sqrt(jnp.sum(jnp.square(array / scale)))",
        "return jnp.sqrt(jnp.sum(jnp.square(array / scale)))",
        "test_precision.py",
        "reductions_depend_neither_on_the_type",
    ),
    Mutation(
        139,
        "off by one",
        "the tolerated loss is the sample deviation (n - 1) over batches",
        "width.py",
        "return float(np.std(_losses(batch_losses)))",
        "return float(np.std(_losses(batch_losses), ddof=1))",
        "test_width.py",
        "epsilon_is_the_population_deviation",
    ),
    Mutation(
        140,
        "comparison",
        "the original's removal leaves the weights that are tied with the last one",
        "originals.py",
        'distances.magnitudes, largest, side="right")',
        'distances.magnitudes, largest, side="left")',
        "test_width.py",
        "ties_go_together_in_the_original_only",
    ),
    Mutation(
        141,
        "factor",
        "sharpness of a curvature is it over epsilon, not over twice epsilon",
        "width.py",
        "np.minimum(curvature[curved] / (2 * epsilon),",
        "np.minimum(curvature[curved] / epsilon,",
        "test_width.py",
        "flat_spectrum or two_level_spectrum",
    ),
    Mutation(
        142,
        "swapped",
        "bounds of the enclosure move to the careless side by the rounding error",
        "width.py",
        "lower = bound(np.abs(values) + slack, weights)",
        "lower = bound(np.maximum(values - slack, 0.0), weights)",
        "test_width.py",
        "rounding_widens_the_enclosure",
    ),
    Mutation(
        143,
        "order",
        "a run goes on from its oldest whole checkpoint",
        "workdirs.py",
        "for number in reversed(numbers):",
        "for number in numbers:",
        "test_workdirs.py",
        "evaluation_uses_the_checkpoint_before or a_run_goes_on",
    ),
    Mutation(
        144,
        "off by one",
        "a run counts as finished while its last stage is under way",
        "workdirs.py",
        'self.progress.stage == len(self.config["pipeline"])',
        'self.progress.stage >= len(self.config["pipeline"]) - 1',
        "test_pipeline.py",
        "runs_that_cannot_be_started_from_are_named",
    ),
    Mutation(
        145,
        "inverted flag",
        "training uses the running statistics of batch norms, and leaves them as they are",
        "models/__init__.py",
        "variables, images, train=True, mutable",
        "variables, images, train=False, mutable",
        "test_models.py",
        "training_mode_updates_the_running_statistics",
    ),
    Mutation(
        146,
        "off by one",
        "running variances are the biased ones of a batch",
        "models/layers.py",
        "var * (count / (count - 1))",
        "var * 1.0",
        "test_models.py",
        "batch_norm_by_hand",
    ),
    Mutation(
        147,
        "swapped",
        "running means take nine tenths of the new batch",
        "models/layers.py",
        "0.9 * running_mean.value + 0.1 * mean",
        "0.1 * running_mean.value + 0.9 * mean",
        "test_models.py",
        "batch_norm_by_hand",
    ),
    Mutation(
        148,
        "off by one",
        "pooling drops the last window",
        "models/layers.py",
        "rows, columns = (x.shape[1] - size) // 2 + 1,",
        "rows, columns = (x.shape[1] - size) // 2,",
        "test_models.py",
        "max_pool_equals_window_reduction",
    ),
    Mutation(
        149,
        "wrong key",
        "dense networks use ReLU whatever activation is asked for",
        "models/mlp.py",
        "layers.Apply(ACTIVATIONS[activation])",
        "layers.Apply(nn.relu)",
        "test_models.py",
        "test_tanh",
    ),
    Mutation(
        150,
        "dropped option",
        "plain convolutional networks ignore the padding of their layout",
        "models/cnn.py",
        "Conv(width, 5, padding=0, bias=True))",
        "Conv(width, 5, bias=True))",
        "test_models.py",
        "names_orders_and_layers_of_the_original and greg/lenet5",
    ),
    Mutation(
        151,
        "dropped term",
        "inverted residual blocks do not add their input",
        "models/mobilenet.py",
        "return (layers.Residual((), steps),)",
        "return steps",
        "test_models.py",
        "logits_and_parameter_count_of_the_original and greg/mobilenetv2",
    ),
    Mutation(
        152,
        "swapped",
        "zero channels of a parameter-free shortcut all come behind the old ones",
        "models/resnet.py",
        "before = missing // 2",
        "before = 0",
        "test_models.py",
        "zero_pad_shortcut",
    ),
    Mutation(
        153,
        "logic",
        "the first block of the first stage halves the image too",
        "models/resnet.py",
        "stride = 2 if i > 0 and j == 0 else 1",
        "stride = 2 if j == 0 else 1",
        "test_models.py",
        "names_orders_and_layers_of_the_original and greg/resnet20",
    ),
    Mutation(
        154,
        "wrong key",
        "VGG with batch norm behind the ReLU has no ReLUs: its order is compared with a wrong name",
        "models/vgg.py",
        'if order == "conv_relu_bn":',
        'if order == "conv_relu":',
        "test_models.py",
        "logits_and_parameter_count_of_the_original and flow/VGG",
    ),
    Mutation(
        155,
        "wrong stage",
        "VGG: the widths of the stages end with 4 times the base, not 8",
        "models/vgg.py",
        "(1, 2, 4, 8, 8))",
        "(1, 2, 4, 8, 4))",
        "test_models.py",
        "test_parameter_count",
    ),
    Mutation(
        157,
        "dropped state",
        "what a training hands on is lost where a run is resumed behind it",
        "interface.py",
        "return opt_state if isinstance(opt_state, Carried) else ()",
        "return ()",
        "test_structured.py",
        "momentum_and_tracked_importance",
    ),
    Mutation(
        201,
        "off by one",
        "what an array depends on: each input is taken for the one after it",
        "channels/values.py",
        "[i for i in range(fresh.bit_length())",
        "[i + 1 for i in range(fresh.bit_length())",
        "test_ratios.py",
        "order_ignores",
    ),
    Mutation(
        233,
        "dropped mask",
        "what is zero nowhere counts as zero where channels are removed",
        "channels/values.py",
        "axis._replace(zero=False) for axis in value.axes",
        "axis._replace(zero=True) for axis in value.axes",
        "test_groups.py",
        "derivative",
    ),
    Mutation(
        202,
        "logic",
        "a product may sum over a removed axis only if it is zero in both factors",
        "channels/walk.py",
        "if not (first.zero or second.zero):",
        "if not (first.zero and second.zero):",
        "test_groups.py",
        "channels_by_hand_and_nothing_left_out",
    ),
    Mutation(
        203,
        "inverted mask",
        "the compact program has the channels that are removed",
        "channels/execute.py",
        "[self.removed.isdisjoint(labels)",
        "[not self.removed.isdisjoint(labels)",
        "test_groups.py",
        "masked_equals_compact and (small_cnn or lenet)",
    ),
    Mutation(
        211,
        "complement",
        "the share of a compact network is the share that it saves",
        "report/channels.py",
        '= number(row.get(f"{field}_compact")) / number(row.get(field))',
        '= 1 - number(row.get(f"{field}_compact")) / number(row.get(field))',
        "test_report.py",
        "compact_networks_keep_their_digits",
    ),
    Mutation(
        212,
        "wrong end",
        "the names of layers lose their first part instead of their last",
        "report/draw.py",
        'path.removesuffix("/kernel").split("/")',
        'path.removeprefix("params/").split("/")',
        "test_report.py",
        "short_paths",
    ),
    Mutation(
        213,
        "off by one",
        "a last row that was cut off is an error",
        "report/files.py",
        "if number == len(lines):",
        "if number == len(lines) - 1:",
        "test_report.py",
        "resume_drops_rows_after_the_checkpoint",
    ),
    Mutation(
        204,
        "comparison",
        "the figure of limits shows the whole range where the limits are close together",
        "report/limits.py",
        "if high - low < 0.6:",
        "if high - low > 0.6:",
        "test_geometry_figures.py",
        "window_is_around_the_limits",
    ),
    Mutation(
        205,
        "dropped term",
        "a training from initial weights makes no new network",
        "report/series.py",
        'if row.get("start") == "init" and network',
        "if network",
        "test_report.py",
        "from_initial_weights_forgets",
    ),
    Mutation(
        206,
        "wrong key",
        "zeros of all parameters are those of the prunable arrays",
        "report/pruning.py",
        "of all {sparsity_all:.2%}",
        "of all {sparsity:.2%}",
        "test_report.py",
        "zeros_of_the_chosen_arrays",
    ),
    Mutation(
        207,
        "comparison",
        "whole numbers get decimals, others none",
        "report/sections.py",
        "value == round(value)",
        "value != round(value)",
        "test_report.py",
        "amounts_keep_their_digits",
    ),
    Mutation(
        208,
        "dropped term",
        "shares of weight magnitudes leave out the weights that are zero",
        "report/training.py",
        'sum(row["counts"]) + row.get("num_zero", 0)',
        'sum(row["counts"])',
        "test_report.py",
        "magnitudes_of_every_visit",
    ),
    Mutation(
        240,
        "complement",
        "kinds of rows that a figure shows become plain tables, others do not",
        "report/page.py",
        "for kind in kinds.keys() - seen:",
        "for kind in kinds.keys() & seen:",
        "test_report.py",
        "rows_of_an_unknown_kind_show",
    ),
    Mutation(
        209,
        "dropped argument",
        "the title given for a page is not used",
        "report/__init__.py",
        "title=title, environment=environment)",
        "title=None, environment=environment)",
        "test_report.py",
        "a_report_can_be_written_elsewhere",
    ),
    Mutation(
        210,
        "dropped argument",
        "the folder given for a rebuilt page is not used",
        "report/__main__.py",
        "options.out or options.workdir",
        "options.workdir",
        "test_report.py",
        "a_report_can_be_written_elsewhere",
    ),
    Mutation(
        230,
        "comparison",
        "sums of increments that only reach a limit count as above it",
        "originals.py",
        "sums >= end if reach else sums > end",
        "sums >= end",
        "test_growing.py",
        "updates_are_counted_exactly_or",
    ),
    Mutation(
        231,
        "inverted mask",
        "the masks of slices keep those that are to go",
        "units.py",
        "jnp.broadcast_to(removed == 0, shape)",
        "jnp.broadcast_to(removed != 0, shape)",
        "test_allocate.py",
        "no_layer_is_emptied_at_any_ratio and filter",
    ),
    Mutation(
        214,
        "inverted test",
        "only values that are the default are told as other ones",
        "describe.py",
        "as_plain(values.get(name, default)) != default",
        "as_plain(values.get(name, default)) == default",
        "test_configs.py",
        "describe_tells",
    ),
    Mutation(
        215,
        "dropped case",
        "names of the library can be replaced by a user's",
        "extend.py",
        "if name in TAKEN[what]:",
        "if name not in table:",
        "test_extend.py",
        "names_of_the_library",
    ),
    Mutation(
        216,
        "inverted test",
        "a file with a user's names is refused if it is there",
        "imports.py",
        "if not path.is_file() or spec",
        "if path.is_file() or spec",
        "test_extend.py",
        "names_of_the_library",
    ),
    Mutation(
        217,
        "off by one",
        "the first member that is not there may be asked for",
        "members.py",
        "if max(numbers) >= len(every):",
        "if max(numbers) > len(every):",
        "test_pipeline.py",
        "mistakes_stop_before_a_run",
    ),
)


def misplaced(mutations: list[Mutation]) -> list[str]:
    """Sentences on the texts that do not occur exactly once, and on modules without any fault."""
    found = []
    for mutation in mutations:
        path = ROOT / PACKAGE / mutation.file
        times = path.read_text(encoding="utf-8").count(mutation.old) if path.is_file() else 0
        if times != 1:
            found.append(f"{mutation.number}: its text occurs {times} times in {mutation.file}")
    numbers = collections.Counter(mutation.number for mutation in MUTATIONS)
    double = [number for number, times in numbers.items() if times > 1]
    found += [f"{number}: is the number of several faults" for number in double]
    covered = {mutation.file for mutation in MUTATIONS}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        name = path.relative_to(ROOT / PACKAGE).as_posix()
        if name not in covered and "def " in path.read_text(encoding="utf-8"):
            found.append(f"{name} has no fault")
    return found


def unselected(mutations: list[Mutation]) -> list[str]:
    """Sentences on selections that choose no test."""
    files = sorted({mutation.tests for mutation in mutations})
    _, listed = run_pytest(["--collect-only", *(f"tests/{name}" for name in files)])
    names = [line.partition("::") for line in listed.splitlines() if "::" in line]
    found = []
    for mutation in mutations:
        own = [name.lower() for file, _, name in names if file.endswith(mutation.tests)]
        if not any(is_chosen(name, mutation.select) for name in own):
            found.append(f"{mutation.number}: {mutation.select!r} is no test of {mutation.tests}")
    return found


def is_chosen(name: str, select: str) -> bool:
    """Whether pytest's -k `select` chooses the test `name`."""

    def as_value(word: re.Match) -> str:
        return word[0] if word[0] in ("and", "or", "not") else str(word[0].lower() in name)

    return eval(re.sub(r"[^\s()]+", as_value, select))


def prepare_environment(package_folder: pathlib.Path) -> None:
    """What tests and the processes that they start need to import the package in that folder."""
    os.environ["PYTHONPATH"] = str(package_folder)
    os.environ["PYTHONSAFEPATH"] = "1"  # else the folder of the working tree comes first
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    cache = pathlib.Path(tempfile.gettempdir()) / "sparsity_jax_test_cache"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    sys.path[0] = str(package_folder)
    os.chdir(ROOT)


def run_pytest(arguments: list[str]) -> tuple[int, str]:
    """(exit code, output) of pytest in a fork of this process, which has the libraries imported."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        child = os.fork()
        if not child:
            code = 3
            try:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                code = int(pytest.main(["-x", "-n", "0", "--tb=line", *arguments]))
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        ended = time.monotonic() + SLOWEST
        found = (0, 0)
        while not found[0] and time.monotonic() < ended:
            time.sleep(0.05)
            found = os.waitpid(child, os.WNOHANG)
        if not found[0]:
            os.kill(child, signal.SIGKILL)
            found = os.waitpid(child, 0)
        output.seek(0)
        return os.waitstatus_to_exitcode(found[1]), output.read()


def outcome(tests: str, select: str) -> tuple[str, str]:
    """("caught", the test that failed), ("missed", "") or ("error", the end of the output)."""
    code, printed = run_pytest(["-p", "imported_copy", "-k", select, f"tests/{tests}"])
    if code == 0:
        return "missed", ""
    failed = re.search(r"^(?:FAILED|ERROR) \S+?::(\S+)", printed, re.MULTILINE)
    if code == 1 and failed:
        return "caught", failed[1]
    return "error", f"exit code {code}\n{printed[-1500:]}"


def try_mutation(folder: pathlib.Path, mutation: Mutation) -> bool:
    """Prints the row of one fault; returns whether it was caught."""
    path = folder / PACKAGE / mutation.file
    text = path.read_text(encoding="utf-8")
    started = time.monotonic()
    path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    try:
        told, detail = outcome(mutation.tests, mutation.select)
    finally:
        path.write_text(text, encoding="utf-8")
    seconds = time.monotonic() - started
    print(f"{mutation.number:>4}  {mutation.file:<22}{told:<8}{seconds:>5.0f} s  {mutation.what}")
    print(f"      {detail}", flush=True)
    return told == "caught"


def try_unmutated(mutations: list[Mutation]) -> bool:
    """Prints a row for each file of tests; returns whether all selections pass without a fault."""
    selections = collections.defaultdict(set)
    for mutation in mutations:
        selections[mutation.tests].add(f"({mutation.select})")
    passed = True
    for tests, own in selections.items():
        told, detail = outcome(tests, " or ".join(sorted(own)))
        passed = passed and told == "missed"
        print(f"{tests:<28}{'passed' if told == 'missed' else f'FAILED {detail}'}", flush=True)
    return passed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", type=int, nargs="+", help="numbers of the faults to try")
    parser.add_argument("--list", action="store_true", help="print the faults")
    parser.add_argument("--check", action="store_true", help="only look for texts and tests")
    parser.add_argument("--unmutated", action="store_true", help="run the tests without any fault")
    arguments = parser.parse_args()
    by_number = {one.number: one for one in MUTATIONS}
    mutations = [by_number[number] for number in arguments.only or by_number]
    if arguments.list:
        for one in mutations:
            print(f"{one.number:>4}  {one.file:<22}{one.kind:<16}{one.what}")
        return
    complaints = misplaced(mutations)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name).resolve()
        compiled = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / PACKAGE, folder / PACKAGE, ignore=compiled)
        (folder / "imported_copy.py").write_text(GUARD, encoding="utf-8")
        prepare_environment(folder)
        for library in LIBRARIES:
            importlib.import_module(library)
        if arguments.check:
            complaints += unselected(mutations)
        if complaints or arguments.check:
            print("\n".join(complaints) or f"{len(mutations)} faults: texts and tests are there")
            sys.exit(bool(complaints))
        if arguments.unmutated:
            sys.exit(not try_unmutated(mutations))
        caught = sum([try_mutation(folder, one) for one in mutations])
    print(f"{caught} of {len(mutations)} caught")
    sys.exit(caught < len(mutations))


if __name__ == "__main__":
    main()
