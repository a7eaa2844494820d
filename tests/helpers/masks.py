"""What masks are checked for."""


def follows(masks, n, m, dims=None):
    """Whether exactly `n` weights stay in each block of `m` along the input dimension, 1 if not given."""
    return all(
        bool((mask.movedim((dims or {}).get(name, 1), -1).reshape(-1, m).sum(1) == n).all())
        for name, mask in masks.items()
    )


def shrank(masks, earlier):
    """Whether everything kept is also kept in earlier masks, of the same parameters."""
    return masks.keys() == earlier.keys() and all(
        bool((earlier[name] | ~mask).all()) for name, mask in masks.items()
    )
