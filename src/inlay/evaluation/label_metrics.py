"""Metrics of classification and of regression, as GLUE has them."""

from __future__ import annotations

from typing import Any

import numpy as np


def classified(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return accuracy, F1 and Matthews' correlation of `logits` (rows × labels) against `labels` (rows,).

    F1 is that of the second of two labels, as in GLUE, and the mean over labels where there are more. Matthews'
    correlation of more than two labels is Gorodkin's R_k (2004).
    """
    size, predicted = logits.shape[1], logits.argmax(1)
    table = np.zeros((size, size))  # true label × predicted label
    np.add.at(table, (labels, predicted), 1)
    right = table.diagonal()
    of_label = table.sum(1)
    of_prediction = table.sum(0)
    total = len(labels)
    f1 = 2 * right / np.maximum(of_label + of_prediction, 1)
    spread = np.sqrt(total**2 - (of_label @ of_label)) * np.sqrt(total**2 - (of_prediction @ of_prediction))
    matthews = (right.sum() * total - of_label @ of_prediction) / spread if spread else 0.0
    return {
        "accuracy": float(right.sum() / total),
        "f1": float(f1[1] if size == 2 else f1.mean()),
        "matthews": float(matthews),
    }


def correlated(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return Pearson's and Spearman's correlation; 0 where one side does not vary."""
    from scipy import stats  # half a second

    scores = scores.reshape(-1)
    if np.ptp(scores) == 0 or np.ptp(labels) == 0:
        return {"pearson": 0.0, "spearman": 0.0}
    measures: dict[str, Any] = {"pearson": stats.pearsonr, "spearman": stats.spearmanr}
    return {name: float(measure(scores, labels).statistic) for name, measure in measures.items()}
