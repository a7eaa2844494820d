"""The scripts that measure costs: their arithmetic, and that each runs. What they measure is not tested."""

import copy
import json
import math
import sys

import pytest
import torch

from altermoma_pl import AlterEva
from altermoma_pl.export.semi_structured import device_obstacle
from examples.benchmarks import channels, growth, measuring, memory, scoring, semi_structured, step
from examples.benchmarks.workloads import Towers
from tests.helpers.masks import follows

QUICK = ["--quick", "--repeats", "1"]
CRITERION = AlterEva(num_probe_batches=2, num_reactivation_steps=3)


def rows_of(script, folder, *flags):
    script.main([*QUICK, "--json", str(folder / "costs.json"), *flags])
    content = json.loads((folder / "costs.json").read_text())
    assert content["options"]["repeats"] == 1
    return {row["what"]: row for row in content["rows"]}


def test_the_median_over_repetitions_and_its_json(tmp_path, capsys):
    arguments = measuring.options("What", ["--json", str(tmp_path / "x.json")], size=3)
    row = measuring.Row("it", measuring.ratios([2.0, 9.0, 4.0], [1.0, 3.0, 1.0]), 1.5, [2.0, 9.0, 4.0])
    measuring.show("Costs", [row], arguments)
    (found,) = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert found["ratios"] == [2, 3, 4]
    assert (found["median"], found["at_most"]) == (3, 1.5)
    assert "3.000" in capsys.readouterr().out
    assert arguments.size == 3


def test_actions_take_turns():
    order = []
    actions = {name: lambda name=name: order.append(name) for name in "ab"}
    taken = measuring.in_turns(actions, repeats=2, times=2)
    assert order == [*"ab", *"abba", *"abba"]
    assert {name: len(values) for name, values in taken.items()} == {"a": 2, "b": 2}


def test_channels_are_compared_at_equal_flops(tmp_path, monkeypatch):
    monkeypatch.setattr(channels, "SHARES", (0.5,))
    channels.main([*QUICK, "--json", str(tmp_path / "costs.json"), "--folder", str(tmp_path)])
    rows = {row["model"]: row for row in json.loads((tmp_path / "costs.json").read_text())["rows"]}
    assert list(rows) == ["dense", "dense, trained on", "AlterEva 50%", "Torch-Pruning 50%"]
    ours, theirs = rows["AlterEva 50%"], rows["Torch-Pruning 50%"]
    assert theirs["flops"] <= ours["flops"] < 1
    assert max(ours["parameters"], theirs["parameters"]) < 1
    assert rows["dense"]["miou / dense"] == rows["dense"]["speed-up, batch 1"] == 1
    assert all(row["ms, onnxruntime"] > 0 for row in rows.values())


def test_no_repetitions_are_refused(capsys):
    with pytest.raises(SystemExit):
        measuring.options("What", ["--repeats", "0"])
    assert "--repeats must be at least 1, got 0" in capsys.readouterr().err


def test_the_line_by_hand():
    """2 + 3 x goes through all points; from 1, 1 and 4 relative deviations pull towards the small ones."""
    exact = growth.line([1, 2, 10], [5, 8, 32])
    assert [exact(x) for x in (1, 2, 10, 4)] == pytest.approx([5, 8, 32, 14])
    bent = growth.line([1, 2, 3], [1, 1, 4])
    assert abs(bent(1) - 1) < abs(bent(3) - 4)


def test_the_step_without_masks_and_with():
    torch.manual_seed(0)
    towers = Towers(400)
    batch = towers.batches(1, 3)[0]
    for kind, make in step.KINDS.items():
        run = make(towers, batch, "AdamW", clip=True)
        run()
        own = next(cell.cell_contents for cell in run.__closure__ if isinstance(cell.cell_contents, Towers))
        zeros = torch.cat([layer.weight.flatten() == 0 for layer in own.children()]).double().mean()
        assert float(zeros) == pytest.approx(0 if kind == "dense" else 0.9, abs=0.06), kind
        assert all(bool((weight != 0).all()) for weight in towers.parameters())


def counted(calibration):
    """Count passes of the loss: with gradients and without."""
    counts, loss = {True: 0, False: 0}, calibration.loss_fn

    def counting(model, batch):
        counts[torch.is_grad_enabled()] += 1
        return loss(model, batch)

    calibration.loss_fn = counting
    return counts


def test_the_bare_loop_makes_the_passes_of_the_event():
    towers = Towers(100)
    batches = towers.batches(3, 2)
    before = [parameter.detach().clone() for parameter in towers.parameters()]
    counts = []
    for run in (lambda c: scoring.event(CRITERION, c), lambda c: scoring.bare_loop(CRITERION, c)):
        calibration = scoring.calibration_of(towers, batches)
        counts.append(counted(calibration))
        run(calibration)
    assert counts == [{True: 2 + 2 * (3 + 2), False: 2 * 2}] * 2
    assert all(torch.equal(a, b) for a, b in zip(before, towers.parameters(), strict=True))


def test_step_runs(tmp_path):
    rows = rows_of(step, tmp_path, "--times", "1")
    assert len(rows) == 2 * 2 * 2 * 4
    assert all(row["ratios"] == [1] for what, row in rows.items() if what.endswith(": dense"))


def test_scoring_runs(tmp_path):
    rows = rows_of(scoring, tmp_path)
    assert [what.split(",")[0].split(" of ")[0] for what in rows] == ["fusion", "MLP"]
    assert all(row["median"] > 0 for row in rows.values())


def test_growth_runs(tmp_path):
    rows = rows_of(growth, tmp_path)
    assert len(rows) == 4 * 2
    assert all(math.isfinite(row["median"]) for row in rows.values())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_training_by_hand(tmp_path, monkeypatch):
    """A mask is a byte of four; five rounds of torch's pruning keep a copy and a mask, and more masks."""
    monkeypatch.setattr(memory, "measure", lambda case, arguments: memory.CASES[case](arguments.parameters))
    monkeypatch.setattr(memory, "trim", memory.gc.collect)
    rows = rows_of(memory, tmp_path)
    assert len(rows) == 2 + 3 * len(memory.TRAINING)
    assert rows["counted: ours, beyond dense"]["median"] == pytest.approx(0.25, abs=0.02)
    assert rows["counted: torch.nn.utils.prune, beyond dense"]["median"] > 5
    assert rows["checkpoint: torch.nn.utils.prune, beyond dense"]["median"] == pytest.approx(1, abs=0.05)
    stored = rows["checkpoint: ours, components stored, beyond dense"]["median"]
    assert stored == pytest.approx(2, abs=0.2)  # DeCI and magnitudes; redundancy is that of tensors


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_case_has_a_process_of_its_own():
    arguments = memory.options("Memory", ["--quick"], parameters=1e4, case="")
    found = memory.measure("forward and backward", arguments)
    assert found["parameters"] == 4 * Towers(1e4).num_parameters
    assert found["peak"] > found["parameters"]


def test_semi_structured_says_that_a_cpu_gains_nothing(capsys):
    semi_structured.main(["--quick"])
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith("Nothing to measure with --device cpu. 2:4 has no gain on a CPU: the zeros are")


def test_semi_structured_compares_models_of_the_same_numbers(tmp_path, monkeypatch):
    """As on a GPU, with a compressed model that is a masked copy."""
    given = []

    def masked_copy(model, masks):
        assert follows(masks, 2, 4)
        given.append(list(masks))
        compressed = copy.deepcopy(model)
        masks.apply_(compressed)
        return compressed, tuple(masks), {}

    monkeypatch.setattr(semi_structured, "device_obstacle", lambda device: None)
    monkeypatch.setattr(semi_structured, "to_semi_structured", masked_copy)
    rows = rows_of(semi_structured, tmp_path)
    assert list(rows) == ["linear, 64: dense", "linear, 64: 2:4", "MLP, 64: dense", "MLP, 64: 2:4"]
    assert given == [["0.weight"], ["0.weight", "2.weight"]]
    assert rows["MLP, 64: dense"]["ratios"] == [1]
    assert rows["MLP, 64: 2:4"]["note"] == "2 of 2 compressed, deviation 0.0e+00"


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor:UserWarning")
@pytest.mark.skipif(device_obstacle(torch.device("cuda")) is not None, reason="needs a GPU with 2:4 kernels")
def test_semi_structured_runs_on_a_gpu(tmp_path):
    rows = rows_of(semi_structured, tmp_path, "--device", "cuda")
    assert len(rows) == 2 * 2
    assert rows["MLP, 64: 2:4"]["note"].startswith("2 of 2 compressed")
