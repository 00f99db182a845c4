"""IoU of single classes."""

import torch
from mmseg.evaluation import IoUMetric
from mmseg.registry import METRICS


@METRICS.register_module()
class ClassIoUMetric(IoUMetric):
    """IoUMetric that returns the IoU of every class as well, as ``IoU.<class>``.

    In percent, as its other figures; 0 for a class that is neither there nor predicted.
    """

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Add the classes to what MMSegmentation computes."""
        metrics = super().compute_metrics(results)
        intersect, union = (sum(areas) for areas in list(zip(*results))[:2])
        ious = torch.nan_to_num(100 * intersect / union)
        for name, iou in zip(self.dataset_meta['classes'], ious.tolist()):
            metrics[f'IoU.{name}'] = round(iou, 2)
        return metrics
