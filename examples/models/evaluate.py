"""Map IoU and detection AP of a model, with a sensor dropped if so wished."""

from collections.abc import Iterable

import torch
from torch import nn

from altermoma_pl.metrics import BEVIoU, CentreDistanceAP
from examples.data.batch import Batch
from examples.models.cells import flat_index, to_cells
from examples.models.fusion import SENSORS, FusionModel, FusionOutput


def update_metrics(
    model: FusionModel, output: FusionOutput, batch: Batch, iou: BEVIoU, ap: CentreDistanceAP
) -> None:
    """Add a batch to both metrics; ground truth centred outside the grid does not count."""
    iou.update(output.map_logits.float().sigmoid(), batch.segmentation)
    found = model.detections(output)
    cells = to_cells(batch.boxes[:, :2], model.grid)
    _, inside = flat_index(cells, batch.box_frame, model.grid.shape)
    targets = (tensor[inside] for tensor in (batch.boxes, batch.box_class, batch.box_frame))
    ap.update(*found, *targets)


def drop_sensor(batch: Batch, sensor: str) -> Batch:
    """The batch as if a sensor had failed: a black image, or not a single point.

    Raises:
        ValueError: `sensor` is neither "camera" nor "lidar".
    """
    if sensor == "camera":
        return batch._replace(image=torch.zeros_like(batch.image))
    if sensor == "lidar":
        return batch._replace(points=batch.points[:0], point_frame=batch.point_frame[:0])
    raise ValueError(f"The sensor to drop must be one of {SENSORS} or None, got {sensor!r}.")


def evaluate(model: FusionModel, batches: Iterable[Batch], drop: str | None = None) -> dict[str, float]:
    """Evaluate in eval mode and without gradients; the train flags are put back.

    Args:
        model: The model, which also decides the device.
        batches: Batches with ground truth.
        drop: "camera", "lidar" or None.

    Returns:
        `miou` and `ap`, both in [0, 1].

    Raises:
        ValueError: `drop` is something else.
    """
    device = next(model.parameters()).device
    iou = BEVIoU(model.num_map_classes).to(device)
    ap = CentreDistanceAP(model.num_object_classes).to(device)
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                seen = batch if drop is None else drop_sensor(batch, drop)
                seen = Batch(*(tensor.to(device) for tensor in seen))
                update_metrics(model, model(seen), seen, iou, ap)
    finally:
        restore_training(training)
    return {"miou": iou.compute().item(), "ap": ap.compute().item()}


def restore_training(flags: dict[nn.Module, bool]) -> None:
    """Set the train flag of each module by itself: `train()` would overrule its children."""
    for module, flag in flags.items():
        module.training = flag
