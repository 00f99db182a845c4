"""The stand-in for ``mmcv._ext``, seen through mmcv's own wrappers."""

import importlib
import math

import pytest
import torch
from torch import Tensor

from clustr_mm.compat import mmcv_ops_are_stand_in

pytest.importorskip('mmcv')
ops = importlib.import_module('mmcv.ops')
ext = importlib.import_module('mmcv._ext')

stand_in_only = pytest.mark.skipif(
    not mmcv_ops_are_stand_in(), reason='the compiled mmcv has no such form on a CPU'
)
HALF = [
    pytest.param(dtype, marks=stand_in_only) for dtype in (torch.half, torch.bfloat16)
]
DTYPES = [torch.float64, *HALF]


def randn(*shape, seed=0, dtype=torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def random_boxes(count: int) -> tuple[Tensor, Tensor]:
    """Boxes and scores, all of which differ."""
    generator = torch.Generator().manual_seed(0)
    corner, extent = torch.rand(2, count, 2, generator=generator) * 40
    scores = (torch.randperm(count, generator=generator) + 1) / (count + 1)
    return torch.cat((corner, corner + extent / 2 + 1), dim=1), scores


def assert_same(output, expected, tensors, exact) -> None:
    """Compare results and gradients, ``exact`` being ``tensors`` in float64."""
    torch.testing.assert_close(output, expected.to(output.dtype))
    scale = randn(*output.shape, seed=9, dtype=output.dtype)
    gradients = torch.autograd.grad(output, tensors, scale)
    references = torch.autograd.grad(expected, exact, scale.to(expected.dtype))
    for gradient, reference in zip(gradients, references, strict=True):
        assert reference.abs().sum() > 0
        torch.testing.assert_close(gradient, reference.to(gradient.dtype))


def leaves(dtype, *tensors) -> tuple[list[Tensor], list[Tensor]]:
    """Tensors of a dtype that want a gradient, and the same in float64."""
    given = [tensor.to(dtype).requires_grad_() for tensor in tensors]
    return given, [tensor.detach().double().requires_grad_() for tensor in given]


# Boxes


def iou(a: list[float], b: list[float], offset: int, of_first: bool = False) -> float:
    width = max(min(a[2], b[2]) - max(a[0], b[0]) + offset, 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]) + offset, 0)
    area_a = (a[2] - a[0] + offset) * (a[3] - a[1] + offset)
    area_b = (b[2] - b[0] + offset) * (b[3] - b[1] + offset)
    return width * height / (area_a if of_first else area_a + area_b - width * height)


def reference_nms(boxes: Tensor, scores: Tensor, threshold: float, offset: int = 0):
    corners, kept = boxes.tolist(), []
    for i in scores.argsort(descending=True).tolist():
        if all(iou(corners[i], corners[j], offset) <= threshold for j in kept):
            kept.append(i)
    return kept


@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('threshold', [0.1, 0.3, 0.55])
def test_nms(threshold, offset):
    boxes, scores = random_boxes(60)
    dets, kept = ops.nms(boxes, scores, threshold, offset=offset)
    assert kept.tolist() == reference_nms(boxes, scores, threshold, offset)
    assert 0 < len(kept) < 60
    torch.testing.assert_close(dets, torch.cat((boxes, scores[:, None]), 1)[kept])


@pytest.mark.parametrize(
    'corners, threshold, offset, expected',
    [
        # The IoU is 4 / 14 without the offset and 9 / 23 with it.
        ([[0, 0, 3, 3], [1, 1, 4, 4]], 0.33, 0, [0, 1]),
        ([[0, 0, 3, 3], [1, 1, 4, 4]], 0.33, 1, [0]),
        # It is 0.6 rounded to float32, which is greater than the double 0.6.
        ([[0, 0, 10, 10], [0, 0, 10, 6]], 0.6, 0, [0, 1]),
        ([], 0.5, 0, []),
        ([], 0.5, 1, []),
    ],
)
def test_nms_of_few_boxes(corners, threshold, offset, expected):
    boxes = torch.tensor(corners, dtype=torch.float32).view(-1, 4)
    scores = torch.tensor([0.9, 0.8])[: len(boxes)]
    dets, kept = ops.nms(boxes, scores, threshold, offset=offset)
    assert kept.tolist() == expected and kept.dtype == torch.int64
    assert dets.shape == (len(expected), 5)


@stand_in_only
@pytest.mark.parametrize(
    'dtypes', ['half half', 'bfloat16 bfloat16', 'half float32', 'float32 float64']
)
def test_nms_dtypes(dtypes):
    of_boxes, of_scores = (getattr(torch, name) for name in dtypes.split())
    boxes, scores = random_boxes(30)
    boxes, scores = boxes.round().to(of_boxes), scores.to(of_scores)
    assert ops.nms(boxes, scores, 0.37)[1].tolist() == reference_nms(
        boxes, scores, 0.37
    )


@pytest.mark.parametrize('agnostic', [False, True])
def test_batched_nms(agnostic):
    boxes, scores = random_boxes(60)
    classes = torch.arange(60) % 3
    config = dict(type='nms', iou_threshold=0.3)
    dets, kept = ops.batched_nms(boxes, scores, classes, config, agnostic)
    apart = boxes if agnostic else boxes + 1000 * classes[:, None]
    assert kept.tolist() == reference_nms(apart, scores, 0.3)
    torch.testing.assert_close(dets, torch.cat((boxes, scores[:, None]), 1)[kept])


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


@pytest.mark.parametrize('count', [0, 40])
@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('method', ['naive', 'linear', 'gaussian'])
def test_soft_nms(method, offset, count):
    boxes, scores = random_boxes(count)
    before = boxes.clone(), scores.clone()
    dets, kept = ops.soft_nms(boxes, scores, 0.2, 0.4, 0.1, method, offset)
    expected = reference_soft_nms(boxes, scores, 0.2, 0.4, 0.1, method, offset)
    assert kept.tolist() == [i for i, _ in expected]
    assert len(kept) < max(count, 1) and dets.shape == (len(kept), 5)
    assert torch.equal(dets[:, :4], boxes[kept])
    torch.testing.assert_close(dets[:, 4], torch.tensor([s for _, s in expected]))
    assert torch.equal(boxes, before[0]) and torch.equal(scores, before[1])


@pytest.mark.parametrize(
    'method', ['linear', pytest.param('gaussian', marks=stand_in_only)]
)
def test_soft_nms_of_boxes_without_area(method):
    boxes = torch.tensor([[4.0, 3, 5, 3], [4, 3, 5, 4]] + [[3.0, 1, 3, 1]] * 4)
    scores = torch.tensor([0.9, 0.8, 0.5, 0.4, 0.3, 0.0])
    dets, kept = ops.soft_nms(boxes, scores, 0.6, method=method)
    assert kept.tolist() == [0, 1, 2, 3, 4]
    torch.testing.assert_close(dets[:, 4], scores[:5])


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('mode', ['iou', 'iof'])
def test_bbox_overlaps(mode, offset, dtype):
    boxes = random_boxes(9)[0].to(dtype)
    table = [
        [iou(a, b, offset, mode == 'iof') for b in boxes[3:].tolist()]
        for a in boxes[:6].tolist()
    ]
    expected = torch.tensor(table, dtype=torch.float64).to(dtype)
    assert 0 < (expected > 0).sum() < expected.numel()
    ious = ops.bbox_overlaps(boxes[:6], boxes[3:], mode, False, offset)
    torch.testing.assert_close(ious, expected)
    pairs = ops.bbox_overlaps(boxes[:6], boxes[3:], mode, True, offset)
    torch.testing.assert_close(pairs, expected.diagonal())


# Regions


def sample_inside(image: Tensor, y: float, x: float) -> Tensor:
    """Sample (C, H, W) bilinearly; positions just outside take the edge's value."""
    height, width = image.shape[1:]
    if y < -1 or y > height or x < -1 or x > width:
        return image.new_zeros(image.shape[0])
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    down, across = y - top, x - left
    upper = image[:, top, left] * (1 - across) + image[:, top, right] * across
    lower = image[:, bottom, left] * (1 - across) + image[:, bottom, right] * across
    return upper * (1 - down) + lower * down


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
        [0.0, -5.0, 6.0, 30.0, 25.0],
        [0.0, 4.0, 4.0, 4.0, 9.0],
        [1.0, 6.2, 6.4, 6.7, 6.9],
    ],
    dtype=torch.float64,
)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize(
    'scale, ratio, aligned', [(0.5, 0, True), (1.0, 1, False), (0.25, 3, True)]
)
def test_roi_align(scale, ratio, aligned, dtype):
    input, exact = leaves(dtype, randn(2, 3, 7, 9))
    rois = ROIS.to(dtype)
    output = ops.roi_align(*input, rois, (2, 3), scale, ratio, 'avg', aligned)
    expected = reference_roi_align(*exact, rois, (2, 3), scale, ratio, aligned)
    assert_same(output, expected, input, exact)


def test_roi_align_without_rois():
    input = randn(2, 3, 7, 9).requires_grad_()
    output = ops.RoIAlign((2, 3))(input, ROIS[:0])
    assert output.shape == (0, 3, 2, 3)
    (gradient,) = torch.autograd.grad(output.sum(), input)
    assert torch.equal(gradient, torch.zeros_like(input))


@stand_in_only
def test_the_maximum_of_regions_is_not_offered():
    layer = ops.RoIAlign((2, 3), pool_mode='max')
    with pytest.raises(NotImplementedError, match="roi_align with pool_mode='max'"):
        layer(randn(2, 3, 7, 9), ROIS)


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


@stand_in_only
@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('weighted', [False, True])
@pytest.mark.parametrize(
    'gamma, alpha, reduction',
    [(2.0, 0.25, 'none'), (0.0, 0.6, 'mean'), (0.5, 0.9, 'sum')],
)
def test_sigmoid_focal_loss(gamma, alpha, reduction, weighted, dtype):
    input, exact = leaves(dtype, randn(7, 4) * 3)
    # Class 4 is the background.
    target = torch.tensor([0, 4, 1, 3, 4, 2, 0])
    weight = torch.tensor([0.5, 2.0, 1.5, 3.0], dtype=dtype) if weighted else None
    loss = ops.sigmoid_focal_loss(*input, target, gamma, alpha, weight, 'none')
    expected = reference_focal_loss(*exact, target, gamma, alpha, weight)
    assert_same(loss, expected, input, exact)
    reduced = ops.sigmoid_focal_loss(*input, target, gamma, alpha, weight, reduction)
    if reduction != 'none':
        loss = loss.sum() / (7 if reduction == 'mean' else 1)
    torch.testing.assert_close(reduced, loss)


@stand_in_only
@pytest.mark.parametrize('gamma', [0.0, 0.5, 2.0])
def test_sigmoid_focal_loss_of_extreme_logits(gamma):
    input = torch.tensor([[200.0, -200.0]], requires_grad=True)
    loss = ops.sigmoid_focal_loss(input, torch.tensor([1]), gamma, 0.25, None, 'none')
    torch.testing.assert_close(loss, torch.tensor([[150.0, 50.0]]))
    (gradient,) = torch.autograd.grad(loss.sum(), input)
    torch.testing.assert_close(gradient, torch.tensor([[0.75, -0.25]]))


@stand_in_only
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
    total = image.new_zeros(image.shape[0])
    if not (-1 < y < height and -1 < x < width):
        return total
    top, left = math.floor(y.detach()), math.floor(x.detach())
    for row, down in ((top, top + 1 - y), (top + 1, y - top)):
        for col, across in ((left, left + 1 - x), (left + 1, x - left)):
            if 0 <= row < height and 0 <= col < width:
                total = total + image[:, row, col] * down * across
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

    def sample(n, g, i, j, row, col):
        shift = offset[n, g, i, j, :, row, col]
        y = row * stride[0] - padding[0] + i * dilation[0] + shift[0]
        x = col * stride[1] - padding[1] + j * dilation[1] + shift[1]
        return sample_padded(images[n, g], y, x) * mask[n, g, i, j, row, col]

    places = torch.cartesian_prod(*map(torch.arange, offset.shape[1:4])).tolist()
    kernels = weight.view(groups, out_channels // groups, *weight.shape[1:])
    pixels = []
    for n in range(count):
        for row in range(out_h):
            for col in range(out_w):
                samples = [sample(n, *place, row, col) for place in places]
                patch = torch.stack(samples).view(deform_groups, kernel_h, kernel_w, -1)
                patch = patch.permute(0, 3, 1, 2).reshape(
                    groups, channels // groups, kernel_h, kernel_w
                )
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


def deform_tensors(geometry: dict) -> tuple[Tensor, ...]:
    """Make input, offset, weight, mask and bias."""
    kernel, groups = (3, 2), geometry['deform_groups']
    out_h, out_w = (
        (size + 2 * pad - step * (length - 1) - 1) // stride + 1
        for size, length, stride, pad, step in zip(
            (6, 7), kernel, *list(geometry.values())[:3], strict=True
        )
    )
    places = groups * kernel[0] * kernel[1]
    return (
        randn(2, 4, 6, 7, seed=1),
        randn(2, 2 * places, out_h, out_w, seed=2) * 1.3,
        randn(4, 4 // geometry['groups'], *kernel, seed=3),
        randn(2, places, out_h, out_w, seed=4).sigmoid(),
        randn(4, seed=5),
    )


@pytest.mark.parametrize(
    'geometry, dtype',
    [(g, torch.float64) for g in GEOMETRIES]
    + [pytest.param(GEOMETRIES[2], *d.values, marks=stand_in_only) for d in HALF],
)
@pytest.mark.parametrize('kind', ['plain', 'modulated', 'modulated with bias'])
# Whole numbers lead to the border and beyond; an untrained layer has zeros.
@pytest.mark.parametrize('offsets', ['any', 'whole', 'zero'])
def test_deform_conv(kind, geometry, dtype, offsets):
    tensors = list(deform_tensors(geometry))
    if offsets != 'any':
        tensors[1] = tensors[1].round() if offsets == 'whole' else tensors[1] * 0
    count = {'plain': 3, 'modulated': 4, 'modulated with bias': 5}[kind]
    given, exact = leaves(dtype, *tensors[:count])
    input, offset, weight, *rest = given
    if rest:
        bias = rest[1] if count == 5 else None
        output = ops.modulated_deform_conv2d(
            input, offset, rest[0], weight, bias, *geometry.values()
        )
    else:
        output = ops.deform_conv2d(input, offset, weight, *geometry.values())
    full = exact + [None] * (5 - count)
    assert_same(output, reference_deform_conv(*full, **geometry), given, exact)


@pytest.mark.parametrize('wrong', [dict(groups=2), dict(deform_groups=2)])
def test_deform_conv_checks_groups(wrong):
    tensors = deform_tensors(GEOMETRIES[0])[:3]
    geometry = dict(GEOMETRIES[0], **wrong)
    with pytest.raises((ValueError, RuntimeError), match='channels|planes'):
        ops.deform_conv2d(*tensors, *geometry.values())


# The module itself


@stand_in_only
def test_given_gradients_are_added_to():
    """Compiled operators add to what a caller allocates, but for the offset's."""
    geometry = dict(kH=3, kW=2, dH=1, dW=1, padH=0, padW=0, dilationH=1, dilationW=1)
    geometry |= dict(group=1, deformable_group=1, im2col_step=2)
    input, offset, weight, *_ = deform_tensors(GEOMETRIES[0])
    grad = randn(2, 4, *offset.shape[2:], seed=9)
    for start in (0.0, 5.0):
        full = [torch.full_like(x, start) for x in (input, offset, weight, input)]
        ext.deform_conv_backward_input(
            input, offset, grad, *full[:2], weight, grad, **geometry
        )
        ext.deform_conv_backward_parameters(
            input, offset, grad, full[2], grad, grad, scale=3, **geometry
        )
        ext.roi_align_backward(
            randn(5, 4, 2, 3), ROIS, grad, grad, full[3],
            aligned_height=2, aligned_width=3, spatial_scale=0.5, sampling_ratio=2,
            pool_mode=1, aligned=True,
        )  # fmt: skip
        results = full if start else [x.clone() for x in full]
        if not start:
            fresh = results
    for index, (filled, zero) in enumerate(zip(results, fresh, strict=True)):
        assert zero.abs().sum() > 0
        torch.testing.assert_close(filled, zero if index == 1 else zero + 5)
    weight.requires_grad_()
    ops.deform_conv2d(input, offset, weight).backward(grad)
    torch.testing.assert_close(fresh[2], 3 * weight.grad)


@stand_in_only
def test_operator_not_offered():
    boxes = torch.zeros(2, 5)
    with pytest.raises(NotImplementedError, match='nms_rotated.*MMCV_OPS=1'):
        ops.nms_rotated(boxes, boxes[:, 0], 0.5)
    assert ext.psamask_forward.__name__ == 'psamask_forward'
    with pytest.raises(AttributeError, match='__wrapped__'):
        _ = ext.__wrapped__


@stand_in_only
def test_mmcv_and_mmengine_find_it():
    from mmcv.utils import collect_env
    from mmcv.utils.ext_loader import check_ops_exist, load_ext
    from mmengine.utils.dl_utils import mmcv_full_available

    assert check_ops_exist() and mmcv_full_available()
    assert load_ext('_ext', ['nms', 'three_nn_forward']) is ext
    report = collect_env()
    assert report['MMCV Compiler'] == report['MMCV CUDA Compiler'] == 'n/a'
