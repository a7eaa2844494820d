"""Random configurations: wrong ones are refused with a clear error, valid ones prune exactly."""

import copy
import math
import warnings
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from altermoma_pl import (
    SNIP,
    AlterEva,
    AlterMOMACallback,
    Cubic,
    Exponential,
    GraSP,
    Linear,
    Magnitude,
    OneShot,
    ProsPr,
    Random,
    Rewinding,
    SynFlow,
    Taylor,
    Wanda,
)
from tests.helpers.lightning_models import MODALITIES, PRUNABLE, Fusion, assert_same, loader, trainer

pytestmark = pytest.mark.slow
FUZZ = {"derandomize": True, "deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
SIZES = {"camera": 56, "lidar": 56, "shared": 8}
GROUP = {name: name.split(".")[0].replace("head", "shared") for name in PRUNABLE}

# Wrong values, by what an option expects. YAML gives strings, booleans, lists and dictionaries.

NO_NUMBER = st.sampled_from(
    ["0.5", "", "auto ", True, False, [], [0.5], {}, {"a": 1}, (1,), b"1", 1j, object]
)
NOT_FINITE = st.sampled_from([math.nan, math.inf, -math.inf])
NO_COUNT = NO_NUMBER | NOT_FINITE | st.none() | st.sampled_from([1.0, 2.5, "3", -1, -(10**9)])
NO_CHOICE = st.sampled_from(
    ["", "Global", "nearest", None, 0, 1.5, True, False, [], ["global"], {}, ("sum",)]
)
NO_FLAG = st.sampled_from([None, "true", "", 0, 1, 1.0, [], {}])


def no_share(top: Any = 1.0) -> Any:
    outside = st.floats(max_value=-1e-9, allow_nan=False) | st.floats(min_value=top, exclude_min=top == 1)
    return NO_NUMBER | NOT_FINITE | st.none() | outside


NOT_POSITIVE = NO_NUMBER | NOT_FINITE | st.none() | st.floats(max_value=-1e-9, allow_nan=False)
NO_STRINGS = st.sampled_from([3, 1.5, True, [1], [None], ["camera", 2], {"a": 1}, [[]], [""], object])
NO_TEXT = st.sampled_from([3, 1.5, True, [], {}])

CALLBACK = {
    "modalities": st.sampled_from(
        [None, 3, "camera", [], {}, ["camera", "lidar"], {"camera": ["camera"]}, {"a": 1, "b": 2}]
        + [
            {"camera": ["camera"], "lidar": value}
            for value in (None, 3, [], [3], [""], "", "!", ["!lidar"], [None])
        ]
        + [{"camera": ["camera"], name: ["lidar"]} for name in ("", "shared", 3, None, True)]
    ),
    "sparsity": no_share().filter(lambda value: value is not None) | st.just(1.0),
    "criterion": st.sampled_from([None, "AlterEva", AlterEva, {}, 3, {"class_path": "AlterEva"}, True]),
    "schedule": st.sampled_from([None, "Cubic", Cubic, {}, 3, [0, 1], True]),
    "scope": NO_CHOICE,
    "min_density": no_share(),
    "prunable": NO_STRINGS | st.sampled_from([["nothing"], "!*"]),
    "loader": NO_CHOICE,
    "seed": NO_COUNT.filter(lambda value: value is not None),
    "output_dir": NO_TEXT,
    "figures": NO_FLAG,
    "store_components": NO_FLAG,
    "name": st.sampled_from([3, True, "", "a/b", "a b", [], {}]),
    "on_nonfinite": NO_CHOICE,
    "granularity": NO_CHOICE,
}
ALTEREVA = {
    "alpha": NOT_POSITIVE | st.just(0.0),  # with the default combination
    "beta": NO_NUMBER | NOT_FINITE | st.none(),
    "estimator": NO_CHOICE,
    "reduction": NO_CHOICE,
    "magnitude_share": no_share(),
    "combination": NO_CHOICE,
    "redundancy_level": NO_CHOICE,
    "normalization": NO_CHOICE,
    "num_probe_batches": NO_COUNT | st.just(0),
    "num_reactivation_steps": NO_COUNT,
    "learning_rate": NOT_POSITIVE,
    "optimizer": NO_CHOICE,
    "gradient_clip": (NOT_POSITIVE | st.just(0.0)).filter(lambda value: value is not None),
    "noise": NO_CHOICE,
    "second_probe": NO_CHOICE,
}
PROBES = {"num_probe_batches": NO_COUNT | st.just(0)}
GRADUAL = {"start": NO_COUNT, "end": NO_COUNT, "every": NO_COUNT | st.just(0)}
OPTIONS: dict[Any, dict[str, Any]] = {
    AlterMOMACallback: CALLBACK,
    AlterEva: ALTEREVA,
    SNIP: PROBES,
    Taylor: PROBES,
    Wanda: PROBES,
    GraSP: {**PROBES, "hessian": NO_CHOICE},
    ProsPr: {
        **PROBES,
        "order": NO_CHOICE,
        "num_steps": NO_COUNT | st.just(0),
        "learning_rate": NOT_POSITIVE,
        "momentum": no_share() | st.just(1.0),
        "new_batches": NO_FLAG,
        "detach_first_buffer": NO_FLAG,
    },
    SynFlow: {
        "num_iterations": NO_COUNT | st.just(0),
        "density": no_share() | st.sampled_from([0.0, 1.0]),
        "normalize_heads": NO_FLAG,
        "balance_modalities": NO_FLAG,
    },
    OneShot: {"epoch": NO_COUNT},
    Linear: GRADUAL,
    Cubic: GRADUAL,
    Exponential: GRADUAL,
    Rewinding: {
        "rounds": NO_COUNT | st.just(0),
        "epochs_per_round": NO_COUNT | st.just(0),
        "rewind_epoch": NO_COUNT,
    },
}


@st.composite
def wrong(draw: Any) -> tuple[Any, str, Any]:
    kind = draw(st.sampled_from([*OPTIONS, AlterMOMACallback, AlterMOMACallback, AlterEva, AlterEva]))
    option = draw(st.sampled_from(sorted(OPTIONS[kind])))
    return kind, option, draw(OPTIONS[kind][option])


def test_every_option_is_among_the_wrong_ones():
    named = {kind: {f.name for f in fields(kind)} for kind in OPTIONS if kind is not AlterMOMACallback}
    assert named == {kind: set(options) for kind, options in OPTIONS.items() if kind is not AlterMOMACallback}
    assert set(CALLBACK) == set(AlterMOMACallback.__init__.__annotations__) - {"return"}


MODEL = Fusion()
BEFORE = copy.deepcopy(MODEL.state_dict())
REFUSED: dict[str, int] = {}


@settings(max_examples=800, **FUZZ)
@given(wrong())
def test_a_wrong_configuration_is_refused(case):
    kind, option, value = case
    with pytest.raises((ValueError, TypeError)) as caught:
        start(kind, option, value)
    assert_same(MODEL.state_dict(), BEFORE)
    message = str(caught.value)
    REFUSED[message] = REFUSED.get(message, 0) + 1
    named = {"modalities": "modalit", "prunable": "prunable"}.get(option, option)
    assert named in message, message
    assert any(f"{text:.20}" in message for text in _texts(value)), message


def start(kind: Any, option: str, value: Any) -> None:
    """Make the object and, if it is a callback, fit with it; its state must be as before if that fails."""
    if kind is not AlterMOMACallback:
        kind(**{option: value})
        return
    callback = AlterMOMACallback(**{"modalities": MODALITIES, "schedule": OneShot(0), option: value})
    state = callback.state_dict()
    try:
        trainer(callback, max_epochs=1, limit_train_batches=1).fit(MODEL, loader(), loader(seed=1))
    finally:
        assert_same(callback.state_dict(), state)


def _texts(value: Any) -> list[str]:
    """How a message may quote a value; of containers also their parts."""
    parts = [*value, *getattr(value, "values", list)()] if isinstance(value, (dict, list, tuple)) else []
    empty = ["[]"] if value == {} else []
    return [repr(value), str(value), *empty, *(text for part in parts for text in _texts(part))]


def test_many_wrong_configurations_were_seen():
    assert sum(REFUSED.values()) >= 500


# Valid ones.


def criteria() -> Any:
    probes = {"num_probe_batches": st.integers(1, 2)}
    rate = st.floats(0, 0.01)
    beta = st.sampled_from([0, 1, 3.0, -1, 0.5, "auto"])
    altereva = st.builds(
        AlterEva,
        alpha=st.floats(0.1, 3),
        beta=beta,
        estimator=st.sampled_from(["difference", "reactivated"]),
        reduction=st.sampled_from(["mean_of_abs", "abs_of_mean"]),
        magnitude_share=st.floats(0, 1),
        combination=st.sampled_from(["subtract", "discount"]),
        redundancy_level=st.sampled_from(["weight", "tensor"]),
        normalization=st.sampled_from(["mean", "sum", "none"]),
        num_reactivation_steps=st.integers(0, 2),
        learning_rate=rate,
        optimizer=st.sampled_from(["sgd", "adam"]),
        gradient_clip=st.none() | st.floats(0.1, 10),
        noise=st.sampled_from(["suppressed", "as_is"]),
        second_probe=st.sampled_from(["same", "fresh"]),
        **probes,
    )
    simple = st.sampled_from([Magnitude(), Random()])
    first_order = st.builds(SNIP, **probes) | st.builds(Taylor, **probes) | st.builds(Wanda, **probes)
    grasp = st.builds(GraSP, hessian=st.sampled_from(["exact", "finite_difference"]), **probes)
    prospr = st.builds(
        ProsPr,
        order=st.sampled_from(["full", "first_order"]),
        num_steps=st.integers(1, 2),
        learning_rate=rate,
        momentum=st.floats(0, 0.9),
        new_batches=st.booleans(),
        **probes,
    )
    flow = st.builds(
        SynFlow,
        num_iterations=st.integers(1, 5),
        density=st.floats(0.01, 0.9),
        normalize_heads=st.booleans(),
        balance_modalities=st.booleans(),
    )
    return altereva | altereva | simple | first_order | grasp | prospr | flow


@st.composite
def valid(draw: Any) -> dict[str, Any]:
    scope = draw(st.sampled_from(["global", "modality", "layer", "row"]))
    share = st.floats(0, 0.95) | st.sampled_from([0, 0.0, 0.5, 0.25])
    each = st.fixed_dictionaries(dict.fromkeys(SIZES, share))
    options = {
        "modalities": draw(st.sampled_from([MODALITIES, {"camera": "camera", "lidar": ["lid*", "!head"]}])),
        "sparsity": draw(share | each if scope == "modality" else share),
        "criterion": draw(criteria()),
        "schedule": draw(
            st.sampled_from([OneShot(), Linear(0, 0), Cubic(0, 0, 5), Exponential(0, 0), Rewinding(1, 1, 0)])
            | st.sampled_from([OneShot(1), Linear(0, 1), Rewinding(2, 1, 0)])
        ),
        "scope": scope,
        "min_density": draw(st.sampled_from([0, 0.0, 0.01, 0.05]) | st.floats(0, 0.3)),
        "prunable": draw(st.sampled_from([None, [], ["head.weight"]])),
        "loader": draw(st.sampled_from(["auto", "validation", "training"])),
        "seed": draw(st.integers(0, 2**63 - 1)),
        "figures": draw(st.booleans()),
        "store_components": draw(st.booleans()),
        "name": draw(st.sampled_from([None, "one", "a-b_2"])),
        "on_nonfinite": draw(st.sampled_from(["raise", "skip"])),
    }
    assume(all(kept >= floor for kept, floor in expected(options).values()))
    return options


SHAPES = {name: tuple(MODEL.get_parameter(name).shape) for name in PRUNABLE}


def expected(options: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Of each scope: how many weights stay, and for how many of them floors provide."""
    sparsity, scope = options["sparsity"], options["scope"]
    floors = {name: _floor(math.prod(shape), options["min_density"]) for name, shape in SHAPES.items()}
    members = {"global": dict.fromkeys(PRUNABLE, "all"), "modality": GROUP}.get(
        scope, {n: n for n in PRUNABLE}
    )
    found = {}
    for label in set(members.values()):
        names = [name for name, own in members.items() if own == label]
        share = sparsity[label] if isinstance(sparsity, dict) else sparsity
        size = sum(math.prod(SHAPES[name]) for name in names)
        kept = size - round(share * size)
        if scope == "row":
            rows, columns = SHAPES[label]
            kept = rows * (columns - round(share * columns))
        found[label] = (kept, sum(floors[name] for name in names))
    return found


def labels(scope: str) -> dict[str, str]:
    """Parameter -> the scope within which its weights compete."""
    own = {name: name for name in PRUNABLE}
    return {"global": dict.fromkeys(PRUNABLE, "all"), "modality": GROUP}.get(scope, own)


def _floor(size: int, min_density: float) -> int:
    return max(1, math.ceil(round(min_density * size, 9))) if min_density > 0 else 0


RAN: list[int] = []


@settings(max_examples=520, **FUZZ)
@given(valid())
def test_a_valid_configuration_prunes_exactly(options):
    callback, module = AlterMOMACallback(**options), Fusion()
    epochs = options["schedule"].last_epoch + 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options_of_trainer = {"max_epochs": epochs, "limit_train_batches": 4, "barebones": True}
        trainer(callback, check_val_every_n_epoch=9, **options_of_trainer).fit(
            module, loader(), loader(seed=1)
        )
    kept: dict[str, int] = {}
    for name, mask in callback.masks.items():
        label = labels(options["scope"])[name]
        kept[label] = kept.get(label, 0) + int(mask.sum())
        assert int(mask.sum()) >= _floor(mask.numel(), options["min_density"])
        assert int(module.get_parameter(name)[~mask].count_nonzero()) == 0
        assert options["scope"] != "row" or len(set(mask.sum(1).tolist())) == 1
    assert kept == {label: count for label, (count, _) in expected(options).items()}
    RAN.append(len(callback.events))


def test_many_valid_configurations_ran():
    assert len(RAN) >= 500
