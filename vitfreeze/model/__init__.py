"""The models, their targets, and other people's weights: LocalMIM, HOG, the fine-tuned classifier, conversions."""

from vitfreeze.model.classifier import Classifier, averaged_weights
from vitfreeze.model.convert import from_localmim, from_mae, to_timm
from vitfreeze.model.hog import hog_targets
from vitfreeze.model.local_mim import LocalMIM, Target, check_state
from vitfreeze.model.targets import Pixels

__all__ = [
    "Classifier",
    "LocalMIM",
    "Pixels",
    "Target",
    "averaged_weights",
    "check_state",
    "from_localmim",
    "from_mae",
    "hog_targets",
    "to_timm",
]
