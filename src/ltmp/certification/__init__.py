"""A guarantee instead of a promise: the smallest budget that provably answers like the dense model."""

from ..method.certificate import Certificate as Certificate
from .run import certify as certify
