"""Learn the thresholds of an attached model against a budget."""

from .answers import Distribution as Distribution
from .calibrate import calibrate as calibrate
from .dial import DialResult as DialResult
from .dial import learn_dial as learn_dial
from .log import Logger as Logger
from .log import TensorBoard as TensorBoard
from .log import WandB as WandB
from .log import open_log as open_log
from .loop import LearnResult as LearnResult
from .loop import learn as learn
from .optimiser import Step as Step
from .probe import learn_probe as learn_probe
from .tune import tune as tune
from .tune import views_of as views_of
from .weights import Tuning as Tuning
