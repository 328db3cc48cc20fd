"""How the training loss really moves along the pruning path, beside what the prediction assumes: no gradient.

    python experiments/geometric_limit/path.py runs/fc5 --data_dir DIR --ratios 0.97 0.98 0.99

For each pruning ratio: the distance R, the change of the mean loss over the train set, and its first- and second-order
terms, g.d and d.Hd / 2, for the step d that magnitude pruning makes. One gradient, and one product per ratio. The
loss is the cross-entropy, without penalties.
"""

import argparse

import jax
import jax.numpy as jnp

from sparsity_jax import allocate, evaluate, geometry, masks, spectrum


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", help="a finished run of one network")
    parser.add_argument("--data_dir", default="")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.96, 0.97, 0.98, 0.985, 0.99])
    parser.add_argument("--batch_size", type=int, default=1000)
    arguments = parser.parse_args()

    saved = evaluate.open_run(arguments.workdir, data_dir=arguments.data_dir)
    problem, state = saved.problem, saved.networks[0].state
    network = geometry.network_of(problem, ("cross_entropy", ()))

    def loss(params, batch):
        return network.loss(network.outputs((params, state.batch_stats), batch), batch)

    data = geometry.examples(problem, 0)
    over_all = lambda product: spectrum.over_batches(product, data, arguments.batch_size)
    total = over_all(lambda params, _, batch: loss(params, batch))
    mean_loss = lambda params: float(total(params, jnp.zeros(())))
    gradient = over_all(lambda params, _, batch: jax.grad(loss)(params, batch))(state.params, state.params)
    curved = over_all(spectrum.hessian_product(loss))
    dot = lambda first, second: float(sum(jnp.vdot(x, y) for x, y in zip(*map(jax.tree.leaves, (first, second)))))

    dense = mean_loss(state.params)
    print(f"dense: loss {dense:.4f}\n")
    print("| ratio | R | change of the loss | first order | second order |\n|---|---|---|---|---|")
    for ratio in arguments.ratios:
        keep = allocate.keep_masks(state.params, allocate.keep_counts(state.params, ratio))
        pruned = masks.apply(state.params, keep)
        step = jax.tree.map(jnp.subtract, pruned, state.params)
        change = mean_loss(pruned) - dense
        first, second = dot(gradient, step), dot(step, curved(state.params, step)) / 2
        print(f"| {ratio} | {dot(step, step) ** 0.5:.3f} | {change:+.4f} | {first:+.4f} | {second:+.4f} |", flush=True)


if __name__ == "__main__":
    main()
