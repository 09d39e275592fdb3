"""Click metrics against what they are by definition."""

import math

import pytest
import torch

from shardemb.metrics import click_metrics


def test_metrics_are_what_they_are_by_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    logits_N = torch.randn(500, generator=generator).round(decimals=1)  # with ties
    labels_N = (torch.rand(500, generator=generator) < logits_N.sigmoid()).float()
    metrics = click_metrics(logits_N, labels_N, torch.ones(500))
    positive, negative = logits_N[labels_N == 1], logits_N[labels_N == 0]
    wins = (positive[:, None] > negative).double() + 0.5 * (positive[:, None] == negative).double()
    assert metrics["auc"] == pytest.approx(float(wins.mean()), abs=1e-6)
    chances = torch.where(labels_N == 1, logits_N.sigmoid(), 1 - logits_N.sigmoid()).double()
    assert metrics["log_loss"] == pytest.approx(-float(chances.log().mean()), abs=1e-6)
    rate = float(labels_N.mean())
    entropy = -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate))
    assert metrics["normalized_entropy"] == pytest.approx(metrics["log_loss"] / entropy)
    assert metrics["click_rate"] == pytest.approx(rate)
    assert metrics["num_samples"] == 500


def test_samples_of_weight_0_do_not_count() -> None:
    logits_N = torch.tensor([2.0, -1.0, 9.0])
    labels_N = torch.tensor([1.0, 0.0, 0.0])
    some = click_metrics(logits_N, labels_N, torch.tensor([1.0, 1.0, 0.0]))
    assert some == click_metrics(logits_N[:2], labels_N[:2], torch.ones(2))
    assert some["auc"] == 1.0
    assert click_metrics(logits_N, labels_N, torch.ones(3))["auc"] == 0.5


def test_labels_of_one_kind_have_no_auc() -> None:
    metrics = click_metrics(torch.zeros(4), torch.ones(4), torch.ones(4))
    assert math.isnan(metrics["auc"])
    assert math.isnan(metrics["normalized_entropy"])
    with pytest.raises(ValueError, match="no samples to evaluate on"):
        click_metrics(torch.zeros(4), torch.ones(4), torch.zeros(4))
    with pytest.raises(ValueError, match="predictions are not finite; lower the learning rates"):
        click_metrics(torch.tensor([0.0, math.nan]), torch.ones(2), torch.ones(2))
