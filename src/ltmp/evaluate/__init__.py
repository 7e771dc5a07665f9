"""Accuracy and speed of a reduced model."""

from ..deploy import deployed as deployed
from .accuracy import Evaluation as Evaluation
from .accuracy import ImageRows as ImageRows
from .accuracy import evaluate as evaluate
from .machine import describe_machine as describe_machine
from .timing import Throughput as Throughput
from .timing import measure as measure
