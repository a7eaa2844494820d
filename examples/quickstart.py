"""Watch AlterMOMA prune a camera-LiDAR fusion model: synthetic data, a few minutes on two cores.

    python examples/quickstart.py

Makes driving scenes, pre-trains a camera and a LiDAR model, fuses them, prunes to 90 % over epochs of
fine-tuning inside `Trainer.fit`, and compares dense with pruned. It is `train.py` with the configuration
`configs/synthetic.yaml`; flags of `train.py` can be added, for example `--seed 1`.
"""

import logging
import sys
import time
import warnings
from pathlib import Path

from jsonargparse import auto_cli
from rich.console import Console
from train import run, table

CONFIG = Path(__file__).parent / "configs" / "synthetic.yaml"


def main() -> None:
    """Run the quickstart and print its table."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="lightning")  # of torch, by Lightning
    started = time.perf_counter()
    arguments = ["--config", str(CONFIG), "--progress_bar", str(sys.stdout.isatty()).lower(), *sys.argv[1:]]
    result = auto_cli(run, args=arguments, as_positional=False)
    console = Console()
    console.print(table(result))
    console.print(
        f"{time.perf_counter() - started:.0f} s. Figures: {result.output_dir / 'pruning'}. "
        f"What is pruned where: altermoma report {result.output_dir / 'pruned.ckpt'}",
        highlight=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
