"""One self-contained HTML page about what a reduced model gives up and what it gains."""

from .collect import Budget as Budget
from .collect import Measured as Measured
from .collect import Report as Report
from .collect import evaluate_budget as evaluate_budget
from .collect import shown_path as shown_path
from .page import write_report as write_report
from .results import read_result as read_result
