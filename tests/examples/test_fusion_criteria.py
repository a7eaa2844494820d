"""The baseline criteria on the example's camera-LiDAR model, with its geometry and losses."""

import pytest
import torch

from altermoma_pl import SNIP, Calibration, GraSP, ProsPr, SynFlow, Taylor, Wanda, top_k
from tests.helpers.fusion import make_batch, make_module

TOWERS = {"camera": ["model.encoders.camera"], "lidar": ["model.encoders.lidar"]}


def made(probe=make_batch, **changes):
    torch.manual_seed(0)
    return Calibration(
        make_module(),
        lambda module, batch: module.loss(batch)["loss"],
        [probe(5)],
        [make_batch(6), make_batch(7)],
        TOWERS,
        **changes,
    )


def total(flow, path):
    return flow[f"model.{path}.weight"].sum().item()


def test_synaptic_flow_reaches_every_weight_and_is_conserved():
    scale, flow = SynFlow().flow(made())
    assert scale == pytest.approx(3)  # heatmap, regression and map count the same
    for head in ("heads.object.heatmap", "heads.object.regression", "heads.map.1"):
        assert total(flow, head) == pytest.approx(1)
    assert total(flow, "fuser.0") == pytest.approx(3)
    camera, lidar = (
        total(flow, "encoders.camera.vtransform.smooth.0"),
        total(flow, "encoders.lidar.pillars.linear"),
    )
    assert camera + lidar == pytest.approx(3)
    # The context and the depth that lets it pass get the same, and both come from the features.
    assert total(flow, "encoders.camera.vtransform.depthnet") == pytest.approx(2 * camera)
    assert total(flow, "encoders.camera.backbone.stem.0") == pytest.approx(2 * camera)
    assert all(bool((f > 0).all()) for f in flow.values())


def test_synaptic_flow_sees_where_points_are_and_nothing_else_of_the_data():
    def repainted(seed):
        batch = make_batch(seed)
        boxes = batch.boxes + 0.1
        return batch._replace(image=255 - batch.image, boxes=boxes, segmentation=1 - batch.segmentation)

    def fewer(seed):
        batch = make_batch(seed)
        return batch._replace(points=batch.points[:60], point_frame=batch.point_frame[:60])

    flows = [SynFlow().flow(made(probe))[1] for probe in (make_batch, repainted, fewer)]
    assert all(torch.equal(f, flows[1][name]) for name, f in flows[0].items())
    every, some = (total(flows[index], "encoders.lidar.pillars.linear") for index in (0, 2))
    assert some < 0.9 * every


@pytest.mark.filterwarnings("ignore:.* batches were asked for, the loader has")
@pytest.mark.parametrize(
    "criterion",
    [
        SNIP(),
        Taylor(),
        GraSP(),
        GraSP(hessian="finite_difference"),
        ProsPr(order="full", momentum=0.9, num_steps=2),
        SynFlow(num_iterations=3, density=0.2),
        Wanda(),
    ],
    ids=str,
)
def test_every_weight_tensor_is_scored_and_the_model_is_left_alone(criterion):
    calibration = made()
    before = {name: tensor.clone() for name, tensor in calibration.model.state_dict().items()}
    scores = criterion.score(calibration)
    assert all(torch.equal(before[name], t) for name, t in calibration.model.state_dict().items())
    for name, score in scores.items():
        assert torch.isfinite(score).all()
        assert score.any(), name
    assert top_k(scores, 0.8).sparsity == pytest.approx(0.8, abs=1e-4)
