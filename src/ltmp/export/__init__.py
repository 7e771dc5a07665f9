"""Export an attached model to a verified file for another runtime."""

from .job import FORMATS as FORMATS
from .job import Plan as Plan
from .job import export as export
from .job import in_runtime as in_runtime
from .runtimes import ExportedModel as ExportedModel
from .verify import Verification as Verification
