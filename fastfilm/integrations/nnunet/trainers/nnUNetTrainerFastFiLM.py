"""What ``nnUNet_extTrainer`` leads nnU-Net to; the trainer itself is a module that can be imported by name."""

from fastfilm.integrations.nnunet.trainer import nnUNetTrainerFastFiLM

__all__ = ["nnUNetTrainerFastFiLM"]
