"""Which parameter belongs to which modality, and which weights may be pruned."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import accumulate

from torch import nn
from torch.nn.parameter import UninitializedParameter

SHARED = "shared"
"""Name of the group of all parameters that belong to no modality: fusion and task heads."""


class Modalities(Mapping[str, tuple[str, ...]]):
    """Names the branches of a fusion model by patterns over module paths.

    A pattern is a glob, as `fnmatch` reads it: `*` stands for any characters, dots included. It takes
    the module or parameter that it names and everything below. A leading `!` takes away instead.
    The order of patterns does not matter.

    Example:
        >>> model = nn.ModuleDict({"camera": nn.Linear(2, 2), "lidar": nn.Linear(2, 2)})
        >>> model["head"] = nn.Linear(4, 1)
        >>> Modalities({"camera": ["camera"], "lidar": ["lidar"]}).resolve(model)["shared"]
        ('head.weight', 'head.bias')

    Args:
        patterns: Modality name -> one pattern or several, for at least two modalities.

    Raises:
        TypeError: If the patterns are not strings by name.
        ValueError: If there are fewer than two modalities, a name is empty or `"shared"`, or a
            modality has no pattern without `!`.
    """

    def __init__(self, patterns: Mapping[str, str | Sequence[str]]) -> None:
        if not isinstance(patterns, Mapping):
            raise TypeError(f"modalities must map names to patterns, got {patterns!r}")
        self._patterns: dict[str, tuple[str, ...]] = {}
        for name, value in patterns.items():
            if not isinstance(name, str) or not name or name == SHARED:
                raise ValueError(
                    f"modality name {name!r} is not allowed: give a non-empty name other than "
                    f"{SHARED!r}, which is what belongs to no modality"
                )
            if not isinstance(value, Sequence):
                raise TypeError(f"modality {name!r} needs one pattern or a list of them, got {value!r}")
            own = self._patterns[name] = (value,) if isinstance(value, str) else tuple(value)
            for pattern in own:
                if not isinstance(pattern, str) or not pattern.lstrip("!"):
                    raise TypeError(f"modality {name!r}: {pattern!r} is not a pattern over module paths")
            if all(pattern.startswith("!") for pattern in own):
                raise ValueError(f"modality {name!r} needs at least one pattern without '!', got {list(own)}")
        if len(self._patterns) < 2:
            raise ValueError(
                f"at least two modalities are needed to find what one makes redundant in another, "
                f"got {list(self._patterns)}"
            )

    def __getitem__(self, name: str) -> tuple[str, ...]:
        return self._patterns[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._patterns)

    def __len__(self) -> int:
        return len(self._patterns)

    def __repr__(self) -> str:
        return f"Modalities({self._patterns!r})"

    def resolve(self, model: nn.Module) -> dict[str, tuple[str, ...]]:
        """Assign every parameter of `model` to one modality or to `"shared"`.

        A parameter that several modules share is counted once, under the first of its names, and
        matched, or taken away, under each of them. Geometry constants (see `is_constant`) are left out.

        Returns:
            Group name -> parameter names in the model's order: the modalities as given, then
            `"shared"`. Every group but `"shared"` is non-empty.

        Raises:
            ValueError: If a pattern matches nothing, or a parameter belongs to two modalities, or a
                parameter is not initialised yet.
        """
        aliases = _parameter_aliases(model)
        for name, own in self._patterns.items():
            _check_matches(name, own, aliases, model)
        groups: dict[str, tuple[str, ...]] = dict.fromkeys((*self._patterns, SHARED), ())
        for parameter, names in aliases.items():
            owners = [m for m, own in self._patterns.items() if selects(own, *names)]
            if len(owners) > 1:
                raise ValueError(
                    f"parameter {parameter!r} belongs to {len(owners)} modalities, "
                    f"{' and '.join(map(repr, owners))}: exclude it from all but one, "
                    f"for example with the pattern '!{parameter}'"
                )
            groups[owners[0] if owners else SHARED] += (parameter,)
        for name in self._patterns:
            if not groups[name]:
                raise ValueError(
                    f"modality {name!r} has no parameter: its patterns {list(self._patterns[name])} "
                    f"exclude all that they match"
                )
        return groups


def prunable(model: nn.Module, patterns: Sequence[str] = ()) -> tuple[str, ...]:
    """Names of the weights that may be pruned, in the model's order.

    By default the weights of convolution, linear and attention projection layers; never biases,
    norm affine parameters and embeddings. Frozen parameters are not prunable.

    Args:
        model: The model.
        patterns: Globs over parameter names that add to the default; with a leading `!` they remove.

    Raises:
        ValueError: If a pattern matches nothing, or nothing is left.
    """
    aliases = _parameter_aliases(model)
    _check_matches("prunable", patterns, aliases, model)
    parameters = dict(model.named_parameters())
    default = set(_projection_weights(model))
    names = tuple(
        name
        for name, others in aliases.items()
        if selects(patterns, *others, default=name in default) and parameters[name].requires_grad
    )
    if not names:
        raise ValueError(
            "nothing is prunable: the model has no trainable weight of a convolution, linear or "
            "attention layer that the patterns leave; unfreeze it or add parameters by pattern"
        )
    return names


def check_prunable(groups: Mapping[str, Sequence[str]], names: Iterable[str]) -> None:
    """Raise a `ValueError` if a modality has no prunable weight, for example a frozen backbone."""
    names = set(names)
    for group, parameters in groups.items():
        if group != SHARED and not names.intersection(parameters):
            raise ValueError(
                f"modality {group!r} has nothing to prune: all of its {len(parameters)} parameters "
                f"are frozen or belong to no convolution, linear or attention layer; unfreeze the "
                f"branch, correct the pattern, or add its weights with the option `prunable`"
            )


def group_of(groups: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """Invert group -> parameter names into parameter name -> group."""
    return {name: group for group, names in groups.items() for name in names}


def selects(patterns: Sequence[str], *names: str, default: bool = False) -> bool:
    """Whether a pattern takes the parameter by one of its names, or the default, and no `!` takes it away."""
    paths = [path for name in names for path in _paths(name)]

    def found(globs: Iterable[str]) -> bool:
        return any(fnmatchcase(path, glob) for glob in globs for path in paths)

    taken = default or found(pattern for pattern in patterns if not pattern.startswith("!"))
    return taken and not found(pattern[1:] for pattern in patterns if pattern.startswith("!"))


def is_constant(leaf: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is geometry (a frustum, a grid, indices) rather than something learned.

    Such tensors are integers, or frozen and not a weight or bias: zeroing them gives divisions by
    zero, not an inactive branch. A frozen weight or bias is a frozen layer, not a constant.
    """
    if not (parameter.is_floating_point() or parameter.is_complex()):
        return True
    return not parameter.requires_grad and "weight" not in leaf and "bias" not in leaf


def _parameter_aliases(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """First name of each learned parameter -> all of its names."""
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if isinstance(parameter, UninitializedParameter):
            raise ValueError(
                f"parameter {name!r} has no shape yet: run one batch through the lazy layers first"
            )
        if not is_constant(name.rpartition(".")[2], parameter):
            aliases.setdefault(id(parameter), []).append(name)
    return {names[0]: tuple(names) for names in aliases.values()}


def _paths(name: str) -> list[str]:
    """The modules above a parameter, outermost first, and itself; without those of `torch.compile`."""
    return list(accumulate(name.replace("_orig_mod.", "").split("."), "{}.{}".format))


def _check_matches(
    owner: str, patterns: Iterable[str], aliases: Mapping[str, Iterable[str]], model: nn.Module
) -> None:
    learned = [_paths(name) for names in aliases.values() for name in names]
    # Only what would match is proposed: a module may hold nothing that is learned.
    proposals = list(dict.fromkeys(path for paths in learned for path in paths[:-1] or paths))
    for pattern in patterns:
        glob = pattern.removeprefix("!")
        if not any(fnmatchcase(path, glob) for paths in learned for path in paths):
            close = difflib.get_close_matches(glob, proposals, n=3, cutoff=0.4) or proposals[:3]
            raise ValueError(
                f"{owner}: pattern {pattern!r} matches no parameter of {type(model).__name__}; "
                f"did you mean {' or '.join(map(repr, close))}?"
            )


def _projection_weights(model: nn.Module) -> Iterator[str]:
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(path, recurse=False):
            leaf = name.rpartition(".")[2]
            # Convolutions by their name: the sparse ones of other packages have no common base class.
            convolution = "conv" in type(module).__name__.lower() and parameter.ndim >= 3
            if isinstance(module, nn.MultiheadAttention):
                projection = leaf.endswith("proj_weight")
            else:
                projection = leaf == "weight" and (
                    convolution or isinstance(module, (nn.Linear, nn.Bilinear))
                )
            if projection:
                yield name
