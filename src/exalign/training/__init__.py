"""One loop, and the tasks that give it batches and a loss."""

from exalign.training.align import AlignSettings, check_groups, train_align, with_reference_logp
from exalign.training.classifier import ClassifierSettings, train_classifier
from exalign.training.guards import NotFiniteError
from exalign.training.loop import Task, train
from exalign.training.ppo import PPOSettings, Surroundings, train_ppo
from exalign.training.recovery import recover
from exalign.training.reward_model import RewardModelSettings, train_reward_model
from exalign.training.settings import TrainSettings
from exalign.training.sft import SFTSettings, nats_per_token, train_sft

__all__ = [
    "AlignSettings",
    "ClassifierSettings",
    "NotFiniteError",
    "PPOSettings",
    "RewardModelSettings",
    "SFTSettings",
    "Surroundings",
    "Task",
    "TrainSettings",
    "check_groups",
    "nats_per_token",
    "recover",
    "train",
    "train_align",
    "train_classifier",
    "train_ppo",
    "train_reward_model",
    "train_sft",
    "with_reference_logp",
]
