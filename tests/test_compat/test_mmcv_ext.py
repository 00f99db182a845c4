"""The stand-in for ``mmcv._ext``, seen through mmcv's own wrappers."""

import importlib
import importlib.util
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import clustr_mm
from clustr_mm.compat import activate, mmcv_ops_are_stand_in
from clustr_mm.compat.finder import StandInFinder

pytest.importorskip('mmcv')
ops = importlib.import_module('mmcv.ops')
ext = importlib.import_module('mmcv._ext')

stand_in_only = pytest.mark.skipif(
    not mmcv_ops_are_stand_in(),
    reason='the compiled mmcv is installed, which decides this in its own way',
)
no_compiled_cpu_kernel = pytest.mark.skipif(
    not mmcv_ops_are_stand_in(),
    reason='the compiled mmcv has no CPU kernel for this operator or dtype',
)


def run_python(code: str, path: Path | None = None) -> str:
    """Run code in a fresh interpreter and return what it wrote to both streams."""
    folders = [path, Path(clustr_mm.__file__).parents[1], os.environ.get('PYTHONPATH')]
    environment = dict(
        os.environ, PYTHONPATH=os.pathsep.join(str(f) for f in folders if f)
    )
    result = subprocess.run(
        [sys.executable, '-c', code],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


def random_tensor(*shape: int, seed: int = 0, dtype=torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def random_boxes(count: int, seed: int = 0, size: float = 40.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * size
    extent = torch.rand(count, 2, generator=generator) * size / 2 + 1
    return torch.cat((corner, corner + extent), dim=1)


def random_scores(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1000)
    return (torch.randperm(count, generator=generator) + 1) / (count + 1)


def iou(a: list[float], b: list[float], offset: int) -> float:
    width = max(min(a[2], b[2]) - max(a[0], b[0]) + offset, 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]) + offset, 0)
    area_a = (a[2] - a[0] + offset) * (a[3] - a[1] + offset)
    area_b = (b[2] - b[0] + offset) * (b[3] - b[1] + offset)
    union = area_a + area_b - width * height
    return width * height / union if union else 0.0


def reference_nms(
    boxes: Tensor, scores: Tensor, threshold: float, offset: int = 0
) -> list[int]:
    corners, kept = boxes.tolist(), []
    for i in scores.argsort(descending=True).tolist():
        if all(iou(corners[i], corners[j], offset) <= threshold for j in kept):
            kept.append(i)
    return kept


def assert_accumulates(gradient: Tensor, call) -> None:
    """Check that ``call(buffer)`` adds ``gradient`` to the buffer it is given."""
    buffer = torch.full_like(gradient, 5.0)
    call(buffer)
    torch.testing.assert_close(buffer, gradient + 5)


# Suppression of boxes


@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('threshold', [0.1, 0.3, 0.55])
@pytest.mark.parametrize('seed', [0, 1])
def test_nms(seed, threshold, offset):
    boxes, scores = random_boxes(60, seed), random_scores(60, seed)
    dets, kept = ops.nms(boxes, scores, threshold, offset=offset)
    assert kept.tolist() == reference_nms(boxes, scores, threshold, offset)
    assert 0 < len(kept) < 60
    torch.testing.assert_close(dets, torch.cat((boxes, scores[:, None]), 1)[kept])


def test_nms_offset_decides():
    # The IoU is 4 / 14 without the offset and 9 / 23 with it.
    boxes = torch.tensor([[0.0, 0.0, 3.0, 3.0], [1.0, 1.0, 4.0, 4.0]])
    scores = torch.tensor([0.9, 0.8])
    assert ops.nms(boxes, scores, 0.33, offset=0)[1].tolist() == [0, 1]
    assert ops.nms(boxes, scores, 0.33, offset=1)[1].tolist() == [0]


def test_nms_threshold_has_single_precision():
    # The IoU is 0.6 rounded to float32, which is greater than the double 0.6.
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 6.0]])
    scores = torch.tensor([0.9, 0.8])
    assert ops.nms(boxes, scores, 0.6)[1].tolist() == [0, 1]


def test_nms_score_threshold_and_max_num():
    boxes, scores = random_boxes(40), random_scores(40)
    expected = [i for i in reference_nms(boxes, scores, 0.3) if scores[i] > 0.5]
    kept = ops.nms(boxes, scores, 0.3, score_threshold=0.5)[1]
    assert kept.tolist() == expected
    kept = ops.nms(boxes, scores, 0.3, score_threshold=0.5, max_num=3)[1]
    assert kept.tolist() == expected[:3]


def test_nms_numpy():
    boxes, scores = random_boxes(20), random_scores(20)
    dets, kept = ops.nms(boxes.numpy(), scores.numpy(), 0.3)
    assert isinstance(dets, np.ndarray)
    assert kept.tolist() == reference_nms(boxes, scores, 0.3)


@pytest.mark.parametrize('offset', [0, 1])
def test_nms_without_boxes(offset):
    dets, kept = ops.nms(torch.zeros(0, 4), torch.zeros(0), 0.5, offset=offset)
    assert dets.shape == (0, 5)
    assert kept.shape == (0,) and kept.dtype == torch.int64


@no_compiled_cpu_kernel
@pytest.mark.parametrize(
    'box_dtype, score_dtype',
    [
        (torch.half, torch.half),
        (torch.bfloat16, torch.bfloat16),
        (torch.half, torch.float32),
        (torch.float32, torch.float64),
    ],
)
def test_nms_dtypes(box_dtype, score_dtype):
    boxes = random_boxes(30).round().to(box_dtype)
    scores = random_scores(30).to(score_dtype)
    kept = ops.nms(boxes, scores, 0.37)[1]
    assert kept.tolist() == reference_nms(boxes, scores, 0.37)


@pytest.mark.parametrize('class_agnostic', [False, True])
@pytest.mark.parametrize('split_threshold', [10000, 10])
def test_batched_nms(class_agnostic, split_threshold):
    boxes, scores = random_boxes(60), random_scores(60)
    classes = torch.arange(60) % 3
    config = dict(type='nms', iou_threshold=0.3, split_thr=split_threshold)
    dets, kept = ops.batched_nms(boxes, scores, classes, config, class_agnostic)

    if class_agnostic and split_threshold > 60:
        expected = reference_nms(boxes, scores, 0.3)
    else:
        expected = []
        for label in range(3):
            index = (classes == label).nonzero()[:, 0]
            kept_here = reference_nms(boxes[index], scores[index], 0.3)
            expected += index[kept_here].tolist()
        expected.sort(key=lambda i: -scores[i])
    assert kept.tolist() == expected
    torch.testing.assert_close(dets, torch.cat((boxes, scores[:, None]), 1)[kept])


def test_batched_nms_without_boxes():
    dets, kept = ops.batched_nms(
        torch.zeros(0, 4),
        torch.zeros(0),
        torch.zeros(0, dtype=torch.long),
        dict(type='nms', iou_threshold=0.5),
        class_agnostic=True,
    )
    assert dets.shape == (0, 5) and kept.shape == (0,)


def reference_soft_nms(boxes, scores, threshold, sigma, min_score, method, offset):
    corners, left = boxes.tolist(), dict(enumerate(scores.tolist()))
    kept = []
    while left:
        best = max(left, key=left.get)
        kept.append((best, left.pop(best)))
        for i in list(left):
            overlap = iou(corners[i], corners[best], offset)
            if method == 'gaussian':
                left[i] *= math.exp(-(overlap**2) / sigma)
            elif overlap >= threshold:
                left[i] *= 1 - overlap if method == 'linear' else 0
            if left[i] < min_score:
                del left[i]
    return kept


@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('method', ['naive', 'linear', 'gaussian'])
def test_soft_nms(method, offset):
    boxes, scores = random_boxes(40), random_scores(40)
    before = boxes.clone(), scores.clone()
    dets, kept = ops.soft_nms(
        boxes, scores, 0.2, sigma=0.4, min_score=0.1, method=method, offset=offset
    )
    expected = reference_soft_nms(boxes, scores, 0.2, 0.4, 0.1, method, offset)
    assert kept.tolist() == [i for i, _ in expected]
    assert 0 < len(kept) < 40
    assert torch.equal(dets[:, :4], boxes[kept])
    torch.testing.assert_close(dets[:, 4], torch.tensor([s for _, s in expected]))
    assert torch.equal(boxes, before[0]) and torch.equal(scores, before[1])


@pytest.mark.parametrize(
    'method', ['linear', pytest.param('gaussian', marks=stand_in_only)]
)
def test_soft_nms_boxes_without_area(method):
    boxes = torch.tensor([[4.0, 3, 5, 3], [4, 3, 5, 4]] + [[3.0, 1, 3, 1]] * 4)
    scores = torch.tensor([0.9, 0.8, 0.5, 0.4, 0.3, 0.0])
    dets, kept = ops.soft_nms(boxes, scores, 0.6, method=method)
    assert kept.tolist() == [0, 1, 2, 3, 4]
    torch.testing.assert_close(dets[:, 4], scores[:5])


def test_soft_nms_without_boxes():
    dets, kept = ops.soft_nms(torch.zeros(0, 4), torch.zeros(0))
    assert dets.shape == (0, 5) and kept.shape == (0,)


# Pooling of regions


def sample_inside(image: Tensor, y: float, x: float) -> Tensor:
    """Sample (C, H, W) bilinearly; positions just outside take the edge's value."""
    height, width = image.shape[1:]
    if y < -1 or y > height or x < -1 or x > width:
        return image.new_zeros(image.shape[0])
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    down, across = y - top, x - left
    return (
        image[:, top, left] * (1 - down) * (1 - across)
        + image[:, top, right] * (1 - down) * across
        + image[:, bottom, left] * down * (1 - across)
        + image[:, bottom, right] * down * across
    )


def reference_roi_align(input, rois, size, scale, ratio, aligned) -> Tensor:
    pooled = []
    for image, *corners in rois.tolist():
        x1, y1, x2, y2 = (c * scale - (0.5 if aligned else 0) for c in corners)
        width, height = x2 - x1, y2 - y1
        if not aligned:
            width, height = max(width, 1), max(height, 1)
        step_y, step_x = height / size[0], width / size[1]
        samples_y = ratio or math.ceil(step_y)
        samples_x = ratio or math.ceil(step_x)
        for row in range(size[0]):
            for col in range(size[1]):
                total = input.new_zeros(input.shape[1])
                for i in range(samples_y):
                    for j in range(samples_x):
                        y = y1 + (row + (i + 0.5) / samples_y) * step_y
                        x = x1 + (col + (j + 0.5) / samples_x) * step_x
                        total = total + sample_inside(input[int(image)], y, x)
                pooled.append(total / max(samples_y * samples_x, 1))
    return torch.stack(pooled).view(len(rois), *size, -1).permute(0, 3, 1, 2)


# The last three reach over the border, have no area and are smaller than a pixel.
ROIS = torch.tensor(
    [
        [0.0, 1.3, 2.2, 9.7, 11.4],
        [1.0, 0.0, 0.0, 16.0, 13.0],
        [1.0, 3.1, 0.4, 14.9, 4.6],
        [0.0, -5.0, 6.0, 30.0, 25.0],
        [0.0, 4.0, 4.0, 4.0, 9.0],
        [1.0, 6.2, 6.4, 6.7, 6.9],
    ],
    dtype=torch.float64,
)


@pytest.mark.parametrize('aligned', [True, False])
@pytest.mark.parametrize('ratio', [0, 1, 3])
@pytest.mark.parametrize('scale', [0.5, 1.0])
def test_roi_align(scale, ratio, aligned):
    input = random_tensor(2, 3, 7, 9).requires_grad_()
    layer = ops.RoIAlign((2, 3), scale, ratio, aligned=aligned)
    output = layer(input, ROIS)
    expected = reference_roi_align(input, ROIS, (2, 3), scale, ratio, aligned)
    torch.testing.assert_close(output, expected)

    weight = random_tensor(*output.shape, seed=1)
    (gradient,) = torch.autograd.grad(output, input, weight)
    torch.testing.assert_close(
        gradient, torch.autograd.grad(expected, input, weight)[0]
    )


def test_roi_align_arguments_by_position():
    input = random_tensor(2, 3, 7, 9)
    output = ops.roi_align(input, ROIS, 2, 0.25, 2, 'avg', False)
    expected = reference_roi_align(input, ROIS, (2, 2), 0.25, 2, False)
    torch.testing.assert_close(output, expected)


@no_compiled_cpu_kernel
@pytest.mark.parametrize('dtype', [torch.half, torch.bfloat16])
def test_roi_align_half(dtype):
    input = random_tensor(2, 3, 7, 9, dtype=dtype).requires_grad_()
    rois = ROIS.to(dtype)
    output = ops.roi_align(input, rois, (2, 3), 0.5, 2, 'avg', True)
    exact = input.detach().double().requires_grad_()
    expected = reference_roi_align(exact, rois, (2, 3), 0.5, 2, True)
    torch.testing.assert_close(output, expected.to(dtype))

    weight = random_tensor(*output.shape, seed=1, dtype=dtype)
    (gradient,) = torch.autograd.grad(output, input, weight)
    (exact_gradient,) = torch.autograd.grad(expected, exact, weight.double())
    torch.testing.assert_close(gradient, exact_gradient.to(dtype))


def test_roi_align_without_rois():
    input = random_tensor(2, 3, 7, 9).requires_grad_()
    output = ops.RoIAlign((2, 3))(input, ROIS[:0])
    assert output.shape == (0, 3, 2, 3)
    (gradient,) = torch.autograd.grad(output.sum(), input)
    assert torch.equal(gradient, torch.zeros_like(input))


def test_roi_align_backward_accumulates():
    weight, empty = random_tensor(6, 3, 2, 3), torch.zeros(0, dtype=torch.float64)
    input = random_tensor(2, 3, 7, 9).requires_grad_()
    expected = reference_roi_align(input, ROIS, (2, 3), 0.5, 2, True)
    (gradient,) = torch.autograd.grad(expected, input, weight)

    def call(buffer):
        ext.roi_align_backward(
            weight,
            ROIS,
            empty,
            empty,
            buffer,
            aligned_height=2,
            aligned_width=3,
            spatial_scale=0.5,
            sampling_ratio=2,
            pool_mode=1,
            aligned=True,
        )

    assert_accumulates(gradient, call)


@stand_in_only
def test_roi_align_maximum_is_not_offered():
    layer = ops.RoIAlign((2, 3), pool_mode='max')
    with pytest.raises(NotImplementedError, match='roi_align_forward.*max'):
        layer(random_tensor(2, 3, 7, 9), ROIS)
    empty = torch.zeros(0)
    with pytest.raises(NotImplementedError, match='roi_align_backward.*max'):
        ext.roi_align_backward(*[empty] * 5, 2, 3, 1.0, 0, pool_mode=0, aligned=True)


def reference_roi_pool(input, rois, size, scale) -> Tensor:
    height, width = input.shape[2:]
    pooled = []
    for image, *corners in rois.tolist():
        x1, y1 = corners[0] * scale, corners[1] * scale
        step_x = ((corners[2] + 1) * scale - x1) / size[1]
        step_y = ((corners[3] + 1) * scale - y1) / size[0]
        for row in range(size[0]):
            top = max(math.floor(y1 + row * step_y), 0)
            bottom = min(math.ceil(y1 + (row + 1) * step_y), height)
            for col in range(size[1]):
                left = max(math.floor(x1 + col * step_x), 0)
                right = min(math.ceil(x1 + (col + 1) * step_x), width)
                pixels = [
                    input[int(image), :, y, x]
                    for y in range(top, bottom)
                    for x in range(left, right)
                ]
                zeros = input.new_zeros(input.shape[1])
                pooled.append(torch.stack(pixels).amax(dim=0) if pixels else zeros)
    return torch.stack(pooled).view(len(rois), *size, -1).permute(0, 3, 1, 2)


@no_compiled_cpu_kernel
@pytest.mark.parametrize('scale', [0.25, 0.5, 1.0])
@pytest.mark.parametrize(
    'dtype', [torch.float64, torch.float32, torch.half, torch.bfloat16]
)
def test_roi_pool(scale, dtype):
    # All values differ, in bfloat16 too, so that the maxima have one place each.
    order = torch.randperm(2 * 63, generator=torch.Generator().manual_seed(0)) - 60
    input = torch.stack((order, -order)).view(2, 2, 7, 9).to(dtype).requires_grad_()
    rois = (ROIS * 4).round().div(4).to(dtype)
    output = ops.RoIPool((2, 3), scale)(input, rois)
    expected = reference_roi_pool(input, rois, (2, 3), scale)
    torch.testing.assert_close(output, expected)

    weight = random_tensor(*output.shape, seed=1).round().to(dtype)
    (gradient,) = torch.autograd.grad(output, input, weight)
    torch.testing.assert_close(
        gradient, torch.autograd.grad(expected, input, weight)[0]
    )


@no_compiled_cpu_kernel
def test_roi_pool_ties_go_to_the_first_pixel():
    input = torch.zeros(1, 1, 4, 4, requires_grad=True)
    roi = torch.tensor([[0.0, 1, 1, 3, 3]])
    ops.roi_pool(input, roi, 1).sum().backward()
    assert input.grad.nonzero().tolist() == [[0, 0, 1, 1]]


@no_compiled_cpu_kernel
def test_roi_pool_empty_bins_pass_nothing_back():
    input = torch.ones(1, 2, 4, 4, requires_grad=True)
    # The first is outside; the second is inverted, but covers pixels when rounded.
    rois = torch.tensor([[0.0, 9, 9, 12, 12], [0.0, 2.5, 2.5, 1.4, 1.4]])
    output = ops.roi_pool(input, rois, 2)
    assert torch.equal(output, torch.zeros(2, 2, 2, 2))
    output.sum().backward()
    assert torch.equal(input.grad, torch.zeros_like(input))


@no_compiled_cpu_kernel
def test_roi_pool_without_rois():
    input = torch.ones(1, 2, 4, 4, requires_grad=True)
    output = ops.roi_pool(input, torch.zeros(0, 5), 2)
    assert output.shape == (0, 2, 2, 2)
    output.sum().backward()
    assert torch.equal(input.grad, torch.zeros_like(input))


# Focal loss


def reference_focal_loss(input, target, gamma, alpha, weight=None) -> Tensor:
    rows = []
    for logits, label in zip(input, target.tolist(), strict=True):
        losses = []
        for index, logit in enumerate(logits):
            p = 1 / (1 + torch.exp(-logit))
            if index == label:
                losses.append(-alpha * (1 - p) ** gamma * torch.log(p))
            else:
                losses.append(-(1 - alpha) * p**gamma * torch.log(1 - p))
        known = weight is not None and label < len(weight)
        rows.append(torch.stack(losses) * (weight[label] if known else 1))
    return torch.stack(rows)


@no_compiled_cpu_kernel
@pytest.mark.parametrize('reduction', ['none', 'mean', 'sum'])
@pytest.mark.parametrize('weighted', [False, True])
@pytest.mark.parametrize('gamma, alpha', [(2.0, 0.25), (0.0, 0.6), (1.5, 0.9)])
def test_sigmoid_focal_loss(gamma, alpha, weighted, reduction):
    input = (random_tensor(7, 4) * 3).requires_grad_()
    # Class 4 is the background.
    target = torch.tensor([0, 4, 1, 3, 4, 2, 0])
    weight = torch.tensor([0.5, 2.0, 1.5, 3.0]).double() if weighted else None
    loss = ops.sigmoid_focal_loss(input, target, gamma, alpha, weight, reduction)
    expected = reference_focal_loss(input, target, gamma, alpha, weight)
    if reduction != 'none':
        expected = expected.sum() / (7 if reduction == 'mean' else 1)
    torch.testing.assert_close(loss, expected)

    scale = random_tensor(*loss.shape, seed=1)
    (gradient,) = torch.autograd.grad(loss, input, scale)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, input, scale)[0])


@no_compiled_cpu_kernel
def test_sigmoid_focal_loss_of_extreme_logits():
    input = torch.tensor([[80.0, -80.0]], requires_grad=True)
    loss = ops.sigmoid_focal_loss(input, torch.tensor([1]), 2.0, 0.25, None, 'none')
    torch.testing.assert_close(loss, torch.tensor([[60.0, 20.0]]))
    (gradient,) = torch.autograd.grad(loss.sum(), input)
    torch.testing.assert_close(gradient, torch.tensor([[0.75, -0.25]]))


@no_compiled_cpu_kernel
@pytest.mark.parametrize('dtype', [torch.half, torch.bfloat16])
def test_sigmoid_focal_loss_half(dtype):
    input = random_tensor(7, 4, dtype=dtype).requires_grad_()
    target = torch.tensor([0, 4, 1, 3, 4, 2, 0])
    loss = ops.sigmoid_focal_loss(input, target, 2.0, 0.25, None, 'none')
    exact = input.detach().double().requires_grad_()
    expected = reference_focal_loss(exact, target, 2.0, 0.25)
    torch.testing.assert_close(loss, expected.to(dtype))
    (gradient,) = torch.autograd.grad(loss.sum(), input)
    (exact_gradient,) = torch.autograd.grad(expected.sum(), exact)
    torch.testing.assert_close(gradient, exact_gradient.to(dtype))


@no_compiled_cpu_kernel
def test_sigmoid_focal_loss_without_samples():
    input = torch.zeros(0, 4, requires_grad=True)
    target = torch.zeros(0, dtype=torch.long)
    loss = ops.sigmoid_focal_loss(input, target, 2.0, 0.25, torch.ones(4), 'sum')
    loss.backward()
    assert loss == 0 and input.grad.shape == (0, 4)


# Deformable convolution


def sample_padded(image: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Sample (C, H, W) bilinearly; pixels outside are zero."""
    height, width = image.shape[1:]
    top, left = math.floor(y.detach()), math.floor(x.detach())
    total = image.new_zeros(image.shape[0])
    for row in (top, top + 1):
        for col in (left, left + 1):
            if 0 <= row < height and 0 <= col < width:
                share = (1 - (y - row).abs()) * (1 - (x - col).abs())
                total = total + image[:, row, col] * share
    return total


def reference_deform_conv(
    input, offset, weight, mask, bias, stride, padding, dilation, groups, deform_groups
) -> Tensor:
    count, channels = input.shape[:2]
    out_channels, _, kernel_h, kernel_w = weight.shape
    out_h, out_w = offset.shape[2:]
    offset = offset.view(count, deform_groups, kernel_h, kernel_w, 2, out_h, out_w)
    if mask is None:
        mask = offset.new_ones(offset.shape[:4] + (out_h, out_w))
    mask = mask.view(count, deform_groups, kernel_h, kernel_w, out_h, out_w)
    images = input.view(count, deform_groups, -1, *input.shape[2:])

    pixels = []
    for n in range(count):
        for row in range(out_h):
            for col in range(out_w):
                samples = []
                for g in range(deform_groups):
                    for i in range(kernel_h):
                        for j in range(kernel_w):
                            shift = offset[n, g, i, j, :, row, col]
                            y = row * stride[0] - padding[0] + i * dilation[0]
                            x = col * stride[1] - padding[1] + j * dilation[1]
                            value = sample_padded(
                                images[n, g], y + shift[0], x + shift[1]
                            )
                            samples.append(value * mask[n, g, i, j, row, col])
                patch = torch.stack(samples).view(deform_groups, kernel_h, kernel_w, -1)
                patch = patch.permute(0, 3, 1, 2).reshape(
                    groups, channels // groups, kernel_h, kernel_w
                )
                kernels = weight.view(groups, out_channels // groups, *weight.shape[1:])
                pixels.append(torch.einsum('gcij,gocij->go', patch, kernels).flatten())
    output = torch.stack(pixels).view(count, out_h, out_w, out_channels)
    output = output.permute(0, 3, 1, 2)
    return output if bias is None else output + bias[:, None, None]


# Kernel 3 x 2 on input 6 x 7; the two sizes of every pair differ.
GEOMETRIES = [
    dict(stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1, deform_groups=1),
    dict(stride=(2, 1), padding=(1, 2), dilation=(1, 3), groups=2, deform_groups=1),
    dict(stride=(1, 3), padding=(2, 1), dilation=(2, 1), groups=1, deform_groups=2),
    dict(stride=(3, 2), padding=(0, 1), dilation=(1, 1), groups=4, deform_groups=2),
]


def deform_tensors(geometry: dict, dtype=torch.float64) -> tuple[Tensor, ...]:
    """Make input, offset, weight, mask and bias, all of which want a gradient."""
    kernel, groups = (3, 2), geometry['deform_groups']
    out_h, out_w = (
        (size + 2 * pad - step * (length - 1) - 1) // stride + 1
        for size, pad, step, length, stride in zip(
            (6, 7),
            geometry['padding'],
            geometry['dilation'],
            kernel,
            geometry['stride'],
            strict=True,
        )
    )
    places = groups * kernel[0] * kernel[1]
    tensors = (
        random_tensor(2, 4, 6, 7, seed=1),
        random_tensor(2, 2 * places, out_h, out_w, seed=2) * 1.3,
        random_tensor(4, 4 // geometry['groups'], *kernel, seed=3),
        random_tensor(2, places, out_h, out_w, seed=4).sigmoid(),
        random_tensor(4, seed=5),
    )
    return tuple(tensor.to(dtype).requires_grad_() for tensor in tensors)


def assert_same_with_gradients(output, expected, tensors, exact=None):
    """Compare two results, and their gradients with respect to ``tensors``.

    ``exact`` replaces ``tensors`` for the expected result where its precision is
    higher.
    """
    exact = tensors if exact is None else exact
    torch.testing.assert_close(output, expected.to(output.dtype))
    scale = random_tensor(*output.shape, seed=9, dtype=output.dtype)
    gradients = torch.autograd.grad(output, tensors, scale)
    references = torch.autograd.grad(expected, exact, scale.to(expected.dtype))
    for gradient, reference in zip(gradients, references, strict=True):
        assert reference.abs().sum() > 0
        torch.testing.assert_close(gradient, reference.to(gradient.dtype))


@pytest.mark.parametrize('geometry', GEOMETRIES)
def test_deform_conv2d(geometry):
    input, offset, weight, _, _ = deform_tensors(geometry)
    output = ops.deform_conv2d(input, offset, weight, *geometry.values())
    expected = reference_deform_conv(input, offset, weight, None, None, **geometry)
    assert_same_with_gradients(output, expected, (input, offset, weight))


@pytest.mark.parametrize('with_bias', [True, False])
@pytest.mark.parametrize('geometry', GEOMETRIES)
def test_modulated_deform_conv2d(geometry, with_bias):
    input, offset, weight, mask, bias = deform_tensors(geometry)
    wanted = (input, offset, weight, mask) + ((bias,) if with_bias else ())
    bias = bias if with_bias else None
    output = ops.modulated_deform_conv2d(
        input, offset, mask, weight, bias, *geometry.values()
    )
    expected = reference_deform_conv(input, offset, weight, mask, bias, **geometry)
    assert_same_with_gradients(output, expected, wanted)


@no_compiled_cpu_kernel
@pytest.mark.parametrize('dtype', [torch.half, torch.bfloat16])
def test_deform_convs_half(dtype):
    geometry = GEOMETRIES[2]
    half = deform_tensors(geometry, dtype)
    exact = tuple(tensor.detach().double().requires_grad_() for tensor in half)
    input, offset, weight, mask, bias = half

    output = ops.deform_conv2d(input, offset, weight, *geometry.values())
    expected = reference_deform_conv(*exact[:3], None, None, **geometry)
    assert_same_with_gradients(output, expected, half[:3], exact[:3])

    output = ops.modulated_deform_conv2d(
        input, offset, mask, weight, bias, *geometry.values()
    )
    expected = reference_deform_conv(*exact, **geometry)
    assert_same_with_gradients(output, expected, half, exact)


@stand_in_only  # the compiled one takes no gradient of this layout
def test_deform_conv_parameter_gradient_accumulates_and_scales():
    geometry = GEOMETRIES[0]
    input, offset, weight, _, _ = deform_tensors(geometry)
    expected = reference_deform_conv(input, offset, weight, None, None, **geometry)
    scale = random_tensor(*expected.shape, seed=9)
    (gradient,) = torch.autograd.grad(expected, weight, scale)

    def call(buffer):
        ext.deform_conv_backward_parameters(
            input.detach(),
            offset.detach(),
            scale.clone(),
            buffer,
            input.new_empty(0),
            input.new_empty(0),
            kW=2,
            kH=3,
            dW=1,
            dH=1,
            padW=0,
            padH=0,
            dilationW=1,
            dilationH=1,
            group=1,
            deformable_group=1,
            scale=3,
            im2col_step=2,
        )

    assert_accumulates(3 * gradient, call)


@pytest.mark.parametrize('wrong', [dict(groups=2), dict(deform_groups=2)])
def test_deform_conv2d_checks_groups(wrong):
    geometry = GEOMETRIES[0]
    input, offset, weight, _, _ = deform_tensors(geometry)
    with pytest.raises((ValueError, RuntimeError), match='channels|planes'):
        ops.deform_conv2d(input, offset, weight, *dict(geometry, **wrong).values())


# The module itself


@stand_in_only
def test_operator_not_offered():
    boxes = torch.zeros(2, 5)
    with pytest.raises(NotImplementedError, match='nms_rotated.*MMCV_OPS=1'):
        ops.nms_rotated(boxes, boxes[:, 0], 0.5)
    with pytest.raises(NotImplementedError, match='softmax_focal_loss_forward'):
        ops.softmax_focal_loss(boxes, torch.zeros(2, dtype=torch.long))
    assert ext.psamask_forward.__name__ == 'psamask_forward'


@stand_in_only
def test_private_names_are_missing():
    assert not hasattr(ext, '__wrapped__')
    with pytest.raises(AttributeError, match='__wrapped__'):
        _ = ext.__wrapped__


@stand_in_only
def test_environment_report():
    from mmcv.utils import collect_env

    report = collect_env()
    assert report['MMCV Compiler'] == report['MMCV CUDA Compiler'] == 'n/a'


@stand_in_only
def test_mmengine_finds_the_operators():
    from mmcv.utils.ext_loader import check_ops_exist, load_ext
    from mmengine.utils.dl_utils import mmcv_full_available

    assert check_ops_exist() and mmcv_full_available()
    assert load_ext('_ext', ['nms', 'three_nn_forward']) is ext
    spec = importlib.util.find_spec('mmcv._ext')
    assert spec is ext.__spec__ and spec.name == ext.__name__ == 'mmcv._ext'
    assert Path(spec.origin).parent == Path(clustr_mm.__file__).parent / 'compat'


def finders():
    """Ours, loaded by the package or at the start of Python."""
    name = StandInFinder.__name__
    return [finder for finder in sys.meta_path if type(finder).__name__ == name]


@stand_in_only
def test_toolboxes_may_come_first():
    """The start-up file offers the operators before the package is imported."""
    code = (
        'import sys, mmcv.ops\n'
        'assert "clustr_mm" not in sys.modules\n'
        'import clustr_mm\n'
        'print([type(f).__name__ for f in sys.meta_path].count("StandInFinder"))\n'
    )
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, '1\n'), done.stderr


def test_start_up_file_is_harmless_without_the_package(tmp_path):
    start_up = Path(clustr_mm.__file__).parent / 'compat/clustr_mm.pth'
    code = f'import site; site.addsitedir({str(tmp_path)!r}); import sys; print(1)'
    (tmp_path / start_up.name).write_text(start_up.read_text())
    done = subprocess.run(
        [sys.executable, '-S', '-I', '-c', code],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.stderr) == ('1\n', '')


def test_start_up_file_imports_next_to_nothing():
    """Every start of Python pays for it."""
    finder = Path(clustr_mm.__file__).parent / 'compat/finder.py'
    code = (
        'import importlib.util as u, sys\n'
        'before = set(sys.modules)\n'
        f's = u.spec_from_file_location("finder", {str(finder)!r})\n'
        's.loader.exec_module(u.module_from_spec(s))\n'
        'print(*sorted(set(sys.modules) - before))'
    )
    done = subprocess.run(
        [sys.executable, '-S', '-I', '-c', code],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    # What the interpreter itself needs to find files.
    allowed = {'os', 'os.path', 'posixpath', 'stat', '_stat', 'genericpath'}
    allowed |= {'_collections_abc', 'types', 'importlib.machinery'}
    assert set(done.stdout.split()) <= allowed


@stand_in_only
def test_checkout_beside_an_installed_package(tmp_path):
    """The start-up file serves the one, the script imports the other."""
    folder = Path(clustr_mm.__file__).parent
    shutil.copytree(folder, tmp_path / 'clustr_mm')
    code = (
        f'import sys; sys.path.insert(0, {str(tmp_path)!r})\n'
        'import clustr_mm, mmcv.ops\n'
        'assert clustr_mm.__file__.startswith(sys.path[0])\n'
        'from clustr_mm.compat import mmcv_ops_are_stand_in\n'
        'print(mmcv_ops_are_stand_in())\n'
    )
    assert run_python(code).endswith('True\n')


WORKERS = """
import sys
import torch
from torch.utils.data import DataLoader
{imports}

class Kept:
    def __len__(self):
        return 2

    def __getitem__(self, index):
        import mmcv.ops

        boxes = torch.tensor([[0., 0, 9, 9], [0, 0, 8, 9], [5, 5, 7, 7]])
        kept = mmcv.ops.nms(boxes, torch.tensor([.5, .6, .4]), 0.5)[1]
        return kept, 'clustr_mm' in sys.modules

if __name__ == '__main__':
    for context in ('fork', 'spawn'):
        loader = DataLoader(Kept(), num_workers=1, multiprocessing_context=context)
        for kept, package in loader:
            print(context, kept.tolist(), package.item())
"""


@pytest.mark.parametrize(
    'imports',
    [
        '',
        'import mmcv.ops, clustr_mm',
        "if __name__ == '__main__': import clustr_mm, mmdet.apis",
    ],
)
def test_workers_of_a_data_loader(tmp_path, imports):
    """Workers that are started anew need not import what the training did."""
    pytest.importorskip('mmdet')
    script = tmp_path / 'train.py'
    script.write_text(WORKERS.format(imports=imports))
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, check=False
    )
    lines = done.stdout.splitlines()
    assert [line.split(' ', 1)[0] for line in lines] == [
        *('fork', 'fork', 'spawn', 'spawn')
    ], done.stderr
    assert all('[[1, 2]]' in line for line in lines), lines
    # The package is where it was imported, and the operators are everywhere.
    package = [line.endswith('True') for line in lines]
    here, anew = 'clustr_mm' in imports, imports.startswith('import')
    assert package == [here] * 2 + [here and anew] * 2


def test_activate_twice_changes_nothing():
    before = list(sys.meta_path)
    activate()
    assert sys.meta_path == before
    assert len(finders()) == 1


def test_finder_answers_for_one_name_only():
    (finder,) = finders()
    assert finder.find_spec('mmcv._ext', None).name == 'mmcv._ext'
    for name in ('mmcv', 'mmcv._ext.nms', 'mmcv._flow_warp_ext', '_ext'):
        assert finder.find_spec(name, None) is None


def test_import_is_silent_and_light():
    code = (
        'import sys, warnings\n'
        # What these warn of is not ours to change.
        'import torch, mmengine.logging, mmengine.model, mmengine.registry\n'
        "warnings.simplefilter('error')\n"
        'import clustr_mm\n'
        'clustr_mm.compat.activate()\n'
        "warnings.simplefilter('ignore')\n"  # torch's own at exit
        'last = type(sys.meta_path[-1]).__name__\n'
        "assert last == 'StandInFinder', last\n"
        "heavy = {'mmcv', 'mmdet', 'mmpose', 'mmseg', 'torchvision'}\n"
        'assert not heavy & set(sys.modules), heavy & set(sys.modules)\n'
    )
    assert run_python(code) == ''


@pytest.mark.parametrize('package, old', [('torch', '2.0.1'), ('mmengine', '0.9.1')])
def test_what_is_too_old(package, old):
    code = (
        f"import {package}; {package}.__version__ = '{old}'\n"
        'try:\n'
        '    import clustr_mm\n'
        'except ImportError as error:\n'
        '    print(error)\n'
    )
    said = run_python(code).splitlines()[-1]
    assert re.fullmatch(rf'clustr_mm needs {package} \S+ or later, found {old}', said)


def test_import_before_mmdet():
    pytest.importorskip('mmdet')
    code = (
        'import clustr_mm\n'
        'from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor\n'
        'import torch\n'
        "layer = dict(type='RoIAlign', output_size=2, sampling_ratio=0)\n"
        'extract = SingleRoIExtractor(layer, 1, [4])\n'
        'rois = torch.tensor([[0., 0., 0., 8., 8.]])\n'
        'print(extract([torch.ones(1, 1, 8, 8)], rois).tolist())\n'
    )
    assert '[[[[1.0, 1.0], [1.0, 1.0]]]]' in run_python(code)


def test_import_after_mmcv():
    code = (
        'import mmcv\n'
        'try:\n'
        '    import mmcv.ops\n'
        'except ModuleNotFoundError as error:\n'
        "    assert error.name == 'mmcv._ext', error\n"
        'import clustr_mm\n'
        'import mmcv.ops\n'
        'import torch\n'
        'print(mmcv.ops.nms(torch.ones(2, 4), torch.ones(2), 0.5)[1].shape)\n'
    )
    assert 'torch.Size([2])' in run_python(code)


@stand_in_only
def test_torchvision_is_needed_by_calls_only():
    code = (
        'import sys\n'
        "sys.modules['torchvision'] = None\n"
        'import clustr_mm, mmcv.ops, torch\n'
        'try:\n'
        '    mmcv.ops.nms(torch.ones(2, 4), torch.ones(2), 0.5)\n'
        'except ImportError as error:\n'
        '    print(error)\n'
    )
    assert 'Install the torchvision that matches torch' in run_python(code)


def test_gives_way_to_a_real_extension(tmp_path):
    package = tmp_path / 'mmcv'
    package.mkdir()
    (package / '__init__.py').touch()
    code = (
        'import clustr_mm, importlib, importlib.util, pathlib, sys\n'
        'from clustr_mm.compat import mmcv_ops_are_stand_in\n'
        # Without an extension the stand-in serves this mmcv.
        'assert mmcv_ops_are_stand_in()\n'
        "file = pathlib.Path(importlib.import_module('mmcv').__file__)\n"
        "file.with_name('_ext.py').write_text('real = True')\n"
        'importlib.invalidate_caches()\n'
        'assert not mmcv_ops_are_stand_in()\n'
        'import mmcv._ext\n'
        "assert mmcv._ext.real and not hasattr(mmcv._ext, 'nms')\n"
        # One that is found but does not load says so itself.
        "del sys.modules['mmcv._ext'], mmcv._ext\n"
        'broken = \'raise ImportError("undefined symbol of torch")\'\n'
        "file.with_name('_ext.py').write_text(broken)\n"
        'importlib.invalidate_caches()\n'
        'try:\n'
        '    import mmcv._ext\n'
        'except ImportError as error:\n'
        '    print(error)\n'
        # And without mmcv there is nothing to stand in for.
        "sys.modules['mmcv'] = None\n"
        'assert not mmcv_ops_are_stand_in()\n'
        'try:\n'
        "    importlib.util.find_spec('mmcv._ext')\n"
        'except ModuleNotFoundError:\n'
        "    print('no mmcv')\n"
    )
    assert run_python(code, path=tmp_path).split('\n')[:2] == [
        'undefined symbol of torch',
        'no mmcv',
    ]
