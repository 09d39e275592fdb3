"""How good predictions of clicks are: AUC, log loss, normalized entropy."""

# N samples

import math

import torch
from torch.nn import functional
from torchmetrics.functional.classification import binary_auroc


def click_metrics(
    logits_N: torch.Tensor, labels_N: torch.Tensor, weights_N: torch.Tensor
) -> dict[str, float]:
    """AUC, log loss and normalized entropy of predictions.

    Args:
        logits_N: Predicted log odds, float [N].
        labels_N: 0 or 1, float [N].
        weights_N: 1 for samples that count and 0 for those that do not, float [N].

    Returns:
        `auc` (torchmetrics' exact one; NaN where all labels are equal), `log_loss` (mean, nats),
        `normalized_entropy` (log loss by that of predicting the mean of these labels, He et al.,
        ADKDD 2014, equation 3; NaN likewise), `click_rate` and `num_samples`.

    Raises:
        ValueError: No sample counts, or a prediction is not finite.

    Example:
        >>> click_metrics(torch.tensor([2.0, -1.0]), torch.tensor([1.0, 0.0]), torch.ones(2))["auc"]
        1.0
    """
    counts = weights_N > 0
    logits_N, labels_N = logits_N[counts].double(), labels_N[counts].double()
    if len(labels_N) == 0:
        raise ValueError("there are no samples to evaluate on")
    if not torch.isfinite(logits_N).all():
        raise ValueError("predictions are not finite; lower the learning rates")
    rate = float(labels_N.mean())
    log_loss = float(functional.binary_cross_entropy_with_logits(logits_N, labels_N))
    mixed = 0.0 < rate < 1.0
    entropy = -(rate * math.log(rate) + (1 - rate) * math.log1p(-rate)) if mixed else math.nan
    auc = float(binary_auroc(logits_N.sigmoid(), labels_N.long())) if mixed else math.nan
    return {
        "auc": auc,
        "log_loss": log_loss,
        "normalized_entropy": log_loss / entropy,
        "click_rate": rate,
        "num_samples": len(labels_N),
    }
