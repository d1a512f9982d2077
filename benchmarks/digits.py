"""Accuracy on held-out digits: mixture-of-experts classifiers, a dense vision transformer, and scikit-learn's own.

    python benchmarks/digits.py [--seeds 3] [--set KEY=VALUE ...]

Each router, and one expert that every token passes, trains `configs/vision/digits.yaml` with `moeport train`. The dense
transformer is of PyTorch's own encoder layers, with feed-forward blocks of as many parameters as a token uses of the
experts; it sees the same batches under the same optimiser and schedule. All are judged on the same held-out images.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from sklearn.linear_model import LogisticRegression
from sklearn.svm import SVC
from torch import Tensor, nn

from moeport.config import load_config
from moeport.config.schema import Config
from moeport.data import ImageSplit, Sampler, read_images
from moeport.training.run import train
from moeport.training.schedule import learning_rate
from moeport.training.summary import RunSummary

CONFIG = Path("configs/vision/digits.yaml")
BY_NAME = (
    "{name: topk, top_k: 2}",
    "{name: soft, slots_per_expert: 2}",
    "{name: expert_choice}",
    "{name: sinkhorn_expert_choice}",
    "{name: sparsity_constrained_expert_choice}",
)


class DenseViT(nn.Module):
    """A vision transformer of PyTorch's own layers: pre-norm, mean over the patches."""

    def __init__(self, config: Config, num_patches: int, patch_values: int):
        super().__init__()
        model, moe = config.model, config.model.moe
        width = moe.router.experts_per_token * moe.expert_hidden * 3 // 2  # GELU has two matrices, SwiGLU three
        self.embedding = nn.Linear(patch_values, model.d_model)
        self.position = nn.Parameter(torch.randn(num_patches, model.d_model) * model.init_std)
        layer = nn.TransformerEncoderLayer(
            model.d_model, model.num_heads, width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, model.num_layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(model.d_model)
        self.head = nn.Linear(model.d_model, 10)

    def forward(self, patch_BSP: Tensor) -> Tensor:
        """Class scores (B, 10)."""
        return self.head(self.norm(self.blocks(self.embedding(patch_BSP) + self.position)).mean(1))


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    config = load_config(CONFIG, args.set)
    images = read_images(config.data)
    sizes = [side.num_sequences for side in images]
    print(f"{sizes[0]} images to train on, {sizes[1]} held out; {args.seeds} seeds\n")
    print("| Classifier | Parameters (active per token) | Accuracy, mean | lowest | highest | Seconds a run |")
    print("|---|---|---|---|---|---|")
    for name, classifier in (
        ("logistic regression on the pixels", LogisticRegression(max_iter=10_000)),
        ("support vectors, RBF kernel", SVC()),
    ):
        started = time.perf_counter()
        accuracy = _classical(classifier, images)
        count = f"{classifier.coef_.size + 10:,}" if hasattr(classifier, "coef_") else "-"
        _row(name, count, [accuracy], time.perf_counter() - started)
    runs = [_dense(config, images, seed) for seed in range(args.seeds)]
    _row(
        "vision transformer of PyTorch's own layers",
        f"{runs[0][1]:,}",
        [run[0] for run in runs],
        float(np.mean([run[2] for run in runs])),
    )
    width = config.model.moe.router.experts_per_token * config.model.moe.expert_hidden
    one_expert = ["model.moe.num_experts=1", f"model.moe.expert_hidden={width}", "model.moe.router={name: switch}"]
    models = {"ours with one expert: dense": one_expert}
    models |= {f"`{router}`": [f"model.moe.router={router}"] for router in BY_NAME}
    for name, values in models.items():
        with tempfile.TemporaryDirectory() as folder:
            summaries = [_moe([*args.set, *values], seed, Path(folder)) for seed in range(args.seeds)]
        counts = f"{summaries[0].parameters_total:,} ({summaries[0].parameters_active:,})"
        seconds = float(np.mean([summary.wall_time for summary in summaries]))
        _row(name, counts, [summary.val_accuracy or 0.0 for summary in summaries], seconds)


def _row(name: str, count: str, accuracies: list[float], seconds: float) -> None:
    mean, least, most = np.mean(accuracies), min(accuracies), max(accuracies)
    print(f"| {name} | {count} | {mean:.2%} | {least:.2%} | {most:.2%} | {seconds:.0f} |", flush=True)


def _classical(classifier: LogisticRegression | SVC, images: ImageSplit) -> float:
    train, held_out = (side.patch_NSP.reshape(side.num_sequences, -1) for side in images)
    return float(classifier.fit(train, images.train.class_N).score(held_out, images.validation.class_N))


def _dense(config: Config, images: ImageSplit, seed: int) -> tuple[float, int, float]:
    """Accuracy, parameters, seconds."""
    torch.manual_seed(seed)
    model = DenseViT(config, images.train.sequence_length, images.train.patch_NSP.shape[2])
    options, training = config.optimizer, config.training
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": options.weight_decay},
            {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
        ],
        betas=(options.beta1, options.beta2),
        eps=options.eps,
    )
    sampler = Sampler(images.train.num_sequences, training.batch_size, seed)
    started = time.perf_counter()
    for step in range(training.steps):
        patch_BSP, class_B1 = images.train.batch(sampler.indices(step))
        loss = F.cross_entropy(model(torch.from_numpy(patch_BSP)), torch.from_numpy(class_B1[:, 0]))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), options.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(options, step, training.steps)
        optimizer.step()
    seconds = time.perf_counter() - started
    with torch.no_grad():
        chosen = model.eval()(torch.from_numpy(images.validation.patch_NSP)).argmax(1).numpy()
    accuracy = float((chosen == images.validation.class_N).mean())
    return accuracy, sum(p.numel() for p in model.parameters()), seconds


def _moe(overrides: list[str], seed: int, folder: Path) -> RunSummary:
    values = [
        f"training.seed={seed}",
        f"run.dir={folder / str(seed)}",
        "training.evaluation_interval=0",
        "metrics.tensorboard=false",
        "metrics.report=false",
    ]
    summary = train(load_config(CONFIG, [*overrides, *values]), console=Console(file=io.StringIO()))
    assert isinstance(summary, RunSummary)
    return summary


if __name__ == "__main__":
    main()
