"""Random configurations of channels: they prune what they say in whole blocks, or say that they cannot."""

import math
import warnings
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from altermoma_pl import SNIP, Channel, Linear, Magnitude, OneShot, Random, Taylor, slim
from altermoma_pl.granularity.channels.flops import count_flops
from tests.helpers.channel_models import WIDTHS, Towers, channel_pruner
from tests.helpers.lightning_models import loader, short, trainer

pytest.importorskip("torch_pruning")
pytestmark = pytest.mark.slow
INPUTS = (next(iter(loader()))[0],)
REACHED: list[bool] = []


@st.composite
def options(draw: Any) -> dict[str, Any]:
    target = draw(st.sampled_from(["channels", "flops"]))
    return {
        "granularity": Channel(target, draw(st.integers(1, 4 if target == "channels" else 2))),
        "scope": draw(st.sampled_from(["global", "modality", "layer"])) if target == "channels" else "global",
        "sparsity": draw(st.floats(0, 0.9 if target == "channels" else 0.5)),
        "min_density": draw(st.sampled_from([0.0, 0.1]) | st.floats(0, 0.5 if target == "channels" else 0.1)),
        "criterion": draw(
            st.sampled_from([short(), Magnitude(), Random(), SNIP(num_probe_batches=1), Taylor(1)])
        ),
        "schedule": draw(st.sampled_from([OneShot(0), Linear(0, 1)])),
        "seed": draw(st.integers(0, 2**63 - 1)),
    }


def least(width: int, step: int, min_density: float) -> int:
    """The narrowest that a group may become."""
    floor = math.ceil(max(1, round(min_density * width, 9)) / step) * step
    return min(width, floor)


def members(scope: str) -> list[list[str]]:
    """The groups of channels that compete."""
    camera, lidar = (
        [name for name in WIDTHS if name.startswith(modality)] for modality in ("camera", "lidar")
    )
    return {"global": [camera + lidar], "modality": [camera, lidar], "layer": [[name] for name in WIDTHS]}[
        scope
    ]


@settings(
    max_examples=120,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(options())
def test_channels_are_pruned_in_blocks_or_the_share_is_refused(options):
    sparsity, step = options["sparsity"], options["granularity"].round_to
    narrowest = {name: least(width, step, options["min_density"]) for name, width in WIDTHS.items()}
    scopes = members(options["scope"])
    reachable = options["granularity"].target == "flops" or all(
        sum(narrowest[n] for n in names) <= (1 - sparsity) * sum(WIDTHS[n] for n in names) * (1 + 1e-12)
        for names in scopes
    )
    REACHED.append(reachable)
    module, callback = Towers(), channel_pruner(**options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runner = trainer(callback, max_epochs=2, limit_train_batches=2, barebones=True)
        if not reachable:
            with pytest.raises(ValueError, match="cannot be reached"):
                runner.fit(module, loader(), loader(seed=1))
            return
        runner.fit(module, loader(), loader(seed=1))
    event = callback.events[-1]
    kept = {name: width for name, (width, _) in event["widths"].items()}
    assert all(width == WIDTHS[name] or width % step == 0 for name, width in kept.items())
    assert all(narrowest[name] <= width for name, width in kept.items())
    if options["granularity"].target == "flops":
        assert event["flops"] >= sparsity - 1e-9
    else:
        removed = [sum(WIDTHS[n] - kept[n] for n in names) for names in scopes]
        wanted = [sparsity * sum(WIDTHS[n] for n in names) for names in scopes]
        assert all(w - 1e-9 <= r < w + step for r, w in zip(removed, wanted, strict=True))
    if kept != WIDTHS:
        smaller = slim(module.eval(), callback.masks, INPUTS)
        assert {name: width for name, (width, _) in smaller.widths.items()} == kept
        left, all_ = (count_flops(m, lambda m: m(*INPUTS)).total for m in (smaller.model, Towers().eval()))
        assert left / all_ == pytest.approx(1 - event["flops"])


def test_both_outcomes_were_seen():
    assert REACHED.count(True) >= 40
    assert REACHED.count(False) >= 5
