"""Small two-tower nets whose channels can be removed, alone and in Lightning."""

import torch
from torch import nn

from altermoma_pl import AlterEva, AlterMOMACallback, Channel, OneShot
from tests.helpers.lightning_models import MODALITIES, Fusion, short

WIDTHS = {"camera.0": 8, "camera.3": 4, "lidar.0": 8, "lidar.2": 4}  # of `Towers`


class Towers(Fusion):
    """A camera tower of convolutions with a norm, a LiDAR tower of linear layers, and a head of one output.

    FLOPs, halved, of a sample: camera 9 * (27 * 2 * 8 + 8 * 4), lidar 3 * 8 + 8 * 4, head 8.
    """

    def __init__(self, optimizer="adamw", lr=0.02):
        super().__init__(optimizer, lr)
        torch.manual_seed(7)
        self.camera = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.ReLU()
        )
        self.lidar = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU())
        self.head = nn.Linear(8, 1)

    def forward(self, x):
        image = x[:, :3, None] * x[:, None, :3]
        seen = self.camera(image[:, None]).mean((2, 3))
        return self.head(torch.cat([seen, self.lidar(x[:, 3:])], dim=1))


class ManualTowers(Towers):
    """Manual optimization with an optimizer for each branch; the head goes with the camera."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    def pruning_loss(self, batch, batch_idx):
        return self.loss(batch)

    def configure_optimizers(self):
        first = [*self.camera.parameters(), *self.head.parameters()]
        return [
            torch.optim.SGD(first, 0.02, momentum=0.9, weight_decay=0.01),
            torch.optim.AdamW(self.lidar.parameters(), 0.02),
        ]


def channel_pruner(**options):
    """One event at epoch 1 that removes at least half of the 24 channels, unless said otherwise."""
    defaults = {
        "modalities": MODALITIES,
        "sparsity": 0.5,
        "schedule": OneShot(1),
        "criterion": short(),
        "granularity": Channel(round_to=2),
        "figures": False,
    }
    return AlterMOMACallback(**{**defaults, **options})


def paper(**options):
    """The published algorithm with few steps of plain SGD."""
    defaults = {"num_reactivation_steps": 2, "optimizer": "sgd", "learning_rate": 0.05, "noise": "suppressed"}
    fields = {name: getattr(AlterEva.paper(), name) for name in AlterEva.__dataclass_fields__}
    return AlterEva(**{**fields, **defaults, **options})
