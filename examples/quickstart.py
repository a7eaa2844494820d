"""Watch AlterMOMA prune a camera-LiDAR fusion model: synthetic data, a few minutes on two cores.

    python examples/quickstart.py

Makes driving scenes, pre-trains a camera and a LiDAR model, fuses them, prunes to 90 % over epochs of
fine-tuning inside `Trainer.fit`, and compares dense with pruned. Checkpoints and figures: `runs/quickstart`.
"""

import argparse
import logging
import sys
import time
import warnings

from rich.console import Console
from train import MODALITIES, DrivingData, Epochs, run, table

from altermoma_pl import AlterEva, AlterMOMACallback, Cubic


def main() -> None:
    """Run the quickstart and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--output-dir", default="runs/quickstart")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="lightning")  # of torch, by Lightning
    started = time.perf_counter()
    pruning = AlterMOMACallback(
        MODALITIES,
        sparsity=options.sparsity,
        criterion=AlterEva(num_probe_batches=16, num_reactivation_steps=32),
        schedule=Cubic(end=3),
    )
    result = run(
        DrivingData(num_train=512, num_val=96, num_calibration=64),
        pruning,
        epochs=Epochs(camera=10, lidar=8, fusion=5, pruning=8),
        output_dir=options.output_dir,
        seed=options.seed,
        progress_bar=sys.stdout.isatty(),
    )
    console = Console()
    console.print(table(result))
    console.print(
        f"{time.perf_counter() - started:.0f} s. Checkpoint: {result.output_dir / 'pruned.ckpt'}, "
        f"figures: {pruning.output_dir}. What is pruned where: "
        f"altermoma report {result.output_dir / 'pruned.ckpt'}",
        highlight=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
