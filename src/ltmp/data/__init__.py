"""Datasets for learning and evaluation: folders, tars, timm's datasets, and the demo's digits."""

from .dataset import Broken as Broken
from .dataset import Images as Images
from .dataset import check_classes as check_classes
from .dataset import open_dataset as open_dataset
from .dataset import read_names as read_names
from .embedded import load_digits as load_digits
from .images import read_image as read_image
from .loader import Loader as Loader
from .loader import make_loader as make_loader
from .names import class_names as class_names
from .transforms import eval_transform as eval_transform
from .transforms import image_mode as image_mode
from .transforms import input_channels as input_channels
from .transforms import sharp_view as sharp_view
from .transforms import train_transform as train_transform
