"""The loss that is scored: whatever the module's own step returns, in the Trainer's precision, unlogged."""

import re
from typing import Any

import pytest
import torch
from torch import nn

from altermoma_pl.callback.lightning_internals import log_silenced
from altermoma_pl.callback.scoring import check_step, loss_function
from tests.helpers.lightning_models import PRUNABLE, Fusion, Manual, fit, loader, num_zeros, pruner, trainer

BATCH = next(iter(loader()))


def loss_of(module: Any, index: int = 0, **options: Any) -> Any:
    module.eval()
    built = trainer(**options)
    return loss_function(built, module)(module, (index, BATCH))


class Dictionary(Fusion):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": self.loss(batch), "more": 1}


class NoIndex(Fusion):
    def training_step(self, batch: Any) -> Any:
        return self.loss(batch)


class OtherNames(Fusion):
    def training_step(self, data: Any, number: int) -> Any:
        return self.loss(data) * (number + 1)


class DefaultIndex(Fusion):
    def training_step(self, batch: Any, batch_idx: int = 7) -> Any:
        return self.loss(batch) * (batch_idx + 1)


class LoaderIndex(Fusion):
    def training_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self.loss(batch) * (batch_idx + 1) + dataloader_idx


class Options(Fusion):
    def training_step(self, batch: Any, batch_idx: int, scale: float = 1.0) -> Any:
        return self.loss(batch) * (batch_idx + 1) * scale


class Star(Fusion):
    def training_step(self, *args: Any) -> Any:
        batch, batch_idx = args
        return self.loss(batch) * (batch_idx + 1)


class Keywords(Fusion):
    def training_step(self, batch: Any, batch_idx: int, **kwargs: Any) -> Any:
        assert not kwargs
        return self.loss(batch) * (batch_idx + 1)


class Preferred(Fusion):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        raise AssertionError("not to be called")

    def pruning_loss(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.loss(batch) * (batch_idx + 1)


class PreferredNoIndex(Preferred):
    def pruning_loss(self, batch: Any) -> torch.Tensor:
        return self.loss(batch)


@pytest.mark.parametrize(
    ("model", "factor"),
    [
        (Fusion, 1),
        (Dictionary, 1),
        (NoIndex, 1),
        (OtherNames, 3),
        (DefaultIndex, 3),
        (LoaderIndex, 3),
        (Options, 3),
        (Star, 3),
        (Keywords, 3),
        (Preferred, 3),
        (PreferredNoIndex, 1),
    ],
)
def test_what_a_step_takes_and_returns(model, factor):
    module = model()
    module.eval()
    expected = module.loss(BATCH) * factor
    if model is Fusion:  # outside a Trainer `self.log` would fail, here it is silenced
        assert torch.equal(loss_of(module), expected)
    assert torch.equal(loss_of(module, index=2), expected)


@pytest.mark.parametrize("model", [Dictionary, NoIndex, OtherNames, LoaderIndex, Options, Keywords])
def test_a_run_with_each_step(model):
    module, callback = model(), pruner()
    fit(module, callback)
    assert num_zeros(module) == 60


@pytest.mark.parametrize("output", [None, {}, {"train_loss": 1}, 1.0, "loss", {"loss": 1.0}])
def test_no_loss(output):
    class Nothing(Fusion):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return output

    found = type(output["loss"] if isinstance(output, dict) and "loss" in output else output).__name__
    message = (
        f"training_step returned no loss but {found}: to score weights it must return a tensor or a "
        f"dictionary with the key 'loss' for every batch; define `pruning_loss(self, batch, batch_idx)` if "
        f"it cannot"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        loss_of(Nothing())


def test_a_wrong_pruning_loss_is_named():
    class Wrong(Fusion):
        def pruning_loss(self, batch: Any, batch_idx: int) -> Any:
            return 3

    with pytest.raises(ValueError, match="pruning_loss returned no loss but int"):
        loss_of(Wrong())


def test_pruning_loss_takes_precedence_in_a_run():
    class Counted(Fusion):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            counts["training"] += 1
            return self.loss(batch)

        def pruning_loss(self, batch: Any, batch_idx: int) -> torch.Tensor:
            counts["pruning"] += 1
            return self.loss(batch)

    counts = {"training": 0, "pruning": 0}
    fit(Counted(), pruner())
    assert counts == {"training": 12, "pruning": 2 + 2 * 6}


def test_manual_optimization_with_pruning_loss_is_fine():
    assert check_step(Manual()) is None


# Precision.


@pytest.mark.parametrize(
    ("precision", "inside", "autocast"),
    [
        ("32-true", torch.float32, False),
        ("bf16-mixed", torch.float32, False),
        ("bf16-true", torch.bfloat16, False),
        ("64-true", torch.float64, False),
    ],
)
def test_precision_while_scoring(precision, inside, autocast):
    class Made(Fusion):
        def pruning_loss(self, batch: Any, batch_idx: int) -> torch.Tensor:
            seen.append((torch.zeros(1).dtype, torch.is_autocast_enabled("cpu")))
            return self.loss(batch)

    seen: list[tuple[torch.dtype, bool]] = []
    module, callback = Made(), pruner()
    fit(module, callback, precision=precision)
    assert set(seen) == {(inside, autocast)}
    assert num_zeros(module) == 60
    assert all(torch.isfinite(tensor).all() for tensor in callback.components.deci.values())
    assert torch.zeros(1).dtype is torch.float32


def test_bf16_accumulates_in_float32():
    callback = pruner()
    module = Fusion()
    fit(module, callback, precision="bf16-true")
    assert module.head.weight.dtype is torch.bfloat16
    assert {tensor.dtype for tensor in callback.components.deci.values()} == {torch.float32}
    assert set(callback.components.deci) == set(PRUNABLE)


# Logging.


def test_quiet_covers_modules_inside_and_comes_back_after_an_error():
    class Part(nn.Module):
        def log(self, *_: Any) -> None:
            calls.append("log")

        def log_dict(self, *_: Any) -> None:
            calls.append("log_dict")

    calls: list[str] = []
    module = Fusion()
    module.add_module("part", Part())
    own = module.part.log = lambda *_: calls.append("own")

    def inside() -> None:
        with log_silenced(module):
            module.log("a", 1)
            module.log_dict({"a": 1})
            module.part.log("a", 1)
            module.part.log_dict({"a": 1})
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        inside()
    assert calls == []
    module.part.log()
    module.part.log_dict()
    assert calls == ["own", "log_dict"]
    assert vars(module.part)["log"] is own
    assert "log_dict" not in vars(module.part)
    assert not {"log", "log_dict"} & vars(module).keys()


def test_loss_layers_with_other_attributes_called_log_are_left():
    module = Fusion()
    module.add_module("part", nn.Identity())
    module.part.log = "a file"
    with log_silenced(module):
        assert module.part.log == "a file"
    assert module.part.log == "a file"
