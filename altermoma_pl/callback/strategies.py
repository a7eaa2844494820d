"""Which ways of running on several devices work."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer

from altermoma_pl.criteria import Criterion
from altermoma_pl.distributed import is_sharded
from altermoma_pl.granularity import Granularity
from altermoma_pl.schedules import Schedule

_SUPPORTED = ("SingleDeviceStrategy", "SingleDeviceXLAStrategy", "DDPStrategy", "ModelParallelStrategy")
_INSTEAD = {
    "FSDPStrategy": "its parameters are flattened, so that no weight has a place of its own",
    "DeepSpeedStrategy": "it keeps optimizer and parameters to itself",
}


def check_strategy(trainer: Trainer) -> None:
    """Raise a `ValueError` before anything is set up if masks could not be held under the strategy."""
    # By name: the classes of `lightning` and `pytorch_lightning` are distinct.
    names = [cls.__name__ for cls in type(trainer.strategy).__mro__]
    if any(name in _SUPPORTED for name in names):
        return
    why = next((f", because {why}" for name, why in _INSTEAD.items() if name in names), "")
    raise ValueError(
        f"AlterMOMACallback does not work with {names[0]}{why}: use strategy='ddp', or to shard parameters "
        f"ModelParallelStrategy(data_parallel_size=..., tensor_parallel_size=1) with a `configure_model` "
        f"that applies torch.distributed.fsdp.fully_shard"
    )


def check_sharding(
    module: LightningModule,
    criterion: Criterion,
    schedule: Schedule,
    granularity: Granularity,
    store_components: bool,
) -> None:
    """Raise a `ValueError` if parameters are sharded and something cannot work with that."""
    if not is_sharded(module.parameters()):
        return
    if not criterion.shardable:
        raise ValueError(
            f"{type(criterion).__name__} needs whole parameters, and those of this model are sharded over "
            f"processes: use AlterEva, SNIP, Taylor or Magnitude, or strategy='ddp'"
        )
    if not granularity.shardable:
        raise ValueError(
            f"{granularity} needs whole parameters, and those of this model are sharded over processes: "
            f"use the granularity 'weight', or strategy='ddp'"
        )
    if schedule.rewinds_to is not None:
        raise ValueError(
            f"{type(schedule).__name__} keeps a copy of whole parameters, and those of this model are "
            f"sharded over processes: use another schedule, or strategy='ddp'"
        )
    if store_components:
        raise ValueError(
            "store_components=True would save one process's rows of DeCI and ReRI only, since the parameters "
            "of this model are sharded over processes: leave it out, or use strategy='ddp'"
        )
