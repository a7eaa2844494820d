"""2:4 masks that save time: linear layers whose weights NVIDIA GPUs hold and multiply without the zeros."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.sparse import to_sparse_semi_structured

from altermoma_pl.mask.masks import Masks
from altermoma_pl.mask.n_of_m import at_most

_AMPERE = (8, 0)  # compute capability from which there are sparse tensor cores
_MULTIPLE = 16  # of both dimensions, as cuSPARSELt needs them in float16 and bfloat16


class SemiStructured(NamedTuple):
    """What `to_semi_structured` made of a model.

    Args:
        model: A copy, with compressed weights.
        converted: Names of the weights that are compressed.
        dense: Name of each other masked parameter -> why it stays as it was, with its zeros.
    """

    model: nn.Module
    converted: tuple[str, ...]
    dense: dict[str, str]


def device_obstacle(device: torch.device) -> str | None:
    """Why 2:4 weights would save nothing on this device, or None if they would."""
    if device.type != "cuda":
        name = "a CPU" if device.type == "cpu" else f"the device {device.type!r}"
        return (
            f"2:4 has no gain on {name}: the zeros are multiplied like other numbers, for PyTorch has "
            "kernels that pass over them on NVIDIA GPUs only, from Ampere on"
        )
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device here"
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is not None or capability < _AMPERE:
        return (
            "2:4 needs the sparse tensor cores of an NVIDIA GPU from Ampere on (8.0), this is "
            f"{torch.cuda.get_device_name(device)} with compute capability {capability[0]}.{capability[1]}"
        )
    if not torch.backends.cusparselt.is_available():
        return "2:4 needs cuSPARSELt, without which this PyTorch was built: install an official CUDA build"
    return None


def to_semi_structured(model: nn.Module, masks: Masks) -> SemiStructured:
    """A copy of a model, for inference, whose linear layers hold their 2:4 weights without the zeros.

    Weights are compressed by `torch.sparse.to_sparse_semi_structured` if the layer is an `nn.Linear` on a
    device that gains by it, in float16 or bfloat16, with both dimensions multiples of 16, and if at most 2
    of each 4 consecutive inputs stay. All other masked parameters are zero where pruned. The model that is
    given stays as it is.

    Run the copy under `torch.inference_mode()`: there are no gradients. Inputs of compressed layers must
    have the type of the weights, as autocast does not reach them, and be contiguous.

    Args:
        model: Already on the device and in the type that it will run in.
        masks: Of its parameters, whole; need not be applied yet.

    Raises:
        ValueError: If masks are sharded or not of this model, or no masked parameter is on a device that
            gains; it says why.
    """
    if masks.sharded:
        raise ValueError(
            "sharded weights cannot be compressed: load the checkpoint into a model on one device first"
        )
    masks.check_fits(model)
    parameters = dict(model.named_parameters())
    obstacles = {device: device_obstacle(device) for device in {parameters[name].device for name in masks}}
    if all(obstacles.values()):
        raise ValueError(next(filter(None, obstacles.values())))
    compressed = copy.deepcopy(model)
    masks.to(compressed).apply_(compressed)
    converted, dense = [], {}
    for name, mask in masks.items():
        reason = _obstacle(compressed, name, obstacles[parameters[name].device], mask)
        if reason:
            dense[name] = reason
        else:
            layer = compressed.get_submodule(name.rpartition(".")[0])
            weight = layer.get_parameter("weight").detach().contiguous()
            layer.weight = nn.Parameter(to_sparse_semi_structured(weight), requires_grad=False)
            converted.append(name)
    return SemiStructured(compressed, tuple(converted), dense)


def _obstacle(model: nn.Module, name: str, of_device: str | None, mask: Tensor) -> str | None:
    """Why this parameter cannot be compressed: its layer, the device, or what it holds."""
    path, _, attribute = name.rpartition(".")
    layer, weight = model.get_submodule(path), model.get_parameter(name)
    if type(layer) is not nn.Linear or attribute != "weight":
        return f"{attribute!r} of {type(layer).__name__}: only the weight of an nn.Linear can be compressed"
    parent = model.get_submodule(path.rpartition(".")[0])
    if isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
        return (
            "nn.TransformerEncoderLayer reads its weights without calling the layer: call "
            "torch.backends.mha.set_fastpath_enabled(False) first"
        )
    if of_device:
        return of_device
    if weight.dtype not in (torch.float16, torch.bfloat16):
        return f"{weight.dtype}: turn the model into float16 or bfloat16 first, by .half() or .bfloat16()"
    if not weight.numel() or any(length % _MULTIPLE for length in weight.shape):
        return f"shape {tuple(weight.shape)}: both dimensions must be multiples of {_MULTIPLE}"
    if not at_most(mask, 2, 4):
        return "more than 2 weights of some 4 consecutive inputs stay"
    return None
