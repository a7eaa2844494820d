"""The callback named by `_target_` in a Hydra configuration, whose lists and dictionaries are OmegaConf's."""

from hydra.utils import instantiate
from omegaconf import OmegaConf

from altermoma_pl import AlterMOMACallback, Channel
from tests.helpers.lightning_models import Fusion, fit, num_zeros

CONFIG = """
pruning:
  _target_: altermoma_pl.AlterMOMACallback
  modalities: {camera: [camera], lidar: lidar}
  sparsity: 0.5
  criterion: {_target_: altermoma_pl.Magnitude}
  schedule: {_target_: altermoma_pl.OneShot, epoch: 1}
  prunable: ["!head.*"]
  figures: false
"""


def test_a_hydra_configuration_prunes():
    callback = instantiate(OmegaConf.create(CONFIG)).pruning
    module = Fusion()
    fit(module, callback, max_epochs=2)
    assert isinstance(callback, AlterMOMACallback)
    assert num_zeros(module) == 56
    assert list(callback.masks) == ["camera.0.weight", "camera.3.weight", "lidar.0.weight", "lidar.3.weight"]


def test_shares_of_modalities_and_declared_groups_are_mappings_of_omegaconf():
    text = """
    _target_: altermoma_pl.AlterMOMACallback
    modalities: {camera: camera, lidar: lidar}
    sparsity: {camera: 0.25, lidar: 0.75, shared: 0.0}
    scope: modality
    criterion: {_target_: altermoma_pl.Magnitude}
    schedule: {_target_: altermoma_pl.OneShot}
    figures: false
    """
    callback = instantiate(OmegaConf.create(text))
    module = Fusion()
    fit(module, callback, max_epochs=1)
    assert {name: total.kept for name, total in callback.report().groups.items()} == {
        "camera": 0.75, "lidar": 0.25, "shared": 1.0,
    }  # fmt: skip
    channel = instantiate(
        OmegaConf.create({"_target_": "altermoma_pl.Channel", "declared": {"a": {"camera.0": "out"}}})
    )
    assert channel == Channel(declared={"a": {"camera.0": "out"}})
