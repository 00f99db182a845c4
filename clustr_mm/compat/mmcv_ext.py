"""Stand-in for ``mmcv._ext``, the compiled operators behind ``mmcv.ops``.

Imported under the name ``mmcv._ext`` when mmcv was installed without its compiled
extension. Every function follows the calling convention of the mmcv 2.1.0 operator of
the same name: most of them fill tensors that the caller allocated. What torchvision
offers is taken from there; the rest is plain PyTorch.

Half precision inputs are computed in float32 and rounded once, at the end.

Any other public name resolves to a function that raises :class:`NotImplementedError`
when called, because mmcv checks at import time that the names of all its operators
exist.
"""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

_HOW_TO_COMPILE = (
    'Install the compiled mmcv for it: `make install MMCV_OPS=1`, or '
    '`pip install mmcv==2.1.0` where there is a wheel or a compiler.'
)


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if name.startswith('_'):
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')

    def missing(*args: Any, **kwargs: Any) -> NoReturn:
        raise _not_offered(name)

    missing.__name__ = missing.__qualname__ = name
    return missing


def _not_offered(what: str) -> NotImplementedError:
    return NotImplementedError(
        f"mmcv operator '{what}' is not available: mmcv is installed without its "
        "compiled operators, and clustr_mm's stand-in for them does not include it. "
        f'{_HOW_TO_COMPILE}'
    )


def _torchvision_ops() -> ModuleType:
    """Import ``torchvision.ops`` on first use.

    Returns:
        ModuleType: The module ``torchvision.ops``.

    Raises:
        ImportError: If torchvision is not installed.
    """
    try:
        import torchvision.ops
    except ImportError as error:
        raise ImportError(
            'mmcv is installed without its compiled operators, and their stand-in in '
            'clustr_mm needs torchvision. Install the torchvision that matches torch '
            f'{torch.__version__}.'
        ) from error
    return torchvision.ops


def _widen(tensor: Tensor) -> Tensor:
    """Cast float16 and bfloat16 to float32; return other tensors unchanged."""
    return tensor.float() if tensor.dtype in (torch.half, torch.bfloat16) else tensor


def _gradients(
    function: Callable[..., Tensor], tensors: Sequence[Tensor], grad_output: Tensor
) -> tuple[Tensor, ...]:
    """Compute the gradient of ``function(*tensors)`` with respect to each tensor.

    Args:
        function (Callable): Differentiable function of all ``tensors``.
        tensors (Sequence[Tensor]): Where to evaluate it.
        grad_output (Tensor): Gradient with respect to its output.

    Returns:
        tuple[Tensor, ...]: Gradients of the shapes of ``tensors``, in float32 where
        these are of half precision.
    """
    # mmcv calls the operators from a backward pass, which records no graph.
    with torch.enable_grad():
        leaves = [_widen(tensor.detach()).requires_grad_() for tensor in tensors]
        output = function(*leaves)
        return torch.autograd.grad(output, leaves, grad_output.to(output.dtype))


def get_compiler_version() -> str:
    """Answer for the compiler version as mmcv does when it has no operators."""
    return 'n/a'


def get_compiling_cuda_version() -> str:
    """Answer for the CUDA version as mmcv does when it has no operators."""
    return 'n/a'


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Suppress boxes that overlap a box with a higher score.

    Args:
        boxes (Tensor): Shape (N, 4), as (x1, y1, x2, y2).
        scores (Tensor): Shape (N,).
        iou_threshold (float): A box goes if its IoU is above this value.
        offset (int): Width and height of a box are ``x2 - x1 + offset`` and
            ``y2 - y1 + offset``; 0 or 1.

    Returns:
        Tensor: Indices of the boxes kept, in descending order of score, int64.
    """
    # torchvision wants both tensors of one dtype.
    dtype = torch.promote_types(_widen(boxes).dtype, _widen(scores).dtype)
    boxes = boxes.to(dtype)
    if offset:
        boxes = torch.cat((boxes[:, :2], boxes[:, 2:] + offset), dim=1)
    # mmcv takes the threshold in single precision, torchvision in double: an IoU of
    # exactly 0.6f is above 0.6.
    threshold = torch.tensor(iou_threshold, dtype=torch.float32).item()
    return _torchvision_ops().nms(boxes, scores.to(dtype), threshold)


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Lower the scores of boxes that overlap a box with a higher score.

    Args:
        boxes (Tensor): Shape (N, 4), as (x1, y1, x2, y2).
        scores (Tensor): Shape (N,).
        dets (Tensor): Output, shape (N, 5). As many leading rows as boxes are kept
            are filled with box and new score.
        iou_threshold (float): Methods 0 and 1 lower the score from this IoU on.
        sigma (float): Width of method 2.
        min_score (float): Boxes whose new score is below are dropped.
        method (int): 0 sets the score to zero, 1 multiplies it by ``1 - iou``, 2
            multiplies it by ``exp(-iou**2 / sigma)``.
        offset (int): Width and height of a box are ``x2 - x1 + offset`` and
            ``y2 - y1 + offset``; 0 or 1.

    Returns:
        Tensor: Indices of the boxes kept, in descending order of new score, int64.
    """
    corners, scores = _widen(boxes), _widen(scores).clone()
    areas = (corners[:, 2:] - corners[:, :2] + offset).prod(dim=1)
    left = torch.arange(len(boxes), device=boxes.device)
    kept = []
    while len(left):
        best = left[scores[left].argmax()]
        kept.append(best)
        left = left[left != best]

        low = torch.maximum(corners[left, :2], corners[best, :2])
        high = torch.minimum(corners[left, 2:], corners[best, 2:])
        overlap = (high - low + offset).clamp(min=0).prod(dim=1)
        # Two boxes without area give 0 / 0, which is no overlap.
        iou = (overlap / (areas[left] + areas[best] - overlap)).nan_to_num(nan=0.0)
        if method == 2:
            scores[left] *= torch.exp(-(iou**2) / sigma)
        else:
            lowered = 1 - iou if method == 1 else torch.zeros_like(iou)
            scores[left] *= torch.where(iou >= iou_threshold, lowered, 1.0)
        left = left[scores[left] >= min_score]

    indices = torch.stack(kept) if kept else left
    dets[: len(indices), :4] = boxes[indices]
    dets[: len(indices), 4] = scores[indices].to(dets.dtype)
    return indices


def _roi_align(
    input: Tensor,
    rois: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    return _torchvision_ops().roi_align(
        input,
        rois.to(input.dtype),
        (aligned_height, aligned_width),
        spatial_scale,
        sampling_ratio,
        aligned,
    )


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Average bilinear samples in the bins of each region.

    Args:
        input (Tensor): Shape (N, C, H, W).
        rois (Tensor): Shape (K, 5), as (index into N, x1, y1, x2, y2).
        output (Tensor): Output, shape (K, C, aligned_height, aligned_width).
        argmax_y (Tensor): Not touched; serves the maximum mode.
        argmax_x (Tensor): Not touched; serves the maximum mode.
        aligned_height (int): Number of bins from top to bottom.
        aligned_width (int): Number of bins from left to right.
        spatial_scale (float): Factor from box to input coordinates.
        sampling_ratio (int): Samples per bin in each direction; 0 for as many as the
            bin has pixels.
        pool_mode (int): 1 for the average. 0, the maximum, is not offered.
        aligned (bool): Whether to shift the regions by half a pixel.

    Raises:
        NotImplementedError: If ``pool_mode`` is 0.
    """
    if pool_mode != 1:
        raise _not_offered("roi_align_forward with pool_mode='max'")
    pooled = _roi_align(
        _widen(input),
        rois,
        aligned_height,
        aligned_width,
        spatial_scale,
        sampling_ratio,
        aligned,
    )
    output.copy_(pooled)


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Add the gradient of :func:`roi_align_forward` to ``grad_input``.

    Args:
        grad_output (Tensor): Shape (K, C, aligned_height, aligned_width).
        rois (Tensor): As in the forward pass, and so are the arguments not listed.
        argmax_y (Tensor): Not read.
        argmax_x (Tensor): Not read.
        grad_input (Tensor): Output, shape (N, C, H, W).

    Raises:
        NotImplementedError: If ``pool_mode`` is 0.
    """
    if pool_mode != 1:
        raise _not_offered("roi_align_backward with pool_mode='max'")

    def pool(input: Tensor) -> Tensor:
        return _roi_align(
            input,
            rois,
            aligned_height,
            aligned_width,
            spatial_scale,
            sampling_ratio,
            aligned,
        )

    # The average is linear in the input: its gradient is the same everywhere.
    (gradient,) = _gradients(pool, [torch.zeros_like(grad_input)], grad_output)
    grad_input.add_(gradient)


def _bin_edges(
    start: Tensor, end: Tensor, bins: int, size: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Divide intervals into overlapping ranges of whole pixels.

    Args:
        start (Tensor): Where the intervals begin, shape (K,).
        end (Tensor): Where they end, shape (K,).
        bins (int): Number of ranges per interval.
        size (int): Number of pixels there are.

    Returns:
        tuple[list[list[int]], list[list[int]]]: For each interval the first pixel of
        every range, and the pixel after its last one.
    """
    steps = torch.arange(bins + 1, dtype=start.dtype, device=start.device)
    edges = steps * ((end - start) / bins)[:, None] + start[:, None]
    first = edges[:, :-1].floor().clamp(0, size).int()
    last = edges[:, 1:].ceil().clamp(0, size).int()
    return first.tolist(), last.tolist()


def roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Take the maximum in the bins of each region.

    torchvision's operator of this name rounds the regions to whole pixels before it
    divides them, mmcv's does not, so the two are no substitute for one another.

    Args:
        input (Tensor): Shape (N, C, H, W).
        rois (Tensor): Shape (K, 5), as (index into N, x1, y1, x2, y2), where x2 and
            y2 are inside the region.
        output (Tensor): Output, shape (K, C, pooled_height, pooled_width). Bins
            without pixels become zero.
        argmax (Tensor): Output of the same shape, int32: where in H * W the maximum
            is, -1 for bins without pixels.
        pooled_height (int): Number of bins from top to bottom.
        pooled_width (int): Number of bins from left to right.
        spatial_scale (float): Factor from box to input coordinates.
    """
    height, width = input.shape[2:]
    output.zero_()
    argmax.fill_(-1)

    images = rois[:, 0].long().tolist()
    start = _widen(rois)[:, 1:3] * spatial_scale
    end = (_widen(rois)[:, 3:5] + 1) * spatial_scale
    valid = (end > start).all(dim=1).tolist()
    left, right = _bin_edges(start[:, 0], end[:, 0], pooled_width, width)
    top, bottom = _bin_edges(start[:, 1], end[:, 1], pooled_height, height)

    for k, image in enumerate(images):
        if not valid[k]:
            continue
        for row, (y1, y2) in enumerate(zip(top[k], bottom[k], strict=True)):
            for col, (x1, x2) in enumerate(zip(left[k], right[k], strict=True)):
                if y1 == y2 or x1 == x2:
                    continue
                region = input[image, :, y1:y2, x1:x2].flatten(1)
                maximum, index = region.max(dim=1)
                y = y1 + index // (x2 - x1)
                x = x1 + index % (x2 - x1)
                output[k, :, row, col] = maximum
                argmax[k, :, row, col] = (y * width + x).to(argmax.dtype)


def roi_pool_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax: Tensor,
    grad_input: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Add the gradient of :func:`roi_pool_forward` to ``grad_input``.

    Args:
        grad_output (Tensor): Shape (K, C, pooled_height, pooled_width).
        rois (Tensor): As in the forward pass.
        argmax (Tensor): As filled by the forward pass.
        grad_input (Tensor): Output, shape (N, C, H, W).
        pooled_height (int): Not read.
        pooled_width (int): Not read.
        spatial_scale (float): Not read.
    """
    _, channels, height, width = grad_input.shape
    image = rois[:, 0].long()[:, None]
    plane = image * channels + torch.arange(channels, device=rois.device)
    index = plane[:, :, None, None] * (height * width) + argmax
    pooled = argmax >= 0
    gradient = torch.zeros_like(_widen(grad_input)).flatten()
    gradient.index_add_(0, index[pooled], grad_output[pooled].to(gradient.dtype))
    grad_input.add_(gradient.view_as(grad_input))


def _class_weights(target: Tensor, weight: Tensor) -> Tensor:
    """Look up the weight of each sample's class.

    Args:
        target (Tensor): Class of each sample, shape (N,), int64. Values outside of
            [0, C) are background, which weighs 1.
        weight (Tensor): Weight of each class, shape (C,).

    Returns:
        Tensor: Shape (N, 1).
    """
    known = (target >= 0) & (target < len(weight))
    weights = weight[target.where(known, 0)]
    return weights.where(known, 1)[:, None]


def _is_class(input: Tensor, target: Tensor) -> Tensor:
    classes = torch.arange(input.shape[1], device=input.device)
    return target[:, None] == classes


def sigmoid_focal_loss_forward(
    input: Tensor,
    target: Tensor,
    weight: Tensor,
    output: Tensor,
    gamma: float,
    alpha: float,
) -> None:
    """Compute the focal loss of independent classes.

    Args:
        input (Tensor): Logits, shape (N, C).
        target (Tensor): Class of each sample, shape (N,), int64. C means background:
            none of the classes.
        weight (Tensor): Weight of the samples of each class, shape (C,); or empty.
        output (Tensor): Output, shape (N, C).
        gamma (float): Exponent of the modulating factor.
        alpha (float): Weight of the positive class; the others weigh ``1 - alpha``.
    """
    logits = _widen(input)
    p, q = logits.sigmoid(), (-logits).sigmoid()
    positive = -alpha * q**gamma * F.logsigmoid(logits)
    negative = -(1 - alpha) * p**gamma * F.logsigmoid(-logits)
    loss = torch.where(_is_class(input, target), positive, negative)
    if weight.numel():
        loss = loss * _class_weights(target, weight)
    output.copy_(loss)


def sigmoid_focal_loss_backward(
    input: Tensor,
    target: Tensor,
    weight: Tensor,
    grad_input: Tensor,
    gamma: float,
    alpha: float,
) -> None:
    """Compute the derivative of each loss with respect to its logit.

    Args:
        input (Tensor): As in the forward pass, and so are the arguments not listed.
        grad_input (Tensor): Output, shape (N, C).
    """
    logits = _widen(input)
    p, q = logits.sigmoid(), (-logits).sigmoid()
    positive = -alpha * q**gamma * (q - gamma * p * F.logsigmoid(logits))
    negative = (1 - alpha) * p**gamma * (p - gamma * q * F.logsigmoid(-logits))
    gradient = torch.where(_is_class(input, target), positive, negative)
    if weight.numel():
        gradient = gradient * _class_weights(target, weight)
    grad_input.copy_(gradient)


def _check_groups(
    input: Tensor, weight: Tensor, offset: Tensor, group: int, deformable_group: int
) -> None:
    """Check the group counts, which torchvision infers from the shapes.

    Raises:
        ValueError: If the shapes do not agree with the arguments.
    """
    if input.shape[1] != weight.shape[1] * group:
        raise ValueError(
            f'input has {input.shape[1]} channels, but weight of shape '
            f'{tuple(weight.shape)} in {group} groups takes {weight.shape[1] * group}'
        )
    expected = 2 * deformable_group * weight.shape[2] * weight.shape[3]
    if offset.shape[1] != expected:
        raise ValueError(
            f'offset has {offset.shape[1]} channels, but {deformable_group} '
            f'deformable groups need {expected}'
        )


def deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    output: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Convolve with a displacement for every position in the kernel.

    Args:
        input (Tensor): Shape (N, C_in, H, W).
        weight (Tensor): Shape (C_out, C_in / group, kH, kW).
        offset (Tensor): Shape (N, deformable_group * kH * kW * 2, H_out, W_out), y
            before x for each position in the kernel.
        output (Tensor): Output, shape (N, C_out, H_out, W_out).
        columns (Tensor): Not touched; workspace of the compiled operator.
        ones (Tensor): Not touched; workspace of the compiled operator.
        kW (int): Width of the kernel.
        kH (int): Height of the kernel.
        dW (int): Horizontal stride.
        dH (int): Vertical stride.
        padW (int): Horizontal padding.
        padH (int): Vertical padding.
        dilationW (int): Horizontal dilation.
        dilationH (int): Vertical dilation.
        group (int): Groups of the convolution.
        deformable_group (int): Groups of input channels that share offsets.
        im2col_step (int): Not read; chunk size of the compiled operator.

    Raises:
        ValueError: If the shapes contradict ``group`` or ``deformable_group``.
    """
    _check_groups(input, weight, offset, group, deformable_group)
    result = _torchvision_ops().deform_conv2d(
        _widen(input),
        _widen(offset),
        _widen(weight),
        stride=(dH, dW),
        padding=(padH, padW),
        dilation=(dilationH, dilationW),
    )
    output.copy_(result)


def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradInput: Tensor,
    gradOffset: Tensor,
    weight: Tensor,
    columns: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Compute what :func:`deform_conv_forward` passes back to input and offset.

    Args:
        input (Tensor): As in the forward pass, and so are the arguments not listed.
        gradOutput (Tensor): Shape (N, C_out, H_out, W_out).
        gradInput (Tensor): Output of the shape of ``input``; the gradient is added.
        gradOffset (Tensor): Output of the shape of ``offset``; overwritten.
    """
    _check_groups(input, weight, offset, group, deformable_group)
    kernel = _widen(weight.detach())

    def convolve(input: Tensor, offset: Tensor) -> Tensor:
        return _torchvision_ops().deform_conv2d(
            input,
            offset,
            kernel,
            stride=(dH, dW),
            padding=(padH, padW),
            dilation=(dilationH, dilationW),
        )

    to_input, to_offset = _gradients(convolve, (input, offset), gradOutput)
    gradInput.add_(to_input)
    gradOffset.copy_(to_offset)


def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradWeight: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    scale: float,
    im2col_step: int,
) -> None:
    """Add what :func:`deform_conv_forward` passes back to ``gradWeight``.

    Args:
        input (Tensor): As in the forward pass, and so are the arguments not listed.
        gradOutput (Tensor): Shape (N, C_out, H_out, W_out).
        gradWeight (Tensor): Output of the shape of the weight.
        scale (float): Factor of the gradient.
    """
    _check_groups(input, gradWeight, offset, group, deformable_group)
    image, displacement = _widen(input.detach()), _widen(offset.detach())

    def convolve(weight: Tensor) -> Tensor:
        return _torchvision_ops().deform_conv2d(
            image,
            displacement,
            weight,
            stride=(dH, dW),
            padding=(padH, padW),
            dilation=(dilationH, dilationW),
        )

    # The convolution is linear in the weight: its gradient is the same everywhere.
    zeros = torch.zeros_like(gradWeight)
    (gradient,) = _gradients(convolve, [zeros], gradOutput)
    gradWeight.add_(gradient, alpha=scale)


def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Convolve with a displacement and a factor for every position in the kernel.

    Args:
        input (Tensor): Shape (N, C_in, H, W).
        weight (Tensor): Shape (C_out, C_in / group, kernel_h, kernel_w).
        bias (Tensor): Shape (C_out,).
        ones (Tensor): Not touched; workspace of the compiled operator.
        offset (Tensor): Shape (N, deformable_group * kernel_h * kernel_w * 2, H_out,
            W_out), y before x for each position in the kernel.
        mask (Tensor): Factors, shape (N, deformable_group * kernel_h * kernel_w,
            H_out, W_out).
        output (Tensor): Output, shape (N, C_out, H_out, W_out).
        columns (Tensor): Not touched; workspace of the compiled operator.
        kernel_h (int): Height of the kernel.
        kernel_w (int): Width of the kernel.
        stride_h (int): Vertical stride.
        stride_w (int): Horizontal stride.
        pad_h (int): Vertical padding.
        pad_w (int): Horizontal padding.
        dilation_h (int): Vertical dilation.
        dilation_w (int): Horizontal dilation.
        group (int): Groups of the convolution.
        deformable_group (int): Groups of input channels that share offsets.
        with_bias (bool): Whether to add the bias.

    Raises:
        ValueError: If the shapes contradict ``group`` or ``deformable_group``.
    """
    _check_groups(input, weight, offset, group, deformable_group)
    result = _torchvision_ops().deform_conv2d(
        _widen(input),
        _widen(offset),
        _widen(weight),
        _widen(bias) if with_bias else None,
        stride=(stride_h, stride_w),
        padding=(pad_h, pad_w),
        dilation=(dilation_h, dilation_w),
        mask=_widen(mask),
    )
    output.copy_(result)


def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Compute what :func:`modulated_deform_conv_forward` passes back.

    Args:
        input (Tensor): As in the forward pass, and so are the arguments not listed.
        grad_input (Tensor): Output of the shape of ``input``; the gradient is added.
        grad_weight (Tensor): Output of the shape of ``weight``; likewise.
        grad_bias (Tensor): Output of the shape of ``bias``; likewise, but only if
            ``with_bias``.
        grad_offset (Tensor): Output of the shape of ``offset``; overwritten.
        grad_mask (Tensor): Output of the shape of ``mask``; overwritten.
        grad_output (Tensor): Shape (N, C_out, H_out, W_out).
    """
    _check_groups(input, weight, offset, group, deformable_group)

    def convolve(input: Tensor, weight: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        return _torchvision_ops().deform_conv2d(
            input,
            offset,
            weight,
            stride=(stride_h, stride_w),
            padding=(pad_h, pad_w),
            dilation=(dilation_h, dilation_w),
            mask=mask,
        )

    to_input, to_weight, to_offset, to_mask = _gradients(
        convolve, (input, weight, offset, mask), grad_output
    )
    grad_input.add_(to_input)
    grad_weight.add_(to_weight)
    grad_offset.copy_(to_offset)
    grad_mask.copy_(to_mask)
    if with_bias:
        grad_bias.add_(_widen(grad_output).sum(dim=(0, 2, 3)))
