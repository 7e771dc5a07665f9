"""Bulk scoring: every image of a folder, of tars or of Parquet to labels or embeddings; a killed run goes on."""

from .predictor import Predictor as Predictor
from .predictor import Scoring as Scoring
from .ray import RayOptions as RayOptions
from .run import Summary as Summary
from .run import predict as predict
from .sources import find_shards as find_shards
