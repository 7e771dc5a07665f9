"""Bulk scoring: labels or embeddings for every image in a folder, tars or Parquet files; killed runs can be resumed."""

from .predictor import Predictor as Predictor
from .predictor import Scoring as Scoring
from .ray import RayOptions as RayOptions
from .run import Summary as Summary
from .run import predict as predict
from .sources import find_shards as find_shards
