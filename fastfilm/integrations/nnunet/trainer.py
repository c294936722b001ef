"""``nnUNetTrainerFastFiLM``: nnU-Net's trainer on a converted, and if asked for conditioned, network."""

from __future__ import annotations

from typing import Any

import torch
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor, nn

import fastfilm

from . import cases
from .settings import settings

KEY = "fastfilm"
"""Entry of ``plans.json`` that describes the metadata."""


class nnUNetTrainerFastFiLM(nnUNetTrainer):
    """nnU-Net's default trainer with ``fastfilm.convert``, and ``fastfilm.condition`` on columns of a table.

    ``FASTFILM_NNUNET_TABLE`` and ``FASTFILM_NNUNET_COLUMNS`` name the table and its columns; without them the
    network is converted only. The description of the columns goes into ``plans.json`` beside the results, means
    and standard deviations into the weights, so that ``nnUNetv2_predict`` needs only the values of the cases at
    hand (``FASTFILM_NNUNET_META``, or ``fastfilm.integrations.nnunet.predict`` for a table).
    """

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008 (nnU-Net's own signature)
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        chosen = settings()
        if chosen.epochs is not None:
            self.num_epochs: int = chosen.epochs
        if chosen.iterations is not None:
            self.num_iterations_per_epoch = chosen.iterations
            self.num_val_iterations_per_epoch = chosen.iterations
        self.generator_weight_decay = self.weight_decay
        self.rows: dict[str, list[float]] = {}
        self.now: Tensor | None = None

    def initialize(self) -> None:
        chosen = settings()
        if not self.was_initialized and chosen.table:
            self.dataset_class = infer_dataset_class(self.preprocessed_dataset_folder)
            training, validation = self.do_split()
            values = cases.read(chosen.table, chosen.columns, [*training, *validation])
            description = cases.describe(values, chosen.columns)
            self.rows = {case: cases.row(v, description, case) for case, v in values.items()}
            self.plans_manager.plans[KEY] = {"columns": description, "where": chosen.where}
        super().initialize()
        if self.rows:
            mean = torch.tensor([self.rows[case] for case in training])
            for module in self.network.modules():
                if isinstance(module, cases.Columns):
                    module.fit(mean)
            self.network.register_forward_pre_hook(self._give_metadata, with_kwargs=True)

    def _give_metadata(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if self.now is None:
            raise RuntimeError("the network was called without a case whose metadata it could have")
        return args, {**kwargs, "metadata": self.now.to(self.device)}

    @staticmethod
    def build_network_architecture(
        plans_manager: Any,
        configuration_manager: Any,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """nnU-Net's network, converted; conditioned where the plans say so."""
        network = nnUNetTrainer.build_network_architecture(
            plans_manager,
            configuration_manager,
            num_input_channels,
            num_output_channels,
            enable_deep_supervision,
        )
        said = plans_manager.plans.get(KEY)
        if said is not None:
            encoder = cases.Columns(said["columns"])
            fastfilm.condition(network, encoder.size, encoder=encoder, where=said["where"])
            meta = settings().meta
            if meta:
                row = torch.tensor([cases.row(meta, said["columns"], "FASTFILM_NNUNET_META")])
                network.register_forward_pre_hook(
                    lambda module, args, kwargs: (args, {"metadata": row, **kwargs}),
                    with_kwargs=True,
                )
        return fastfilm.convert(network)

    def configure_optimizers(self) -> Any:
        if not self.rows:
            return super().configure_optimizers()
        groups = fastfilm.parameter_groups(
            self.network,
            weight_decay=self.weight_decay,
            generator_weight_decay=self.generator_weight_decay,
        )
        optimizer = torch.optim.SGD(groups, self.initial_lr, momentum=0.99, nesterov=True)
        return optimizer, PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs)

    def _take(self, batch: dict[str, Any]) -> None:
        if self.rows:
            self.now = torch.tensor([self.rows[str(key)] for key in batch["keys"]])

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        self._take(batch)
        return super().train_step(batch)

    def validation_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        self._take(batch)
        return super().validation_step(batch)

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        kind, trainer = self.dataset_class, self

        class Watched(kind):  # type: ignore[misc,valid-type]
            def load_case(self, identifier: str) -> Any:
                if trainer.rows:
                    trainer.now = torch.tensor([trainer.rows[identifier]])
                return super().load_case(identifier)

        self.dataset_class = Watched
        try:
            super().perform_actual_validation(save_probabilities)
        finally:
            self.dataset_class = kind
