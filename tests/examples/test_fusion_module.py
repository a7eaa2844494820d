import re
from functools import partial

import pytest
import torch
from lightning import seed_everything
from torch.utils.data import DataLoader

from examples.models.module import learning_rate_factor
from tests.helpers.fusion import make_batch, make_module
from tests.helpers.lightning_models import trainer

make_trainer = partial(trainer, num_sanity_val_steps=2)


def loader(count=3):
    return DataLoader([make_batch(seed) for seed in range(count)], batch_size=None)


def checkpoint(tmp_path, sensor):
    trainer = make_trainer(max_steps=2, limit_val_batches=0)
    module = make_module(sensors=[sensor])
    trainer.fit(module, loader(), loader(1))
    path = tmp_path / f"{sensor}.ckpt"
    trainer.save_checkpoint(path)
    return module, str(path)


def test_fit_validate_and_test_log_losses_and_metrics():
    module, trainer = make_module(), make_trainer(max_epochs=1)
    trainer.fit(module, loader(), loader(2))
    logged = trainer.callback_metrics
    expected = {"train/loss", "val/loss", "val/miou", "val/ap"}
    assert expected | {"val/miou_road", "val/miou_lane", "val/ap_Car"} <= set(logged)
    assert "val/ap_Pedestrian" not in logged  # it does not occur
    assert all(value.isfinite() for value in logged.values())
    by_hand = (logged["val/miou_road"] + logged["val/miou_lane"]) / 2
    torch.testing.assert_close(logged["val/miou"], by_hand)

    (results,) = trainer.test(module, loader(2), verbose=False)
    assert {"test/loss", "test/miou", "test/ap"} <= set(results)
    assert results["test/miou"] == pytest.approx(logged["val/miou"].item())


def test_fast_dev_run():
    make_trainer(fast_dev_run=True).fit(make_module(), loader(), loader())


def test_loss_needs_no_trainer():
    losses = make_module().loss(make_batch())
    parts = losses["heatmap"] + losses["regression"] + losses["map"]
    torch.testing.assert_close(losses["loss"], parts)


def test_learning_rate_warms_up_and_decays():
    factors = [learning_rate_factor(step, 100) for step in range(101)]
    assert factors[0] == pytest.approx(1 / 11)
    assert max(factors) == factors[10] == 1
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[100] == pytest.approx(0)
    assert all(0 < factor <= 1 for factor in factors[:100])


@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_learning_rate_of_short_trainings(num_steps):
    assert all(0 < learning_rate_factor(step, num_steps) <= 1 for step in range(num_steps))


def test_learning_rate_repeats_its_cycle():
    once = [learning_rate_factor(step, 20) for step in range(20)]
    assert [learning_rate_factor(step, 20, repeat=True) for step in range(40)] == once + once
    assert learning_rate_factor(20, 20) == pytest.approx(0)  # without it the training is over


@pytest.mark.parametrize(("accumulate", "cycle"), [(1, 6), (2, 4)])
def test_cycles_of_epochs(accumulate, cycle):
    module = make_module(decay_epochs=2)
    trainer = make_trainer(max_epochs=5, limit_val_batches=0, accumulate_grad_batches=accumulate)
    trainer.fit(module, loader(3), loader(1))
    factor = trainer.lr_scheduler_configs[0].scheduler.lr_lambdas[0]
    expected = [learning_rate_factor(step, cycle) for step in range(cycle)]
    assert [factor(step) for step in range(2 * cycle)] == 2 * expected


def test_cycles_must_have_an_epoch():
    with pytest.raises(ValueError, match=re.escape("decay_epochs must be at least 1, or None for one cycle")):
        make_module(decay_epochs=0)


def test_depth_weight_adds_a_loss():
    plain, losses = make_module().loss(make_batch()), make_module(depth_weight=0.5).loss(make_batch())
    assert "depth" not in plain
    parts = losses["heatmap"] + losses["regression"] + losses["map"] + losses["depth"]
    torch.testing.assert_close(losses["loss"], parts)
    assert losses["depth"] > 0


def test_learning_rate_of_endless_training_stays():
    assert learning_rate_factor(10_000, float("inf")) == 1


def test_backbones_come_from_single_sensor_checkpoints(tmp_path):
    camera, camera_path = checkpoint(tmp_path, "camera")
    lidar, lidar_path = checkpoint(tmp_path, "lidar")
    both = make_module(backbones={"camera": camera_path, "lidar": lidar_path})
    state = both.model.encoders.state_dict()
    for single in (camera, lidar):
        for name, value in single.model.encoders.state_dict().items():
            assert torch.equal(state[name], value)


def test_refused_backbones(tmp_path):
    module, path = checkpoint(tmp_path, "camera")
    with pytest.raises(ValueError, match=re.escape("'lidar', but the model has ('camera',).")):
        make_module(sensors=["camera"], backbones={"lidar": path})
    with pytest.raises(ValueError, match=r"does not fit encoders\.lidar: missing \['backbone"):
        make_module(backbones={"lidar": path})

    name = "model.encoders.camera.neck.mix.0.weight"
    state = {**module.state_dict(), "model.encoders.camera.extra": torch.zeros(1)}
    state[name] = state[name][:1]
    torch.save({"state_dict": state}, path)
    message = "missing [], unexpected ['extra'], of another shape ['neck.mix.0.weight']"
    with pytest.raises(ValueError, match=re.escape(message)):
        make_module(backbones={"camera": path})


def test_decoder_and_heads_come_from_a_single_sensor_checkpoint(tmp_path):
    lidar, path = checkpoint(tmp_path, "lidar")
    both = make_module(heads=path)
    for part in ("decoder", "heads"):
        state = getattr(both.model, part).state_dict()
        for name, value in getattr(lidar.model, part).state_dict().items():
            assert torch.equal(state[name], value)


def test_weights_come_from_a_checkpoint_of_the_same_model(tmp_path):
    camera, path = checkpoint(tmp_path, "camera")
    again = make_module(sensors=["camera"], weights=path)
    for name, value in camera.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value)
    with pytest.raises(ValueError, match=r"does not fit the model: missing \['encoders\.lidar"):
        make_module(weights=path)


def test_refused_map_classes():
    message = "map_classes must name 2 classes (num_map_classes), got ['road']."
    with pytest.raises(ValueError, match=re.escape(message)):
        make_module(map_classes=["road"])


def test_training_repeats_bit_for_bit():
    """Of the tiny model, with depths and cycles, as benchmarks train it."""

    def weights():
        seed_everything(3, verbose=False)
        module = make_module(size="tiny", depth_weight=1.0, decay_epochs=1)
        trainer = make_trainer(max_epochs=2, limit_val_batches=0)
        trainer.fit(module, loader(), loader(1))
        return module.state_dict()

    first, second = weights(), weights()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
