"""How much a little training with a modality deactivated lowers the loss, by optimizer and learning rate.

python examples/benchmarks/reactivation.py runs/quickstart/dense.ckpt
"""

import logging
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, so that `examples` is found

from altermoma_pl import AlterEva, Calibration
from examples.data.datamodule import DrivingData
from examples.models.module import FusionModule
from examples.train import MODALITIES

SETTINGS = (("sgd", 1e-3), ("sgd", 1e-2), ("sgd", 3e-2), ("adam", 1e-4), ("adam", 1e-3))
NUM_PROBES, NUM_STEPS, CLIP = 8, 32, 10.0


def main(checkpoint: str) -> None:
    """Print the table for a dense model on the quickstart's data."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    data = DrivingData(num_train=480, num_val=96, num_calibration=64)
    data.prepare_data()
    data.setup()
    module = FusionModule(num_map_classes=len(data.map_classes), weights=checkpoint)
    calibration = Calibration(
        module,
        lambda model, batch: model.loss(batch)["loss"],
        data.calibration_dataloader(),
        data.train_dataloader(),
        MODALITIES,
    )
    table = Table("optimizer", "learning rate", *(f"without {name}" for name in MODALITIES))
    for optimizer, rate in SETTINGS:
        criterion = AlterEva(
            num_probe_batches=NUM_PROBES,
            num_reactivation_steps=NUM_STEPS,
            optimizer=optimizer,
            learning_rate=rate,
            gradient_clip=CLIP,
        )
        losses = criterion.components(calibration).losses
        changes = (
            f"{losses[k]:.3f} -> {losses[k + '_reactivated']:.3f}"
            for k in map("without_{}".format, MODALITIES)
        )
        table.add_row(optimizer, f"{rate:g}", *changes)
    Console().print(table)


if __name__ == "__main__":
    main(*sys.argv[1:])
