"""Map IoU and detection AP of a model, with sensors as they are or failing."""

from collections.abc import Iterable

import torch
from torch import nn

from altermoma_pl.metrics import BEVIoU, CentreDistanceAP
from examples.data.batch import Batch
from examples.models.cells import flat_index, to_cells
from examples.models.fusion import FusionModel, FusionOutput
from examples.models.views import VIEWS


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


def evaluate(model: FusionModel, batches: Iterable[Batch], view: str = "both") -> dict[str, float]:
    """Evaluate in eval mode and without gradients; the train flags are put back.

    Args:
        model: The model, which also decides the device.
        batches: Batches with ground truth.
        view: What the sensors see, one of `VIEWS`.

    Returns:
        `miou` and `ap`, both in [0, 1].

    Raises:
        ValueError: There is no such view.
    """
    if view not in VIEWS:
        raise ValueError(f"view must be one of {tuple(VIEWS)}, got {view!r}.")
    device = next(model.parameters()).device
    iou = BEVIoU(model.num_map_classes).to(device)
    ap = CentreDistanceAP(model.num_object_classes).to(device)
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                seen = VIEWS[view](to_device(batch, device))
                update_metrics(model, model(seen), seen, iou, ap)
    finally:
        restore_training(training)
    return {"miou": iou.compute().item(), "ap": ap.compute().item()}


def evaluate_views(
    model: FusionModel, batches: Iterable[Batch], views: Iterable[str] = tuple(VIEWS)
) -> dict[str, dict[str, float]]:
    """View -> what `evaluate` returns. The batches are read, and moved to the model's device, once.

    Args:
        model: The model, which also decides the device.
        batches: Batches with ground truth, large ones for speed; all of them stay on the device.
        views: Some of `VIEWS`.

    Raises:
        ValueError: There is no such view.
    """
    device = next(model.parameters()).device
    moved = [to_device(batch, device) for batch in batches]
    return {view: evaluate(model, moved, view) for view in views}


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device."""
    return Batch(*(tensor.to(device) for tensor in batch))


def restore_training(flags: dict[nn.Module, bool]) -> None:
    """Set the train flag of each module by itself: `train()` would overrule its children."""
    for module, flag in flags.items():
        module.training = flag
