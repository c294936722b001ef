"""nnU-Net: a trainer that ``nnUNetv2_train -tr nnUNetTrainerFastFiLM`` finds; see ``docs/recipes.md``."""
