"""Weights from the checkpoints of earlier training runs."""

from pathlib import Path

import torch
from torch import nn

from examples.models.fusion import FusionModel


def load_encoder(model: FusionModel, sensor: str, path: str | Path) -> None:
    """Load `encoders.<sensor>` from a checkpoint of `FusionModule`; the rest stays as it is.

    Args:
        model: The model to load into.
        sensor: "camera" or "lidar".
        path: A Lightning checkpoint.

    Raises:
        ValueError: The model lacks the sensor, or the checkpoint's encoder does not fit.
    """
    if sensor not in model.sensors:
        raise ValueError(f"backbones names the sensor {sensor!r}, but the model has {model.sensors}.")
    advice = f"It must come from a run that has the sensor {sensor!r} and the same `size` and `grid`."
    _load(model.encoders[sensor], f"encoders.{sensor}", path, advice)


def load_heads(model: FusionModel, path: str | Path) -> None:
    """Load `decoder` and `heads` from a checkpoint of `FusionModule`; the rest stays as it is.

    Args:
        model: The model to load into.
        path: A Lightning checkpoint, of a run with any sensors.

    Raises:
        ValueError: The checkpoint's decoder or heads do not fit.
    """
    advice = "It must come from a run with the same `size`, `grid` and map classes."
    _load(model.decoder, "decoder", path, advice)
    _load(model.heads, "heads", path, advice)


def load_model(model: FusionModel, path: str | Path) -> None:
    """Load all weights from a checkpoint of `FusionModule`.

    Args:
        model: The model to load into.
        path: A Lightning checkpoint.

    Raises:
        ValueError: The checkpoint's model does not fit.
    """
    advice = "It must come from a run with the same `sensors`, `size`, `grid` and map classes."
    _load(model, "", path, advice)


def _load(module: nn.Module, part: str, path: str | Path, advice: str) -> None:
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    prefix = f"model.{part}." if part else "model."
    found = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    wanted = module.state_dict()
    missing = sorted(wanted.keys() - found.keys())
    unexpected = sorted(found.keys() - wanted.keys())
    reshaped = sorted(n for n in wanted.keys() & found.keys() if wanted[n].shape != found[n].shape)
    if missing or unexpected or reshaped:
        raise ValueError(
            f"{path} does not fit {part or 'the model'}: missing {missing}, unexpected {unexpected}, "
            f"of another shape {reshaped}. {advice}"
        )
    module.load_state_dict(found)
