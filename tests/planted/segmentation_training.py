"""Faults in fastfilm/segmentation: losses, optimisation, checkpoints, the training loop."""

from __future__ import annotations

from tests.planted.fault import Fault

LOSSES = "tests/segmentation/training/test_losses.py"
OPTIMISATION = (
    "tests/segmentation/training/test_optimisation.py "
    "tests/segmentation/training/test_sampling.py -k 'optimisation or decay'"
)
CHECKPOINTS = "tests/segmentation/training/test_checkpoints.py"
TUNED = "tests/segmentation/training/test_fold.py -k fine_tuning"
EARLY = "tests/segmentation/training/test_fold.py -k early"

FAULTS = (
    # losses and optimisation
    Fault(
        "segmentation-losses-unknown-labels-count",
        "fastfilm/segmentation/training/losses.py",
        "_patterns(known, logits.device)",
        "_patterns(torch.ones_like(known), logits.device)",
        LOSSES,
    ),
    Fault(
        "segmentation-losses-means-of-parts",
        "fastfilm/segmentation/training/losses.py",
        "/ totals[name].clamp(min=1)",
        "/ self.weights(known)[name].clamp(min=1)",
        LOSSES,
    ),
    Fault(
        "segmentation-losses-totals-of-entries-for-samples",
        "fastfilm/segmentation/training/losses.py",
        "samples if n in self.by_sample else entries",
        "entries",
        LOSSES,
    ),
    Fault(
        "segmentation-losses-unknown-class-left-out-of-the-background",
        "fastfilm/segmentation/training/losses.py",
        "if c - 1 not in labels]",
        "if c == 0]",
        LOSSES,
    ),
    Fault(
        "segmentation-losses-deep-supervision-alike",
        "fastfilm/segmentation/training/losses.py",
        "[0.5**i for",
        "[1.0 for",
        LOSSES,
    ),
    Fault(
        "segmentation-losses-deep-supervision-not-a-mean",
        "fastfilm/segmentation/training/losses.py",
        "shares / shares.sum()",
        "shares",
        LOSSES,
    ),
    Fault(
        "segmentation-losses-coarse-masks-between-0-and-1",
        "fastfilm/segmentation/training/losses.py",
        'mode="nearest-exact"',
        'mode="area"',
        LOSSES,
    ),
    Fault(
        "segmentation-losses-coarse-masks-shifted",
        "fastfilm/segmentation/training/losses.py",
        'mode="nearest-exact"',
        'mode="nearest"',
        LOSSES,
    ),
    Fault(
        "segmentation-losses-empty-label-costs",
        "fastfilm/segmentation/training/losses.py",
        "smooth_nr=1e-5",
        "smooth_nr=0.0",
        LOSSES,
    ),
    Fault(
        "segmentation-losses-sides-of-tversky-swapped",
        "fastfilm/segmentation/training/losses.py",
        "alpha=alpha, beta=1 - alpha",
        "alpha=1 - alpha, beta=alpha",
        LOSSES,
    ),
    Fault(
        "segmentation-losses-gamma-of-focal-ignored",
        "fastfilm/segmentation/training/losses.py",
        "gamma=gamma",
        "gamma=1.0",
        LOSSES,
    ),
    Fault(
        "segmentation-losses-background-counts-as-a-class",
        "fastfilm/segmentation/training/losses.py",
        'act["include_background"] = False',
        'act["include_background"] = True',
        LOSSES,
    ),
    Fault(
        "segmentation-optimisation-average-starts-cold",
        "fastfilm/segmentation/training/optimisation.py",
        "min(self.decay, (1 + step) / (10 + step))",
        "self.decay",
        OPTIMISATION,
    ),
    Fault(
        "segmentation-optimisation-average-never-forgets",
        "fastfilm/segmentation/training/optimisation.py",
        ".lerp_(v, 1 - decay)",
        ".lerp_(v, decay)",
        OPTIMISATION,
    ),
    Fault(
        "segmentation-optimisation-generators-decay-as-weights",
        "fastfilm/segmentation/training/optimisation.py",
        "film if id(p) in generator else weights",
        "weights",
        OPTIMISATION,
    ),
    Fault(
        "segmentation-optimisation-biases-decay",
        "fastfilm/segmentation/training/optimisation.py",
        "p.ndim < 2",
        "p.ndim < 1",
        OPTIMISATION,
    ),
    Fault(
        "segmentation-optimisation-momentum-of-the-past",
        "fastfilm/segmentation/training/optimisation.py",
        "nesterov=config.momentum > 0",
        "nesterov=False",
        OPTIMISATION,
    ),
    Fault(
        "segmentation-optimisation-warm-up-from-0",
        "fastfilm/segmentation/training/optimisation.py",
        "base * (step + 1) /",
        "base * step /",
        OPTIMISATION,
    ),
    Fault(
        "segmentation-optimisation-schedule-counts-the-warm-up",
        "fastfilm/segmentation/training/optimisation.py",
        "(step - config.warmup_steps) / max",
        "step / max",
        OPTIMISATION,
    ),
    Fault(
        "segmentation-optimisation-cosine-to-the-half",
        "fastfilm/segmentation/training/optimisation.py",
        "math.cos(math.pi * done)",
        "math.cos(math.pi / 2 * done)",
        OPTIMISATION,
    ),
    Fault(
        "segmentation-optimisation-power-ignored",
        "fastfilm/segmentation/training/optimisation.py",
        "(1 - done) ** config.poly_power",
        "(1 - done)",
        OPTIMISATION,
    ),
    Fault(
        "segmentation-optimisation-plateau-halves",
        "fastfilm/segmentation/training/optimisation.py",
        "config.plateau_factor**progress.reductions",
        "0.5**progress.reductions",
        OPTIMISATION,
    ),
    Fault(
        "segmentation-optimisation-mark-follows-every-dice",
        "fastfilm/segmentation/training/optimisation.py",
        "dice > self.mark + config.min_delta",
        "dice > self.mark",
        OPTIMISATION,
    ),
    Fault(
        "segmentation-optimisation-mark-is-the-best",
        "fastfilm/segmentation/training/optimisation.py",
        "        else:\n            self.waited",
        "        else:\n            self.mark = max(self.mark, dice)\n            self.waited",
        OPTIMISATION,
    ),
    Fault(
        "segmentation-optimisation-waits-in-validations",
        "fastfilm/segmentation/training/optimisation.py",
        "self.waited += config.validate_every",
        "self.waited += 1",
        OPTIMISATION,
    ),
    Fault(
        "segmentation-optimisation-best-is-the-last-of-equals",
        "fastfilm/segmentation/training/optimisation.py",
        "dice > self.best",
        "dice >= self.best",
        OPTIMISATION,
    ),
    # training
    Fault(
        "segmentation-checkpoint-average-not-saved",
        "fastfilm/segmentation/training/checkpoint.py",
        "if self.average is not None:\n            tensors |=",
        "if False:\n            tensors |=",
        CHECKPOINTS,
    ),
    Fault(
        "segmentation-checkpoint-optimiser-not-restored",
        "fastfilm/segmentation/training/checkpoint.py",
        '        load_optimizer(self.network, self.optimizer, _below(tensors, "optimizer"))\n',
        "",
        CHECKPOINTS,
    ),
    Fault(
        "segmentation-checkpoint-progress-not-restored",
        "fastfilm/segmentation/training/checkpoint.py",
        "        self.progress = saved.progress\n",
        (
            "        self.progress.step, self.progress.epoch = saved.progress.step, "
            "saved.progress.epoch\n"
        ),
        CHECKPOINTS,
    ),
    Fault(
        "segmentation-checkpoint-dropout-alike-in-every-step",
        "fastfilm/segmentation/training/checkpoint.py",
        "(seed * 1_000_003 + step) * 4096",
        "(seed * 1_000_003) * 4096",
        CHECKPOINTS,
    ),
    Fault(
        "segmentation-trainer-finished-before-its-end-is-written",
        "fastfilm/segmentation/training/loop.py",
        '            save_weights(self.folder, "final",',
        (
            "            progress.finished = True\n"
            "            self._save()\n"
            '            save_weights(self.folder, "final",'
        ),
        CHECKPOINTS,
    ),
    Fault(
        "segmentation-trainer-state-before-the-best-weights",
        "fastfilm/segmentation/training/loop.py",
        "progress.validated(found.mean, config) and self.processes.first:",
        "progress.validated(found.mean, config) and self.processes.first and not self._save():",
        CHECKPOINTS,
    ),
    Fault(
        "segmentation-trainer-best-of-the-raw-weights",
        "fastfilm/segmentation/training/loop.py",
        "dict(self.network.state_dict() if average is None else average.state)",
        "dict(self.network.state_dict())",
        CHECKPOINTS,
    ),
    Fault(
        "segmentation-trainer-rate-not-set",
        "fastfilm/segmentation/training/loop.py",
        'group["lr"] = learning_rate(config, progress, self.steps)',
        'group["lr"] = config.learning_rate',
        CHECKPOINTS,
    ),
    Fault(
        "segmentation-trainer-clips-before-the-scale-is-off",
        "fastfilm/segmentation/training/loop.py",
        "        state.scaler.unscale_(state.optimizer)\n",
        "",
        CHECKPOINTS,
    ),
    Fault(
        "segmentation-trainer-averages-the-weights-of-before",
        "fastfilm/segmentation/training/loop.py",
        "state.average.update(self.network, progress.step)",
        "state.average.update(self.network, 10**6)",
        CHECKPOINTS,
    ),
    Fault(
        "segmentation-trainer-frozen-norms-move",
        "fastfilm/segmentation/training/loop.py",
        "self.parallel.train(not self.frozen)",
        "self.parallel.train()",
        TUNED,
    ),
    Fault(
        "segmentation-trainer-stops-one-epoch-late",
        "fastfilm/segmentation/training/loop.py",
        "self.state.progress.waited >= patience",
        "self.state.progress.waited > patience",
        EARLY,
    ),
    Fault(
        "segmentation-trainer-thick-slices-not-noticed",
        "fastfilm/segmentation/training/loop.py",
        "flat=is_flat(",
        "flat=not is_flat(",
        CHECKPOINTS,
    ),
)
