"""Stand-in for ``mmcv._ext``, the compiled operators behind ``mmcv.ops``.

Imported under the name ``mmcv._ext`` when mmcv was installed without its compiled
extension. Every function is called as mmcv 2.1.0 calls the operator of the same name:
most of them fill tensors that the caller allocated, and what mmcv passes by name
arrives in a dict. What torchvision offers is taken from there; the rest is plain
PyTorch.

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
        'Install the compiled mmcv for it: `make install MMCV_OPS=1`, or '
        '`pip uninstall mmcv-lite` and `pip install mmcv==2.1.0` where there is a '
        'wheel or a compiler.'
    )


def _torchvision_ops() -> ModuleType:
    """Import ``torchvision.ops`` on first use; ImportError says what is missing."""
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
    """Compute the gradient of ``function(*tensors)`` by each of the tensors.

    It is given that by the output, and in float32 for tensors of half precision.
    """
    # mmcv calls the operators from a backward pass, which records no graph.
    with torch.enable_grad():
        leaves = [_widen(tensor.detach()).requires_grad_() for tensor in tensors]
        output = function(*leaves)
        return torch.autograd.grad(output, leaves, grad_output.to(output.dtype))


def get_compiler_version() -> str:
    """Answer as mmcv does when it has no operators."""
    return 'n/a'


get_compiling_cuda_version = get_compiler_version


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


def _overlaps(
    boxes: Tensor, others: Tensor, offset: int, of_first: bool = False
) -> Tensor:
    """Compute the IoU of boxes whose leading dimensions broadcast.

    Args:
        boxes (Tensor): Shape (..., 4), as (x1, y1, x2, y2).
        others (Tensor): Likewise.
        offset (int): As for :func:`nms`.
        of_first (bool): Whether to divide by the area of ``boxes``, not of the union.

    Returns:
        Tensor: Shape (...), in the dtype of the boxes. NaN where the area is zero.
    """
    low = torch.maximum(boxes[..., :2], others[..., :2])
    high = torch.minimum(boxes[..., 2:], others[..., 2:])
    overlap = (high - low + offset).clamp(min=0).prod(dim=-1)
    area, other = ((b[..., 2:] - b[..., :2] + offset).prod(-1) for b in (boxes, others))
    return overlap / (area if of_first else area + other - overlap)


def bbox_overlaps(
    boxes: Tensor, others: Tensor, ious: Tensor, mode: int, aligned: bool, offset: int
) -> None:
    """Compute how far boxes overlap.

    Args:
        boxes (Tensor): Shape (M, 4), as (x1, y1, x2, y2).
        others (Tensor): Shape (N, 4).
        ious (Tensor): Output, shape (M, N), or (M,) if ``aligned``.
        mode (int): What the intersection is divided by: 0 for the union, 1 for the
            area of the first box.
        aligned (bool): Whether to compare in pairs and not each with each.
        offset (int): As for :func:`nms`.
    """
    first = _widen(boxes if aligned else boxes[:, None])
    ious.copy_(_overlaps(first, _widen(others), offset, of_first=mode == 1))


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
        boxes (Tensor): As for :func:`nms`, and so are ``scores`` and ``offset``.
        dets (Tensor): Output, shape (N, 5). As many leading rows as boxes are kept
            are filled with box and new score.
        iou_threshold (float): Methods 0 and 1 lower the score from this IoU on.
        sigma (float): Width of method 2.
        min_score (float): Boxes whose new score is below are dropped.
        method (int): 0 sets the score to zero, 1 multiplies it by ``1 - iou``, 2
            multiplies it by ``exp(-iou**2 / sigma)``.

    Returns:
        Tensor: Indices of the boxes kept, in descending order of new score, int64.
    """
    corners, scores = _widen(boxes), _widen(scores).clone()
    left = torch.arange(len(boxes), device=boxes.device)
    kept = []
    while len(left):
        best = left[scores[left].argmax()]
        kept.append(best)
        left = left[left != best]
        # Two boxes without area give 0 / 0, which is no overlap.
        iou = _overlaps(corners[left], corners[best], offset).nan_to_num(nan=0.0)
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


def _roi_align(input: Tensor, rois: Tensor, options: dict[str, Any]) -> Tensor:
    if options['pool_mode'] != 1:
        raise _not_offered("roi_align with pool_mode='max'")
    return _torchvision_ops().roi_align(
        input,
        rois.to(input.dtype),
        (options['aligned_height'], options['aligned_width']),
        options['spatial_scale'],
        options['sampling_ratio'],
        options['aligned'],
    )


def roi_align_forward(
    input: Tensor, rois: Tensor, output: Tensor, *argmax: Tensor, **options: Any
) -> None:
    """Average bilinear samples in the bins of each region.

    Args:
        input (Tensor): Shape (N, C, H, W).
        rois (Tensor): Shape (K, 5), as (index into N, x1, y1, x2, y2).
        output (Tensor): Output, shape (K, C, aligned_height, aligned_width).
        *argmax (Tensor): Not touched; for the maximum.
        **options: ``aligned_height`` and ``aligned_width``, the numbers of bins;
            ``spatial_scale`` from box to input coordinates; ``sampling_ratio``,
            samples per bin in each direction, 0 for as many as it has pixels;
            ``aligned``, whether to shift the regions by half a pixel; ``pool_mode``,
            1 for the average.

    Raises:
        NotImplementedError: If ``pool_mode`` is 0, the maximum.
    """
    output.copy_(_roi_align(_widen(input), rois, options))


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    **options: Any,
) -> None:
    """Add the gradient of :func:`roi_align_forward` to ``grad_input`` (N, C, H, W)."""
    # The average is linear in the input: its gradient is the same everywhere.
    (gradient,) = _gradients(
        lambda input: _roi_align(input, rois, options),
        [torch.zeros_like(grad_input)],
        grad_output,
    )
    grad_input.add_(gradient)


def _focal_loss(
    logits: Tensor, target: Tensor, weight: Tensor, gamma: float, alpha: float
) -> Tensor:
    log_p, log_q = F.logsigmoid(logits), F.logsigmoid(-logits)
    # A power of zero would have no usable derivative, its logarithm has.
    positive = -alpha * torch.exp(gamma * log_q) * log_p
    negative = -(1 - alpha) * torch.exp(gamma * log_p) * log_q
    classes = torch.arange(logits.shape[1], device=logits.device)
    loss = torch.where(target[:, None] == classes, positive, negative)
    if weight.numel():
        known = (target >= 0) & (target < len(weight))
        loss = loss * weight[target.where(known, 0)].where(known, 1)[:, None]
    return loss


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
            none of the classes. It weighs 1.
        weight (Tensor): Weight of the samples of each class, shape (C,); or empty.
        output (Tensor): Output, shape (N, C).
        gamma (float): Exponent of the modulating factor.
        alpha (float): Weight of the positive class; the others weigh ``1 - alpha``.
    """
    output.copy_(_focal_loss(_widen(input), target, weight, gamma, alpha))


def sigmoid_focal_loss_backward(
    input: Tensor,
    target: Tensor,
    weight: Tensor,
    grad_input: Tensor,
    gamma: float,
    alpha: float,
) -> None:
    """Put the derivative of each loss by its logit into ``grad_input`` (N, C)."""
    (gradient,) = _gradients(
        lambda logits: _focal_loss(logits, target, weight, gamma, alpha),
        [input],
        torch.ones_like(input),
    )
    grad_input.copy_(gradient)


def _deform_conv(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    geometry: dict[str, Any],
) -> Tensor:
    """Call torchvision's operator.

    Args:
        input (Tensor): Shape (N, C_in, H, W).
        offset (Tensor): Shape (N, deformable_group * kH * kW * 2, H_out, W_out), y
            before x for each position in the kernel.
        weight (Tensor): Shape (C_out, C_in / group, kH, kW).
        mask (Tensor, optional): Factors, shape (N, deformable_group * kH * kW, H_out,
            W_out).
        geometry (dict): See :func:`_pairs`, and ``group`` and ``deformable_group``,
            which torchvision infers from the shapes.

    Returns:
        Tensor: Shape (N, C_out, H_out, W_out).

    Raises:
        ValueError: If the shapes contradict the numbers of groups.
    """
    group, deformable_group = geometry['group'], geometry['deformable_group']
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
    stride, padding, dilation = _pairs(geometry)
    return _torchvision_ops().deform_conv2d(
        input, offset, weight, None, stride, padding, dilation, mask
    )


def _pairs(geometry: dict[str, Any]) -> list[tuple[int, int]]:
    """Stride, padding and dilation, each for y and x.

    Args:
        geometry (dict): ``dH``, ``dW``, ``padH``, ``padW``, ``dilationH`` and
            ``dilationW``; the modulated operator calls them ``stride_h``,
            ``stride_w``, ``pad_h``, ``pad_w``, ``dilation_h`` and ``dilation_w``.
    """
    modulated = 'stride_h' in geometry
    names = ('stride_', 'pad_', 'dilation_') if modulated else ('d', 'pad', 'dilation')
    y, x = 'hw' if modulated else 'HW'
    return [(geometry[name + y], geometry[name + x]) for name in names]


def _clear_border(
    grad_offset: Tensor, offset: Tensor, weight: Tensor, geometry: dict[str, Any]
) -> Tensor:
    """Clear the gradient of offsets that lead exactly one pixel outside.

    A sample there has a derivative on one side only. torchvision returns it, mmcv
    returns zero. The offsets of an untrained layer, all of them zero, lead there
    wherever there is padding. Arguments are as for :func:`_deform_conv`.
    """
    kernel = weight.shape[2:]
    stride, padding, dilation = _pairs(geometry)
    # Where the samples are before they are displaced: (kH, H_out) and (kW, W_out).
    y, x = (
        torch.arange(kernel[i], device=offset.device)[:, None] * dilation[i]
        + torch.arange(offset.shape[2 + i], device=offset.device) * stride[i]
        - padding[i]
        for i in (0, 1)
    )
    shift_y, shift_x = _widen(offset).unflatten(1, (-1, *kernel, 2)).unbind(4)
    outside = (shift_y + y[:, None, :, None] == -1, shift_x + x[:, None] == -1)
    return grad_offset.masked_fill(torch.stack(outside, dim=4).flatten(1, 4), 0)


def deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    output: Tensor,
    *workspace: Tensor,
    **geometry: Any,
) -> None:
    """Convolve with a displacement for every position in the kernel.

    Into ``output``; arguments are as for :func:`_deform_conv`, and the workspace is not
    touched.
    """
    tensors = _widen(input), _widen(offset), _widen(weight)
    output.copy_(_deform_conv(*tensors, None, geometry))


def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradInput: Tensor,
    gradOffset: Tensor,
    weight: Tensor,
    *workspace: Tensor,
    **geometry: Any,
) -> None:
    """Compute what :func:`deform_conv_forward` passes back to input and offset.

    It is added to ``gradInput``, and takes the place of what is in ``gradOffset``.
    """
    to_input, to_offset = _gradients(
        lambda input, offset: _deform_conv(
            input, offset, _widen(weight.detach()), None, geometry
        ),
        (input, offset),
        gradOutput,
    )
    gradInput.add_(to_input)
    gradOffset.copy_(_clear_border(to_offset, offset, weight, geometry))


def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradWeight: Tensor,
    *workspace: Tensor,
    scale: float,
    **geometry: Any,
) -> None:
    """Add ``scale`` times the gradient by the weight to ``gradWeight``."""
    image, displacement = _widen(input.detach()), _widen(offset.detach())
    # The convolution is linear in the weight: its gradient is the same everywhere.
    (gradient,) = _gradients(
        lambda weight: _deform_conv(image, displacement, weight, None, geometry),
        [torch.zeros_like(gradWeight)],
        gradOutput,
    )
    gradWeight.add_(gradient, alpha=scale)


def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    *workspace: Tensor,
    with_bias: bool,
    **geometry: Any,
) -> None:
    """Convolve with a displacement and a factor for every position in the kernel.

    Into ``output``; arguments are as for :func:`_deform_conv`, and ones and workspace
    are not touched. The bias is (C_out,).
    """
    tensors = _widen(input), _widen(offset), _widen(weight), _widen(mask)
    result = _deform_conv(*tensors, geometry)
    output.copy_(result + _widen(bias)[:, None, None] if with_bias else result)


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
    with_bias: bool,
    **geometry: Any,
) -> None:
    """Compute what :func:`modulated_deform_conv_forward` passes back.

    It is added to the gradients of input, weight and bias, and takes the place of what
    is in those of offset and mask.
    """
    to_input, to_offset, to_weight, to_mask = _gradients(
        lambda *tensors: _deform_conv(*tensors, geometry),
        (input, offset, weight, mask),
        grad_output,
    )
    grad_input.add_(to_input)
    grad_weight.add_(to_weight)
    grad_offset.copy_(_clear_border(to_offset, offset, weight, geometry))
    grad_mask.copy_(to_mask)
    if with_bias:
        grad_bias.add_(_widen(grad_output).sum(dim=(0, 2, 3)))
