"""What a reduced model gives up and what it gains."""

from .accuracy import Evaluation as Evaluation
from .accuracy import ImageRows as ImageRows
from .accuracy import deployed as deployed
from .accuracy import evaluate as evaluate
from .machine import describe_machine as describe_machine
from .throughput import Throughput as Throughput
from .throughput import measure as measure
