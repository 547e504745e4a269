"""How well scores rank positives above negatives: ROC and precision-recall curves, exact over all examples.

Definitions as in Fawcett, An introduction to ROC analysis (2006), and scikit-learn's: ties share one
threshold.
"""

import torch
from torch import Tensor


def ranked_counts(scores: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """True and false positives at each distinct threshold, from the highest down: two (T,) float64."""
    scores, order = scores.double().sort(descending=True, stable=True)
    positive = positive.double()[order]
    last_of_ties = torch.ones(len(scores), dtype=torch.bool)
    last_of_ties[:-1] = scores[1:] != scores[:-1]
    true_positives = positive.cumsum(0)[last_of_ties]
    total = torch.arange(1, len(scores) + 1, dtype=torch.float64)[last_of_ties]
    return true_positives, total - true_positives


def roc_curve(scores: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """False and true positive rates from (0, 0) to (1, 1): two (T+1,) float64; NaN where a class is
    absent."""
    true_positives, false_positives = ranked_counts(scores, positive)
    start = torch.zeros(1, dtype=torch.float64)
    rates = (false_positives / false_positives[-1:], true_positives / true_positives[-1:])
    return torch.cat([start, rates[0]]), torch.cat([start, rates[1]])


def precision_recall_curve(scores: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """Precision and recall from the highest threshold down: two (T,) float64."""
    true_positives, false_positives = ranked_counts(scores, positive)
    return true_positives / (true_positives + false_positives), true_positives / true_positives[-1:]


def roc_auc(scores: Tensor, positive: Tensor) -> float:
    """Area under the ROC curve: the chance that a positive outscores a negative, ties counting half."""
    if not len(scores):
        return float("nan")
    false_rate, true_rate = roc_curve(scores, positive)
    return float(torch.trapezoid(true_rate, false_rate))


def average_precision(scores: Tensor, positive: Tensor) -> float:
    """Area under the precision-recall steps (no interpolation, which would flatter)."""
    if not len(scores):
        return float("nan")
    precision, recall = precision_recall_curve(scores, positive)
    steps = torch.diff(recall, prepend=torch.zeros(1, dtype=torch.float64))
    return float((precision * steps).sum())
