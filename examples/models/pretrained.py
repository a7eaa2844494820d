"""Encoders from the checkpoints of single-sensor training runs."""

from pathlib import Path

import torch

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
        raise ValueError(
            f"backbones names the sensor {sensor!r}, but the model has {model.sensors}."
        )
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    prefix = f"model.encoders.{sensor}."
    found = {
        name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)
    }
    encoder = model.encoders[sensor]
    wanted = encoder.state_dict()
    missing = sorted(wanted.keys() - found.keys())
    unexpected = sorted(found.keys() - wanted.keys())
    reshaped = sorted(
        name for name in wanted.keys() & found.keys() if wanted[name].shape != found[name].shape
    )
    if missing or unexpected or reshaped:
        raise ValueError(
            f"{path} does not fit encoders.{sensor}: missing {missing}, unexpected {unexpected}, "
            f"of another shape {reshaped}. It must come from a run that has the sensor "
            f"{sensor!r} and the same `size` and `grid`."
        )
    encoder.load_state_dict(found)
