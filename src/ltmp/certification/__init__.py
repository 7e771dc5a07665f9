"""Certify the smallest budget whose answers provably stay close to the dense model's."""

from ..method.certificate import Certificate as Certificate
from .run import certify as certify
