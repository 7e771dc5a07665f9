"""A self-contained HTML report of what a reduced model loses in accuracy and gains in speed."""

from .collect import Budget as Budget
from .collect import Measured as Measured
from .collect import Report as Report
from .collect import evaluate_budget as evaluate_budget
from .collect import shown_path as shown_path
from .page import write_report as write_report
from .results import read_result as read_result
