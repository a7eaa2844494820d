"""Making tensors smaller, of a model and of an optimizer's state; and a dense model like a slim one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from altermoma_pl.granularity.channels.groups import Channels

Attributes = dict[str, dict[str, Any]]
"""Module path -> attribute -> value."""

SLIM_FORMAT = 1
KEY = "slim"
"""The entry of a checkpoint that says how its model differs from the dense one."""


@dataclass(frozen=True, eq=False)
class Resizing:
    """What is left of each tensor of a model when some of its channels are gone.

    Args:
        positions: Tensor name -> dimension -> positions that stay, ascending. Of what has several names, as
            tied parameters have, each.
        counts: (module path, attribute) -> (channels that stay, of how many).
    """

    positions: Mapping[str, Mapping[int, Tensor]]
    counts: Mapping[tuple[str, str], tuple[int, int]]

    @classmethod
    def of(cls, channels: Channels, kept: Mapping[str, Tensor], model: nn.Module) -> Resizing:
        """What stays of the tensors of a model, of the dense shapes, if these channels do."""
        tensors = dict(_named_tensors(model))
        # By identity: of a tied tensor the groups know one name only, and it shrinks under all of them.
        stay: dict[int, dict[int, Tensor]] = {}
        counts: dict[tuple[str, str], tuple[int, int]] = {}
        for group in channels.groups:
            flags = kept[group.name].cpu()
            if bool(flags.all()):
                continue
            for each in group.slices:
                tensor = tensors[each.name]
                whole = torch.ones(tensor.shape[each.dim], dtype=torch.bool)
                # Several groups may lie along one dimension, where their channels are concatenated.
                along = stay.setdefault(id(tensor), {}).setdefault(each.dim, whole)
                along[each.index[~flags].flatten()] = False
            counts |= dict.fromkeys(group.attributes, (int(flags.sum()), group.num_channels))
        positions = {
            name: {dim: flags.nonzero().flatten() for dim, flags in stay[id(tensor)].items()}
            for name, tensor in tensors.items()
            if id(tensor) in stay
        }
        return cls(positions, counts)

    def resized(self, name: str, tensor: Tensor) -> Tensor:
        """The part of a tensor of this name that stays, in the same memory format; itself if all does."""
        if name not in self.positions:
            return tensor
        memory_format = _memory_format_of(tensor)
        for dim, positions in self.positions[name].items():
            tensor = tensor.index_select(dim, positions.to(tensor.device))
        return tensor.contiguous(memory_format=memory_format)  # index_select forgets channels last

    @torch.no_grad()
    def apply_(self, model: nn.Module) -> Attributes:
        """Make the parameters and buffers of a model smaller, in place, as new objects.

        Tensors that are shared stay so. Whoever holds the old ones, such as an optimizer, is made anew.

        Returns:
            The attributes of its modules that are others now.
        """
        tensors = dict(_named_tensors(model))
        _replace_(model, {name: self.resized(name, tensors[name].detach()) for name in self.positions})
        changed: Attributes = {}

        def set_(path: str, attribute: str, value: Any) -> None:
            module = model.get_submodule(path)
            if getattr(module, attribute, None) != value:
                setattr(module, attribute, value)
                changed.setdefault(path, {})[attribute] = value

        for (path, attribute), (kept, total) in self.counts.items():
            # A share, not the number itself: `groups` of a depthwise convolution may be a multiple of it.
            set_(path, attribute, getattr(model.get_submodule(path), attribute) * kept // total)
        for path in dict.fromkeys(name.rpartition(".")[0] for name in self.positions):
            for attribute, value in widths_of(model.get_submodule(path)).items():  # which depend on `groups`
                set_(path, attribute, value)
        return changed


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, under each of their names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _replace_(model: nn.Module, new: Mapping[str, Tensor]) -> None:
    """Put tensors in the place of those of these names, in place; what is shared stays so.

    New objects, since a parameter whose `data` changes its shape breaks whoever holds it.
    """
    placed: dict[int, Tensor] = {}
    for name, old in list(_named_tensors(model)):  # a list: the old ones live on, so that no id comes again
        if name in new:
            trained = isinstance(old, nn.Parameter)
            value = nn.Parameter(new[name], old.requires_grad) if trained else new[name]
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, placed.setdefault(id(old), value))


def _memory_format_of(tensor: Tensor) -> torch.memory_format:
    """Channels last where the tensor is."""
    if tensor.ndim not in (4, 5) or tensor.is_contiguous():
        return torch.contiguous_format
    last = torch.channels_last if tensor.ndim == 4 else torch.channels_last_3d
    return last if tensor.is_contiguous(memory_format=last) else torch.contiguous_format


_SIZES: dict[type[nn.Module], tuple[str, ...]] = {
    nn.modules.conv._ConvTransposeNd: ("in_channels", "out_channels"),  # before what it is a kind of
    nn.modules.conv._ConvNd: ("out_channels", "in_channels"),
    nn.Linear: ("out_features", "in_features"),
    nn.Embedding: ("num_embeddings", "embedding_dim"),
    nn.modules.batchnorm._NormBase: ("num_features",),
    nn.GroupNorm: ("num_channels",),
    nn.PReLU: ("num_parameters",),
}
"""Layer -> attributes that are the first sizes of its weight."""


def widths_of(module: nn.Module) -> dict[str, Any]:
    """Attributes of a layer of torch that its weights determine, as they should be."""
    weight = getattr(module, "weight", None)
    if weight is None:  # a norm without affine
        weight = getattr(module, "running_mean", None)
    if not isinstance(weight, Tensor):
        return {}
    if isinstance(module, nn.LayerNorm):
        return {"normalized_shape": tuple(weight.shape)}
    # The second size of a convolution's weight is that of one of its groups.
    sizes = [size * (getattr(module, "groups", 1) if dim else 1) for dim, size in enumerate(weight.shape)]
    attributes = next((names for kind, names in _SIZES.items() if isinstance(module, kind)), ())
    return dict(zip(attributes, sizes, strict=False))


def slim_entry(
    attributes: Attributes, widths: Mapping[str, tuple[int, int]], modalities: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """What a checkpoint of a slim model holds beside its weights, of builtins only: see `Slim`.

    The modality of each group, or "shared", is told as far as it is known.
    """
    return {
        "format": SLIM_FORMAT,
        "attributes": {path: dict(values) for path, values in attributes.items()},
        "widths": {name: list(width) for name, width in widths.items()},
        "modalities": dict(modalities or {}),
    }


@torch.no_grad()
def reshape_like_(model: nn.Module, state: Mapping[str, Tensor], entry: Mapping[str, Any]) -> None:
    """Give a dense model the shapes and attributes of a slim one, in place; its weights are not set.

    Args:
        model: Built as the dense model was.
        state: The slim model's state_dict.
        entry: Of `slim_entry`.

    Raises:
        ValueError: If the entry is none, or the model is another one.
    """
    known = isinstance(entry, Mapping) and entry.get("format") == SLIM_FORMAT and "attributes" in entry
    if not known:
        raise ValueError(
            f"the checkpoint is not that of a slim model: it needs an entry {KEY!r} of format {SLIM_FORMAT}, "
            f"as `altermoma export` writes it, got {entry!r:.80}"
        )
    modules, tensors = dict(model.named_modules()), dict(_named_tensors(model))
    pairs = {name: (like, tensors[name]) for name, like in state.items() if name in tensors}  # no extra state
    strange = sorted(state.keys() ^ model.state_dict().keys())
    strange += [path for path in entry["attributes"] if path not in modules]
    strange += [
        name
        for name, (like, old) in pairs.items()
        if like.ndim != old.ndim or any(a > b for a, b in zip(like.shape, old.shape, strict=True))
    ]
    if strange:
        raise ValueError(
            f"the slim checkpoint is of another model than {type(model).__name__}: they differ in "
            f"{strange[:5]}; build the model as it was before it was slimmed"
        )
    smaller = {
        name: torch.empty_like(like, dtype=old.dtype, device=old.device, memory_format=_memory_format_of(old))
        for name, (like, old) in pairs.items()
        if like.shape != old.shape
    }
    _replace_(model, smaller)
    for path, values in entry["attributes"].items():
        for attribute, value in values.items():
            setattr(modules[path], attribute, value)


def slim_optimizer_states(
    states: list[dict[str, Any]], parameters: Mapping[str, nn.Parameter], resizing: Resizing
) -> list[dict[str, Any]]:
    """States of optimizers without what belongs to removed channels.

    Args:
        states: As optimizers save them, of the dense shapes.
        parameters: Name -> trainable parameter of the dense model, in its order.
        resizing: What stayed.

    Raises:
        ValueError: If it cannot be told whose a state is: parameters must have been given to the
            optimizers in the model's order, each to one.
    """
    count = sum(len(group["params"]) for each in states for group in each["param_groups"])
    if count != len(parameters):
        raise ValueError(
            f"the optimizers hold {count} parameters and the model {len(parameters)} that are trained"
        )

    def resized(key: str, value: Any, name: str) -> Any:
        if not isinstance(value, Tensor) or not value.ndim:  # as the count of steps
            return value
        if value.shape != parameters[name].shape:
            raise ValueError(f"the state {key!r} of {name!r} has another shape than the parameter")
        return resizing.resized(name, value)

    names, slimmed = iter(parameters), []
    for each in states:
        # Optimizers save numbers, not names; in the order of their groups these count the parameters.
        owner = {number: next(names) for group in each["param_groups"] for number in group["params"]}
        state = {
            number: {key: resized(key, value, owner[number]) for key, value in values.items()}
            for number, values in each["state"].items()
        }
        slimmed.append(each | {"state": state})
    return slimmed
