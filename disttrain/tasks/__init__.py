"""LightningModules that keep the gradient and the metrics exact at every world size."""

from disttrain.tasks.base import Task
from disttrain.tasks.classification import ClassificationTask
from disttrain.tasks.regression import RegressionTask

__all__ = ["ClassificationTask", "RegressionTask", "Task"]
