import math
import re
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from altermoma_pl.metrics import BEVIoU, CentreDistanceAP
from examples.data.batch import Batch
from examples.grid import BEVGrid
from examples.models.camera import LiftSplat, image_frustum, inverse
from examples.models.evaluate import evaluate, evaluate_views, update_metrics
from examples.models.fusion import SENSORS, FusionModel, FusionOutput
from examples.models.heads import ObjectMaps, decode, encode_boxes
from examples.models.lidar import Pillars
from examples.models.losses import gaussian_focal_loss, heatmap_target, object_loss
from examples.models.sizes import SIZES
from examples.models.views import NOISE, VIEWS, degrade_camera, drop_beams, drop_sensor

GRID = BEVGrid(x_min=0.0, x_max=12.8, y_min=-6.4, y_max=6.4)  # 16 x 16 cells
IMAGE = (32, 64)
FOCAL, CENTRE = 32.0, (32.0, 16.0)


def projection(position=(0.0, 0.0, 0.0)):
    """`lidar_to_image` of a camera at `position` that looks along x."""
    intrinsics = torch.tensor([[FOCAL, 0, CENTRE[0]], [0, FOCAL, CENTRE[1]], [0, 0, 1]])
    rotation = torch.tensor([[0.0, -1, 0], [0, 0, -1], [1, 0, 0]])  # right, down, forward
    a = intrinsics @ rotation
    return torch.cat([a, -a @ torch.tensor(position)[:, None]], dim=1)


def random_batch(frames=2, points=200, boxes=3, maps=2, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def uniform(count, low, high):
        low, high = torch.tensor(low), torch.tensor(high)
        return low + (high - low) * torch.rand(count, len(low), generator=generator)

    def integers(high, shape, dtype=torch.int64):
        return torch.randint(high, shape, generator=generator, dtype=dtype)

    low, high = [0.5, -6.0, -1.0, 1.0, 0.5, 1.0, -3.0], [12.0, 6.0, 1.0, 4.0, 2.0, 2.0, 3.0]
    return Batch(
        image=integers(256, (frames, 3, *IMAGE), torch.uint8),
        lidar_to_image=projection().expand(frames, 3, 4),
        points=uniform(frames * points, [0.0, -6.4, -2.0, 0.0], [12.8, 6.4, 2.0, 1.0]),
        point_frame=torch.arange(frames).repeat_interleave(points),
        boxes=uniform(frames * boxes, low, high),
        box_class=integers(3, (frames * boxes,)),
        box_frame=torch.arange(frames).repeat_interleave(boxes),
        segmentation=integers(2, (frames, maps, *GRID.shape), torch.uint8),
    )


def fusion(sensors=SENSORS, seed=0):
    torch.manual_seed(seed)
    return FusionModel(sensors, num_map_classes=2, image_size=IMAGE, grid=GRID)


@pytest.mark.parametrize("sensors", [("camera", "lidar"), ("camera",), ("lidar",)])
def test_output_shapes(sensors):
    model = fusion(sensors)
    output = model(random_batch())
    assert output.objects.heatmap.shape == (2, 3, 16, 16)
    assert output.objects.regression.shape == (2, 8, 16, 16)
    assert output.map_logits.shape == (2, 2, 16, 16)
    assert model.sensors == sensors


def test_module_names_are_those_of_the_modality_specification():
    model = fusion()
    for name in ("backbone", "neck", "vtransform"):
        assert list(model.get_submodule(f"encoders.camera.{name}").parameters())
    for name in ("encoders.lidar.pillars", "encoders.lidar.backbone", "fuser", "decoder"):
        assert list(model.get_submodule(name).parameters())
    assert set(model.heads) == {"object", "map"}


def test_backbones_hold_most_of_the_weights():
    model = FusionModel()
    backbones = sum(p.numel() for n, p in model.named_parameters() if ".backbone." in n)
    total = sum(p.numel() for p in model.parameters())
    assert backbones > 0.8 * total
    assert 0.8e6 < total < 1.5e6


@pytest.mark.parametrize("by_column", [True, False])
def test_lift_puts_a_pixel_into_its_cell(by_column):
    splat = LiftSplat(replace(SIZES["small"], by_column=by_column), IMAGE, GRID)
    depth = torch.zeros(2, splat.bins, 4, 8)
    context = torch.zeros(2, splat.channels, 4, 8)
    depth[1, 5, 1, 6] = 0.5  # bin 5: d = 1 + 5.5 = 6.5 m; pixel centre u = 52, v = 12
    context[1, :, 1, 6] = torch.arange(splat.channels)
    position = (0.2, 0.0, -0.1)
    # x = 6.5 + .2 = 6.7 -> cell 8; y = -(52 - 32) * 6.5 / 32 = -4.0625 -> cell 2.
    expected = torch.zeros(2, splat.channels, 16, 16)
    expected[1, :, 8, 2] = 0.5 * torch.arange(splat.channels)
    assert_close(splat.splat(depth, context, projection(position).expand(2, 3, 4)), expected)


@pytest.mark.parametrize("by_column", [True, False])
def test_lift_leaves_out_what_lies_outside(by_column):
    splat = LiftSplat(replace(SIZES["small"], by_column=by_column), IMAGE, GRID)
    depth, context = torch.ones(1, splat.bins, 4, 8), torch.ones(1, splat.channels, 4, 8)
    for far_away in ((20.0, 0.0, 0.0), (-20.0, 0.0, 0.0), (0.0, 30.0, 0.0), (0.0, 0.0, 20.0)):
        assert splat.splat(depth, context, projection(far_away)[None]).count_nonzero() == 0


def test_frustum_projects_back_onto_itself():
    frustum = image_frustum(IMAGE, bins=3, step=2.0)  # (3, 3, 4, 8)
    assert_close(frustum[2, :, 0, 0], torch.tensor([2.0, 4.0, 6.0]))
    assert_close(frustum[:2, 0, 0, 0] / frustum[2, 0, 0, 0], torch.tensor([4.0, 4.0]))
    assert_close(frustum[:2, -1, -1, -1] / frustum[2, -1, -1, -1], torch.tensor([60.0, 28.0]))


def test_frustum_is_neither_parameter_nor_saved():
    splat = LiftSplat(SIZES["small"], IMAGE, GRID)
    assert "frustum" in dict(splat.named_buffers())
    assert "frustum" not in splat.state_dict()


def test_point_falls_into_its_pillar():
    pillars = Pillars(SIZES["small"], GRID).eval()
    torch.nn.init.ones_(pillars.linear.weight)
    points = torch.tensor([[5.0, -1.0, 0.5, 0.3], [12.9, 0.0, 0.0, 1.0], [5.0, -6.5, 0.0, 1.0]])
    output = pillars(points, torch.tensor([1, 0, 0]), batch=2)
    assert output.shape == (2, SIZES["small"].pillar, 32, 32)
    # .4 m pillars: x = 5 -> 12, y = -1 + 6.4 -> 13; the other two points lie outside.
    assert (output[1, :, 12, 13] > 0).all()
    assert output.count_nonzero() == SIZES["small"].pillar


def test_pillar_takes_the_maximum_of_its_points():
    torch.manual_seed(0)
    pillars = Pillars(SIZES["small"], GRID).eval()
    points = torch.tensor([[5.0, -1.0, 0.5, 0.3], [5.1, -1.1, -0.5, 0.9]])
    cells = (points[:, :2] + torch.tensor([0.0, 6.4])) / 0.4
    index = torch.tensor([12 * 32 + 13] * 2)
    features = pillars.describe(points, cells, index, batch=1)
    assert_close(features[:, 4:7], torch.tensor([[-0.05, 0.05, 0.5], [0.05, -0.05, -0.5]]))
    assert_close(features[:, 7:], torch.tensor([[0.0, 0.0], [0.25, -0.25]]), atol=1e-5, rtol=0)
    expected = pillars.norm(pillars.linear(features)).relu().amax(dim=0)
    output = pillars(points, torch.zeros(2, dtype=torch.int64), batch=1)
    assert_close(output[0, :, 12, 13], expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("points", [0, 1])
@pytest.mark.parametrize("boxes", [0, 1])
def test_empty_frames_stay_finite(training, points, boxes):
    model = fusion().train(training)
    batch = random_batch()
    batch = batch._replace(
        points=batch.points[:points],
        point_frame=batch.point_frame[:points],
        boxes=batch.boxes[:boxes],
        box_class=batch.box_class[:boxes],
        box_frame=batch.box_frame[:boxes],
    )
    loss = model.loss(model(batch), batch)["loss"]
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def targets_as_maps(batch):
    """What a perfect object head would predict."""
    cells = (batch.boxes[:, :2] + torch.tensor([0.0, 6.4])) / GRID.cell
    frames, num_classes = len(batch.image), 3
    index = batch.box_frame * num_classes + batch.box_class
    shape = (frames * num_classes, *GRID.shape)
    heatmap = heatmap_target(cells, torch.full((len(cells),), 2.0), index, shape)
    regression = torch.zeros(frames, 8, *GRID.shape)
    ix, iy = cells.long().unbind(1)
    regression[batch.box_frame, :, ix, iy] = encode_boxes(batch.boxes, cells)
    return ObjectMaps(heatmap.logit(eps=1e-6).view(frames, num_classes, *GRID.shape), regression)


def test_decoding_the_encoded_boxes_returns_them():
    boxes = torch.tensor(
        [
            [3.1, -2.0, -0.6, 4.2, 1.7, 1.5, 0.3],
            [9.9, 5.7, 0.2, 0.6, 0.7, 1.8, -3.0],
            [6.0, 0.1, 0.0, 1.8, 0.6, 1.7, math.pi / 2],
        ]
    )
    batch = random_batch(boxes=0)._replace(
        boxes=boxes, box_class=torch.tensor([0, 1, 2]), box_frame=torch.tensor([0, 1, 1])
    )
    found = decode(targets_as_maps(batch), GRID, min_score=0.9)
    order = found.classes.argsort()
    assert_close(found.boxes[order], boxes, atol=1e-5, rtol=0)
    assert found.classes[order].tolist() == [0, 1, 2]
    assert found.frames[order].tolist() == [0, 1, 1]
    assert (found.scores > 0.99).all()


def test_decode_keeps_the_best_top_k_of_each_frame():
    heatmap = torch.full((2, 1, 16, 16), -9.0)
    heatmap[0, 0, 2, 2], heatmap[0, 0, 8, 8], heatmap[1, 0, 4, 4] = 1.0, 2.0, 0.0
    found = decode(ObjectMaps(heatmap, torch.zeros(2, 8, 16, 16)), GRID, top_k=1)
    assert found.frames.tolist() == [0, 1]
    assert_close(found.scores, torch.tensor([2.0, 0.0]).sigmoid())
    assert_close(found.boxes[0, :2], torch.tensor([6.8, 0.4]))  # the centre of cell (8, 8)


def test_heatmap_target_by_hand():
    cells, radius = torch.tensor([[4.7, 5.2]]), torch.tensor([2.0])
    target = heatmap_target(cells, radius, torch.tensor([1]), (2, 16, 16))
    assert target[0].count_nonzero() == 0
    assert target[1, 4, 5] == 1
    # sigma = (2 * 2 + 1) / 6, so one cell away it is exp(-1 / (2 * 25 / 36)).
    assert_close(target[1, 5, 5].item(), math.exp(-0.72), rtol=1e-5, atol=0)


def test_focal_loss_by_hand():
    logits, target = torch.zeros(2), torch.tensor([1.0, 0.5])
    # (1 - .5)^2 * log 2 at the peak and .5^4 * .5^2 * log 2 beside it.
    expected = torch.tensor((0.25 + 0.0625 * 0.25) * math.log(2))
    assert_close(gaussian_focal_loss(logits, target, num_positives=1), expected)
    assert_close(gaussian_focal_loss(logits, target, num_positives=2), expected / 2)
    assert_close(gaussian_focal_loss(logits, target, num_positives=0), expected)


def test_perfect_maps_have_no_regression_loss_and_boxes_outside_do_not_count():
    batch = random_batch(boxes=1)
    maps = targets_as_maps(batch)
    inside = object_loss(maps, batch.boxes, batch.box_class, batch.box_frame, GRID)
    assert_close(inside["regression"], torch.tensor(0.0), atol=1e-5, rtol=0)
    outside = batch.boxes[:1] + torch.tensor([50.0, 0, 0, 0, 0, 0, 0])
    with_outside = object_loss(
        maps,
        torch.cat([batch.boxes, outside]),
        torch.cat([batch.box_class, batch.box_class[:1]]),
        torch.cat([batch.box_frame, batch.box_frame[:1]]),
        GRID,
    )
    assert_close(with_outside, inside)


def test_perfect_output_scores_one():
    batch = random_batch(boxes=1)
    output = FusionOutput(targets_as_maps(batch), 20.0 * batch.segmentation - 10.0)
    iou, ap = BEVIoU(2), CentreDistanceAP(3)
    outside = torch.tensor([[50.0, 0, 0, 1, 1, 1, 0]])  # beyond the grid: nobody can find it
    batch = batch._replace(
        boxes=torch.cat([batch.boxes, outside]),
        box_class=torch.cat([batch.box_class, torch.tensor([0])]),
        box_frame=torch.cat([batch.box_frame, torch.tensor([0])]),
    )
    update_metrics(fusion(), output, batch, iou, ap)
    assert_close(iou.compute(), torch.tensor(1.0))
    assert_close(ap.compute(), torch.tensor(1.0))


def test_loss_falls_on_one_batch():
    model, batch = fusion(), random_batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = model.loss(model(batch), batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("sensor", SENSORS)
def test_zeroed_encoder_keeps_loss_and_gradients_finite(sensor):
    model, batch = fusion(), random_batch()
    with torch.no_grad():
        for parameter in model.encoders[sensor].parameters():
            parameter.zero_()
    losses = model.loss(model(batch), batch)
    losses["loss"].backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.grad.isfinite().all() for p in model.parameters())
    backbone = model.encoders[sensor].backbone
    assert all(p.grad.count_nonzero() == 0 for p in backbone.parameters())
    other = model.encoders[SENSORS[1 - SENSORS.index(sensor)]].backbone
    assert all(p.grad.count_nonzero() > 0 for p in other.parameters())


def test_mixed_precision_loss_is_close_and_float32():
    model, batch = fusion(), random_batch()
    expected = model.loss(model(batch), batch)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.loss(model(batch), batch)
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    assert_close(losses["loss"], expected["loss"], rtol=0.05, atol=0)


@pytest.mark.parametrize("sensor", SENSORS)
def test_single_sensor_encoder_fits_the_fusion_model(sensor):
    single, both = fusion([sensor], seed=1), fusion()
    both.encoders[sensor].load_state_dict(single.encoders[sensor].state_dict())
    for name, value in single.encoders.state_dict().items():
        assert torch.equal(both.encoders.state_dict()[name], value)


def test_evaluate_drops_a_sensor_and_restores_train_flags():
    model = fusion().train()
    model.fuser.eval()
    flags = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batches = [random_batch(seed=1), random_batch(seed=2)]
    for view in VIEWS:
        values = evaluate(model, batches, view)
        assert set(values) == {"miou", "ap"}
        assert all(0 <= value <= 1 for value in values.values())
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_evaluate_with_a_dropped_sensor_equals_evaluating_without_its_data():
    model, batch = fusion(), random_batch()
    black = batch._replace(image=torch.zeros_like(batch.image))
    assert evaluate(model, [batch], "camera dropped") == evaluate(model, [black])
    blind = batch._replace(points=batch.points[:0], point_frame=batch.point_frame[:0])
    assert evaluate(model, [batch], "LiDAR dropped") == evaluate(model, [blind])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sensors": []}, "sensors must be one or both of ('camera', 'lidar'), got ()."),
        ({"sensors": ["radar"]}, "one or both of ('camera', 'lidar'), got ('radar',)."),
        ({"sensors": ["camera", "camera"]}, "got ('camera', 'camera')."),
        ({"size": "huge"}, "size must be one of ('tiny', 'small', 'medium', 'large'), got 'huge'."),
        ({"num_map_classes": 0}, "must be at least 1, got 3 and 0."),
        ({"image_size": (90, 320)}, "must be multiples of 16 (height, width), got (90, 320)."),
    ],
)
def test_refused_arguments(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        FusionModel(**arguments)


def test_refused_inputs():
    batch = random_batch()
    with pytest.raises(ValueError, match=re.escape("for images of (32, 64) (height, width), got")):
        fusion()(batch._replace(image=batch.image[..., :48]))
    with pytest.raises(ValueError, match=re.escape("one of ('camera', 'lidar'), got 'radar'.")):
        drop_sensor(batch, "radar")
    with pytest.raises(ValueError, match=re.escape(f"view must be one of {tuple(VIEWS)}, got 'radar'.")):
        evaluate(fusion(), [batch], "radar")
    lidar = fusion(["lidar"])
    with pytest.raises(
        ValueError, match=re.escape("needs the sensor 'camera', but the model has ('lidar',).")
    ):
        lidar.depth_loss(lidar(batch), batch)


def test_views_are_evaluated_as_one_by_one():
    model, batches = fusion(), (random_batch(seed=seed) for seed in (1, 2))
    values = evaluate_views(model, batches, ["both", "beams dropped"])  # from an iterator: read once
    again = [random_batch(seed=seed) for seed in (1, 2)]
    assert values == {view: evaluate(model, again, view) for view in ("both", "beams dropped")}


def test_degraded_images_are_dark_and_noisy_whatever_the_batch():
    batch = random_batch()._replace(image=torch.full((2, 3, *IMAGE), 200, dtype=torch.uint8))
    degraded = degrade_camera(batch).image
    assert degraded.float().mean() == pytest.approx(60, abs=3)  # 0.3 * 200, barely clipped
    assert degraded.float().std() == pytest.approx(NOISE, rel=0.15)
    frame = random_batch()
    both, second = degrade_camera(frame), degrade_camera(frame._replace(image=frame.image[1:]))
    assert torch.equal(both.image[1:], second.image)
    assert not torch.equal(both.image, degrade_camera(frame, seed=1).image)


def test_one_ring_in_four_is_kept():
    elevation = -0.42 + 0.46 / 32 * (torch.arange(32) + 0.5)  # one point in the middle of each ring
    points = torch.stack([elevation.cos() * 7, 0 * elevation, elevation.sin() * 7, elevation], dim=1)
    frames = torch.arange(32) % 2
    batch = drop_beams(random_batch()._replace(points=points, point_frame=frames))
    assert torch.equal(batch.points, points[::4])
    assert torch.equal(batch.point_frame, frames[::4])


def test_summing_columns_first_changes_nothing_under_a_level_camera():
    splat = LiftSplat(replace(SIZES["small"], by_column=False), IMAGE, GRID)
    torch.manual_seed(0)
    depth, context = splat.lift(torch.randn(2, SIZES["small"].neck, 4, 8))
    view = torch.stack([projection(), projection((-0.5, 0.3, 0.2))])
    expected = splat.splat(depth, context, view)
    splat.by_column = True
    assert_close(splat.splat(depth, context, view), expected)
    assert expected.abs().max() > 0


@pytest.mark.parametrize("by_column", [True, False])
def test_lift_finds_the_same_cells_in_half_precision(by_column):
    splat = LiftSplat(replace(SIZES["small"], by_column=by_column), IMAGE, GRID)
    depth, context = torch.rand(1, splat.bins, 4, 8), torch.rand(1, splat.channels, 4, 8)
    view = projection()[None]
    expected = splat.splat(depth, context, view)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(splat.splat(depth, context, view), expected)


def test_depth_loss_by_hand():
    splat = LiftSplat(SIZES["small"], IMAGE, GRID)  # bins of 1 m from 1 m on, pixels of 8 x 8
    depth = torch.full((2, splat.bins, 4, 8), 0.01)
    depth[1, 3, 2, 4] = 0.5  # frame 1, 4 to 5 m ahead, where the camera looks
    points = torch.tensor([[4.5, 0.0, 0.0, 0], [4.5, 0.0, 0.0, 0], [-3, 0, 0, 0], [4.5, 50.0, 0, 0]])
    batch = random_batch()._replace(points=points, point_frame=torch.tensor([1, 0, 1, 1]))
    # Those behind the camera and beside the image do not count.
    expected = -(math.log(0.5) + math.log(0.01)) / 2
    assert_close(splat.depth_loss(depth, batch), torch.tensor(expected))
    assert splat.depth_loss(depth, drop_sensor(batch, "lidar")) == 0


def test_the_tiny_model_is_mostly_branches_and_lifts_at_stride_4():
    model = FusionModel(size="tiny", num_map_classes=5, image_size=(48, 160), grid=GRID)
    weights = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert weights["encoders"] > 0.8 * sum(weights.values())
    batch = random_batch()._replace(image=torch.zeros(2, 3, 48, 160, dtype=torch.uint8))
    assert model(batch).depth.shape == (2, 12, 12, 40)  # 1 to 12.8 m in steps of 1 m


def test_inverse_is_that_of_linear_algebra():
    generator = torch.Generator().manual_seed(0)
    rotations = torch.linalg.qr(torch.randn(20, 3, 3, generator=generator)).Q
    intrinsics = torch.tensor([[707.0, 0, 604], [0, 707, 180], [0, 0, 1]])  # as KITTI's, pixels
    matrices = torch.cat([intrinsics @ rotations, projection()[None, :, :3]])
    expected = torch.linalg.inv(matrices.double())
    error = (inverse(matrices).double() - expected).abs().amax((1, 2)) / expected.abs().amax((1, 2))
    assert error.max() < 1e-5


def with_points_outside(batch):
    outside = torch.tensor([[-5.0, 0, 0, 0.5], [40, 0, 0, 0.5], [3, 1e30, 0, 0.5], [float("nan")] * 4])
    return batch._replace(
        points=torch.cat([outside, batch.points]),
        point_frame=torch.cat([torch.tensor([0, 1, 0, 1]), batch.point_frame]),
    )


@pytest.mark.parametrize("training", [True, False])
def test_points_outside_change_neither_maps_nor_gradients_nor_statistics(training):
    outputs, gradients, statistics = [], [], []
    for batch in (random_batch(), with_points_outside(random_batch())):
        model = fusion(("lidar",)).train(training)
        output = model(batch)
        output.map_logits.square().sum().backward()
        outputs.append(output.map_logits)
        gradients.append([parameter.grad for parameter in model.encoders.parameters()])
        statistics.append(model.encoders["lidar"].pillars.norm.running_mean)
    assert_close(outputs[0], outputs[1])
    assert_close(gradients[0], gradients[1])
    assert_close(statistics[0], statistics[1])


def test_training_and_eval_give_the_same_pillars_where_the_norm_is_the_same():
    pillars = fusion(("lidar",)).encoders["lidar"].pillars
    batch = with_points_outside(random_batch())
    pillars.norm.eval()
    in_training = pillars(batch.points, batch.point_frame, 2)
    in_eval = pillars.eval()(batch.points, batch.point_frame, 2)
    assert in_eval.count_nonzero() > 100
    assert_close(in_training, in_eval)
