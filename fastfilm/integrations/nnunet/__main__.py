"""``python -m fastfilm.integrations.nnunet``: the folder to put into ``nnUNet_extTrainer``."""

from pathlib import Path

if __name__ == "__main__":
    print(Path(__file__).parent / "trainers")
