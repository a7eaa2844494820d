import pytest
import torch
from lightning.pytorch import Callback

from altermoma_pl.callback import Slimmed
from altermoma_pl.export import export
from altermoma_pl.granularity import Channel
from altermoma_pl.granularity.channels.resizing import KEY, widths_of
from tests.helpers.lightning_models import Fusion, assert_same, fit, loader, pruner, trainer
from tests.helpers.towers import Towers

CONFIG = "model:\n  class_path: tests.helpers.towers.Towers\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A pruned run: its folder, `dense.ckpt` of two epochs and `slim.ckpt` in it; its module after four."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "run.yaml").write_text(CONFIG)
    module = Towers()
    saving = SaveAt(2, folder / "dense.ckpt")
    pruning = pruner(granularity=Channel(round_to=1), store_components=False)
    fit(module, pruning, saving, max_epochs=4)
    export(str(folder / "dense.ckpt"), str(folder / "run.yaml"), output=str(folder / "slim.ckpt"), repeats=0)
    return folder, module


class SaveAt(Callback):
    """Saves a checkpoint after some epochs."""

    def __init__(self, epochs, path):
        self.epochs, self.path = epochs, path

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch + 1 == self.epochs:
            trainer.save_checkpoint(self.path)


class AtStart(Callback):
    """Remembers weights and the optimizer's state as training begins."""

    def on_train_start(self, trainer, pl_module):
        self.weights = {name: t.clone() for name, t in pl_module.state_dict().items()}
        self.optimizer = trainer.optimizers[0].state_dict()["state"]
        self.moments = {n: v["exp_avg"].clone() for n, v in self.optimizer.items()}
        self.epoch = trainer.current_epoch


def resume(module, path, *callbacks, **options):
    built = trainer(*callbacks, **options)
    built.fit(module, loader(), loader(seed=1), ckpt_path=str(path))
    return built


def load(path):
    return torch.load(path, weights_only=True)


def check_consistent(module):
    for name, layer in module.named_modules():
        assert widths_of(layer).items() <= vars(layer).items(), name


def test_a_new_fit_begins_with_the_slim_weights(run):
    folder, _ = run
    saved = load(folder / "slim.ckpt")
    module, start = Towers(), AtStart()
    dense = sum(p.numel() for p in module.parameters())
    fit(module, Slimmed(str(folder / "slim.ckpt")), start, max_epochs=2)
    assert_same(start.weights, dict(saved["state_dict"]))
    assert (start.epoch, start.moments) == (0, {})
    assert sum(p.numel() for p in module.parameters()) < 0.8 * dense
    check_consistent(module)
    assert not torch.equal(module.head.weight, start.weights["head.weight"])  # it trains
    assert module.camera[0].out_channels == saved[KEY]["widths"]["camera.0"][0] < 8


def test_it_is_resumed_from_the_exported_checkpoint(run):
    folder, dense = run
    path = str(folder / "slim.ckpt")
    saved = load(path)
    module, start = Towers(), AtStart()
    run_on = resume(module, path, Slimmed(path), start, max_epochs=4)
    assert start.epoch == 2
    [state] = saved["optimizer_states"]
    assert_same(start.moments, {number: v["exp_avg"] for number, v in state["state"].items()})
    assert start.moments[0].shape == module.camera[0].weight.shape
    assert run_on.global_step == 16
    # The pruned run that went on with zeros computed the same.
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        torch.testing.assert_close(module.eval()(x), dense.eval()(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_resumed_run_is_the_uninterrupted_one(run, tmp_path, optimizer):
    folder, _ = run
    slim = str(folder / "slim.ckpt")
    whole, half = tmp_path / "whole.ckpt", tmp_path / "half.ckpt"
    fit(Towers(optimizer=optimizer), Slimmed(slim), SaveAt(4, whole), max_epochs=4)
    fit(Towers(optimizer=optimizer), Slimmed(slim), SaveAt(2, half), max_epochs=2)
    resumed = tmp_path / "resumed.ckpt"
    resume(Towers(optimizer=optimizer), half, Slimmed(slim), SaveAt(4, resumed), max_epochs=4)
    one, other = load(whole), load(resumed)
    for key in ("state_dict", "optimizer_states", "epoch", "global_step", KEY):
        assert_same(one[key], other[key], key)
    assert one["state_dict"]["camera.0.weight"].shape[0] < 8


def test_checkpoints_of_the_run_stand_in_for_the_slim_file(run, tmp_path):
    folder, _ = run
    later = tmp_path / "later.ckpt"
    fit(Towers(), Slimmed(str(folder / "slim.ckpt")), SaveAt(2, later), max_epochs=2)
    assert_same(load(later)[KEY], load(folder / "slim.ckpt")[KEY])
    module, start = Towers(), AtStart()
    fit(module, Slimmed(str(later)), start, max_epochs=1)
    assert_same(start.weights, dict(load(later)["state_dict"]))
    resumed = Towers()
    resume(resumed, later, Slimmed(str(later)), start, max_epochs=3)
    assert start.epoch == 2
    check_consistent(resumed)


def test_the_module_is_reshaped_once(run):
    folder, _ = run
    callback, module = Slimmed(str(folder / "slim.ckpt")), Towers()
    fitted = fit(module, callback, max_epochs=1)
    trained = {name: t.clone() for name, t in module.state_dict().items()}
    callback.setup(fitted, module, "test")
    assert_same(dict(module.state_dict()), trained)


def test_files_of_something_else(run, tmp_path):
    folder, _ = run
    with pytest.raises(ValueError, match=r"dense.ckpt is not the checkpoint of a slim model: write one with"):
        fit(Towers(), Slimmed(str(folder / "dense.ckpt")))
    torch.save([1], tmp_path / "list.ckpt")
    with pytest.raises(ValueError, match=r"list.ckpt is not the checkpoint of a slim model"):
        fit(Towers(), Slimmed(str(tmp_path / "list.ckpt")))
    whole = (folder / "slim.ckpt").read_bytes()
    for content in (b"text", b"", whole[: len(whole) // 2]):
        (tmp_path / "part.ckpt").write_bytes(content)
        with pytest.raises(ValueError, match=r"part.ckpt is no checkpoint"):
            fit(Towers(), Slimmed(str(tmp_path / "part.ckpt")))
    with pytest.raises(FileNotFoundError):
        fit(Towers(), Slimmed(str(tmp_path / "absent.ckpt")))


@pytest.mark.parametrize("module", [Fusion, lambda: Towers(width=2)])
def test_other_models(run, module):
    folder, _ = run
    with pytest.raises(ValueError, match="the slim checkpoint is of another model than"):
        fit(module(), Slimmed(str(folder / "slim.ckpt")))
