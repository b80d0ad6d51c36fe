"""The metric of a configuration, with the zero of its score."""

from __future__ import annotations

from omegaconf import DictConfig

from circuitkit.config import build
from circuitkit.core.errors import ConfigError
from circuitkit.metrics import Metric


def metric_of(config: DictConfig) -> Metric:
    """The metric that the configuration names.

    Raises:
        ConfigError: ``score.zero`` is set, and the metric goes on with another one.
    """
    metric: Metric = build(config.metric, Metric)
    if config.score.zero is not None and metric.floor != config.score.zero:
        raise ConfigError(
            f"score.zero is {config.score.zero}, but the metric {metric.name} takes {metric.floor} for its 0 %. Add the line "
            "`zero: ${score.zero}` to its configuration (its class has to take it, as Metric does), or leave score.zero out."
        )
    return metric
