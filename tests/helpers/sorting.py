"""What `top_k` keeps, found by sorting lists."""

import math


def reference(scores, sparsity, scope, within, min_density, groups, ties):
    """The same by sorting lists: what is protected first, then the best of the rest."""
    if scope == "row":
        return reference_by_rows(scores, sparsity, within, min_density, ties)
    flat = {}
    for order, (name, score) in enumerate(scores.items()):
        tie = ties[name].flatten().tolist() if ties else [0.0] * score.numel()
        flat[name] = [
            ((-value, -tie[i], order, i), (name, i))
            for i, value in enumerate(score.flatten().tolist())
            if within[name].flatten()[i]
        ]
    label = {"global": lambda n: "all", "layer": lambda n: n, "modality": lambda n: groups[n]}[scope]
    chosen = set()
    for group in {label(name) for name in scores}:
        names = [name for name in scores if label(name) == group]
        total = sum(scores[name].numel() for name in names)
        count = total - round(sparsity * total)
        protected = []
        for name in names:
            if min_density:
                floor = max(1, math.ceil(round(min_density * scores[name].numel(), 9)))
                protected += sorted(flat[name])[:floor]
        if count > sum(len(flat[name]) for name in names) or len(protected) > count:
            return None
        rest = sorted(entry for name in names for entry in flat[name] if entry not in protected)
        chosen |= {key for _, key in protected + rest[: count - len(protected)]}
    return {name: [(name, i) in chosen for i in range(score.numel())] for name, score in scores.items()}


def reference_by_rows(scores, sparsity, within, min_density, ties):
    """Each row as a tensor of its own; the floor is that of the whole tensor."""
    kept = {}
    for name, score in scores.items():
        chosen = []
        for i, row in enumerate(score if score.ndim > 1 else [score]):
            part = {
                key: {name: values[name][i] if score.ndim > 1 else values[name]}
                for key, values in (("within", within), ("ties", ties))
                if values
            }
            found = reference(
                {name: row}, sparsity, "layer", groups={}, min_density=0, **{"ties": None} | part
            )
            if found is None:
                return None
            chosen += found[name]
        live = int(within[name].sum())
        floor = min(live, max(1, math.ceil(round(min_density * score.numel(), 9)))) if min_density else 0
        if floor > sum(chosen):
            return None
        kept[name] = chosen
    return kept
