"""Scoring leaves everything as it was, bit for bit, also when it is interrupted."""

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader

from altermoma_pl import AlterEva, OneShot
from tests.helpers.lightning_models import Augmented, Fusion, assert_same, fit, loader, pruner, short, trainer
from tests.helpers.spying import NUM_CALLS, Busy, Spy


@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("noise", ["suppressed", "as_is"])
@pytest.mark.parametrize("estimator", ["reactivated", "difference"])
def test_an_event_that_prunes_nothing_changes_nothing(estimator, noise, epoch):
    before, after = Spy(epoch), Spy(epoch)
    criterion = short(estimator=estimator, noise=noise, optimizer="adam")
    callback = pruner(sparsity=0.0, schedule=OneShot(epoch), criterion=criterion)
    module = Busy()
    # Lightning drops gradients before it validates; without validation they are there.
    options = {"train": DataLoader(Augmented(), 8, shuffle=True), "check_val_every_n_epoch": 5}
    fit(module, before, callback, after, **options)
    assert len(callback.events) == 1
    assert before.taken[0]["counts"][:2] == [4 * epoch, epoch]
    assert bool(before.taken[0]["gradients"]) is (epoch == 1)
    assert_same(after.taken, before.taken)


def test_an_event_changes_only_pruned_weights_and_their_moments():
    before, after, callback = Spy(1), Spy(1), pruner(sparsity=0.5)
    fit(Busy(), before, callback, after)
    old, new = before.taken[0], after.taken[0]
    assert sum(int((old["parameters"][n][~m] != 0).sum()) for n, m in callback.masks.items()) == 60
    for name, mask in callback.masks.items():
        old["parameters"][name] *= mask
    names = [n for n, p in Busy().named_parameters() if p.requires_grad]
    order = [n for n, _ in Busy().named_parameters()]
    for name in names:
        if name in callback.masks:
            state = old["optimizer"]["state"][order.index(name)]
            state["exp_avg"] *= callback.masks[name]
            state["exp_avg_sq"] *= callback.masks[name]
    assert_same(new, old)


class Stops(Busy):
    """Raises in the given call of its loss, counted from the first of the scoring event at epoch 1."""

    def __init__(self, call: int, error: BaseException) -> None:
        super().__init__()
        self.error = error
        self.calls_left = [call]  # not restored after the event, see below

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if self.trainer.current_epoch == 1:
            CALLS.append(batch_idx)
            if len(CALLS) == self.calls_left[0] + 1:
                raise self.error
        return loss


CALLS: list[int] = []


@pytest.mark.parametrize(
    "error", [RuntimeError("in the step"), KeyboardInterrupt()], ids=["error", "interrupt"]
)
@pytest.mark.parametrize("call", range(NUM_CALLS))
def test_an_interrupted_event_changes_nothing(call, error):
    CALLS.clear()
    before, after, callback = Spy(1), Spy(1), pruner(sparsity=0.5)
    with pytest.raises((RuntimeError, KeyboardInterrupt, SystemExit)):
        fit(Stops(call, error), before, callback, after, train=DataLoader(Augmented(), 8, shuffle=True))
    assert len(CALLS) == call + 1
    assert callback.events == []
    assert callback.masks.sparsity == 0
    assert callback.state_dict()["last_event_epoch"] == -1  # a checkpoint made now must not skip it
    assert len(before.taken) == 2
    assert_same(after.taken, before.taken[:1])


def test_the_number_of_calls_in_an_event():
    CALLS.clear()
    callback = pruner(sparsity=0.5)
    fit(Stops(10**6, RuntimeError()), callback)
    assert len(callback.events) == 1
    assert len(CALLS) == NUM_CALLS + 4  # and the epoch's own batches


def test_the_interrupted_run_can_be_fitted_again():
    CALLS.clear()
    callback = pruner(sparsity=0.5)
    module = Stops(3, RuntimeError("in the step"))
    with pytest.raises(RuntimeError, match="in the step"):
        fit(module, callback)
    module.train()
    fit(module, callback)
    assert [event["epoch"] for event in callback.events] == [1]
    assert callback.masks.num_kept == 60


def test_nothing_is_logged_while_scoring():
    class Logs(Fusion):
        def pruning_loss(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = self.loss(batch)
            self.log("only_while_scoring", loss)
            self.log_dict({"this_too": loss}, on_step=True)
            return loss

    callback = pruner()
    ran = fit(Logs(), callback)
    assert len(callback.events) == 1
    assert set(ran.callback_metrics) == {"train_loss", "train_loss_step", "train_loss_epoch", "val_loss"}


def test_a_log_method_of_the_users_own_survives():
    calls: list[str] = []
    module, callback = Fusion(), pruner()
    module.log = lambda name, *_, **__: calls.append(name)
    own = module.log
    fit(module, callback)
    assert module.log is own
    assert calls == (["train_loss"] * 4 + ["val_loss"] * 4) * 3
    assert "log_dict" not in vars(module)


def test_hooks_of_parameters_do_not_fire_while_scoring():
    fired: list[int] = []
    module = Fusion()
    module.head.weight.register_post_accumulate_grad_hook(lambda _: fired.append(1))
    fit(module, pruner(sparsity=0.0))
    assert len(fired) == 12  # 3 epochs of 4 batches


def test_generators_of_loaders_are_rewound():
    class Look(Callback):
        def __init__(self) -> None:
            self.states: list[torch.Tensor] = []

        def on_train_epoch_start(self, *_: Any) -> None:
            self.states += [own.get_state() for own in (training, probing)]

    training, probing = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    before, after = Look(), Look()
    callback = pruner(sparsity=0.0, loader="calibration")

    class Calibrated(Fusion):
        def calibration_dataloader(self) -> Any:
            return loader(shuffle=True, generator=probing)

    fit(Calibrated(), before, callback, after, train=loader(shuffle=True, generator=training))
    assert len(callback.events) == 1
    assert_same(after.states, before.states)
    assert torch.equal(probing.get_state(), torch.Generator().manual_seed(2).get_state())


def test_the_training_order_is_not_shifted():
    """With every generator of its own rewound, the batches are those of a run without the callback."""
    orders: list[list[float]] = []

    class Records(Fusion):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            orders[-1].append(float(batch[0][0, 0]))

    for callbacks in ([], [pruner(sparsity=0.3, schedule=OneShot(0))], [pruner(sparsity=0.3)]):
        orders.append([])
        fit(Records(), *callbacks, train=loader(shuffle=True, generator=torch.Generator().manual_seed(9)))
    assert len(orders[0]) == 12
    assert orders[1] == orders[0]
    assert orders[2] == orders[0]


def test_an_error_in_an_event_leaves_the_generators_of_loaders():
    own = torch.Generator().manual_seed(4)

    class Fails(Fusion):
        def pruning_loss(self, batch: Any, batch_idx: int) -> torch.Tensor:
            if batch_idx == 1:
                raise RuntimeError("in the loss")
            return self.loss(batch)

        def calibration_dataloader(self) -> Any:
            return loader(shuffle=True, generator=own)

    with pytest.raises(RuntimeError, match="in the loss"):
        trainer(pruner(criterion=AlterEva())).fit(Fails(), loader(), loader(seed=1))
    assert torch.equal(own.get_state(), torch.Generator().manual_seed(4).get_state())
