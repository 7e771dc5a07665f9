"""Learn the thresholds of an attached model against a budget."""

from .calibrate import calibrate as calibrate
from .loop import LearnResult as LearnResult
from .loop import learn as learn
from .run import Step as Step
