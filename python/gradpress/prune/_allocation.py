"""How sparse each layer becomes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gradpress.engine import Layer, matches

#: Halvings of the interval in which a factor is searched for.
_HALVINGS = 100


def given_sparsities(
    op: str, layers: Sequence[Layer], sparsity: float | Mapping[str, float]
) -> dict[str, float]:
    """The share that goes of each layer: one for all, or those of a mapping.

    A key is a layer's name, a part of it, or a regular expression for all of it. A name's own key
    comes first, then the first that matches; a layer without any stays as it is.

    Raises:
        ValueError: a share is not from 0 to 1, or a key matches no layer.
    """
    if not isinstance(sparsity, Mapping):
        return dict.fromkeys((layer.name for layer in layers), _checked(op, "sparsity", sparsity))
    shares = {key: _checked(op, f"sparsity[{key!r}]", value) for key, value in sparsity.items()}
    for key in shares:
        if not any(matches(layer.name, key) for layer in layers):
            raise ValueError(
                f"{op}: sparsity must name layers that are pruned, got {key!r}, which matches none"
                f" of {[layer.name for layer in layers]}"
            )
    found = {}
    for layer in layers:
        others = (share for key, share in shares.items() if matches(layer.name, key))
        found[layer.name] = shares.get(layer.name, next(others, 0.0))
    return found


def _checked(op: str, name: str, share: float) -> float:
    if not 0 <= share <= 1:
        raise ValueError(f"{op}: {name} must be from 0 to 1, got {share}")
    return float(share)


def sparsities_by_sensitivity(
    layers: Sequence[Layer], sensitivity: Mapping[str, float], sparsity: float, spread: float
) -> dict[str, float]:
    r"""More where the loss depends less on a layer, at the same share of all weights.

    To first order, pruning the share p of a layer's n weights with the least ``|w g|`` adds about
    ``n q p^2`` to the loss, where q is the mean of ``|w g|``: the least of these products lie near
    zero with some constant density. For a given sum of n p the least total is found where p is
    proportional to 1 / q; shares are held within `spread` of the mean and within 0 and 1.

    Args:
        layers: All of them.
        sensitivity: q of each.
        sparsity: The share of all weights together.
        spread: How far a layer's share may be from it.
    """
    if not any(q > 0 for q in sensitivity.values()):
        return dict.fromkeys(sensitivity, sparsity)
    lowest, highest = max(0.0, sparsity - spread), min(1.0, sparsity + spread)
    sizes = {layer.name: layer.weight.numel() for layer in layers}
    wanted = sparsity * sum(sizes.values())

    def shares(factor: float) -> dict[str, float]:
        return {
            name: highest if q <= 0 else min(max(factor / q, lowest), highest)
            for name, q in sensitivity.items()
        }

    low, high = 0.0, max(sensitivity.values()) * highest
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        total = sum(share * sizes[name] for name, share in shares(middle).items())
        low, high = (middle, high) if total < wanted else (low, middle)
    return shares(high)


def in_whole_columns(
    layers: Sequence[Layer], shares: Mapping[str, float], sparsity: float
) -> dict[str, float]:
    """Shares of which every row loses a whole number of weights, at the same total.

    Rounded down first; then one column more goes from layers of which most of one was cut off, as
    far as that takes no more weights than are wanted. What is missing in the end is less than a
    column of the layer with most rows.

    Args:
        layers: All of them.
        shares: Of each.
        sparsity: The share of all weights together.
    """
    counts = {layer.name: int(shares[layer.name] * layer.columns) for layer in layers}
    missing = int(sparsity * sum(layer.weight.numel() for layer in layers))
    missing -= sum(counts[layer.name] * layer.rows for layer in layers)

    def cut_off(layer: Layer) -> float:
        return counts[layer.name] - shares[layer.name] * layer.columns

    for layer in sorted(layers, key=cut_off):
        if layer.rows <= missing and counts[layer.name] < layer.columns:
            counts[layer.name] += 1
            missing -= layer.rows
    # In the middle of two counts, since a product with the columns is rounded down.
    return {
        layer.name: min((counts[layer.name] + 0.5) / max(layer.columns, 1), 1.0) for layer in layers
    }
