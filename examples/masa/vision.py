"""Trains vision transformers with dense and with shared attention on the same images, and writes one table.

    python examples/masa/vision.py --out out/digits.json
    python examples/masa/vision.py --images uoft-cs/cifar100 --hidden 192 --layers 12 --patch 4 --out out/cifar.json

The default images are scikit-learn's digits (1,797 of 8 × 8 pixels), which lie in that package; any other name is that
of a hub data set with images of one size and labels. See README.md beside this file.
"""

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cospadi.errors import CalibrationError, CospadiError
from cospadi.masa import MasaViTConfig, MasaViTForImageClassification, attention_parameters, removed_share
from cospadi.runtime.devices import device_name, resolve_device
from cospadi.runtime.fingerprints import versions

DIGITS = "digits"
CAREFUL: dict[str, Any] = {"coefficient_rate": 0.1, "coefficient_start": "spread"}
"""Chosen on validation images of the digits; without it some seeds fail, see docs/masa.md."""
DESIGNS: dict[str, dict[str, Any]] = {
    "dense": {"attention_sharing": "dense"},
    "sequential": {"attention_sharing": "sequential"},
    "masa_qkv": {"attention_sharing": "masa", "shared_types": ["q", "k", "v"]} | CAREFUL,
    "masa_qkvo": {"attention_sharing": "masa"} | CAREFUL,
    "masa_qkvo_plain": {"attention_sharing": "masa"},
}


@dataclass(frozen=True)
class Images:
    """Labelled images, normalised with mean and deviation of the training images.

    Attributes:
        train, test: (images, channels, height, width), float32.
        train_labels, test_labels: int64.
    """

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor

    @property
    def classes(self) -> int:
        """Number of labels."""
        return int(self.train_labels.max()) + 1


def normalised(train: np.ndarray, train_labels: Any, test: np.ndarray, test_labels: Any) -> Images:
    """Images from arrays (images, channels, height, width) of any scale."""
    mean = train.mean((0, 2, 3), keepdims=True, dtype=np.float64)
    deviation = train.std((0, 2, 3), keepdims=True, dtype=np.float64)
    one, other = (torch.from_numpy(((part - mean) / deviation).astype(np.float32)) for part in (train, test))
    return Images(one, torch.as_tensor(train_labels), other, torch.as_tensor(test_labels))


def digits(seed: int, *, validate: bool = False) -> Images:
    """Scikit-learn's digits; a random fifth, stratified by label, is the test set.

    Args:
        seed: of the split.
        validate: put a fifth of the training images in the place of the test images, which stay unseen.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(pixels.reshape(-1, 1, 8, 8), labels, test_size=0.2, stratify=labels, random_state=seed)
    if validate:
        parts = train_test_split(parts[0], parts[2], test_size=0.2, stratify=parts[2], random_state=seed)
    return normalised(parts[0], parts[2], parts[1], parts[3])


def hub_images(name: str) -> Images:
    """A data set of the hub with the splits "train" and "test", images of one size and labels.

    Raises:
        CalibrationError: if it has no such columns or splits, or images of several sizes.
    """
    from datasets import ClassLabel, Image, load_dataset

    data = load_dataset(name)
    if not {"train", "test"} <= set(data):
        raise CalibrationError(f"{name}: has the splits {', '.join(data)}, but train and test are needed")
    features = data["train"].features
    image = next((key for key, kind in features.items() if isinstance(kind, Image)), None)
    # of several labels the last is the finest, as in CIFAR-100 turned round; the one with most classes is taken
    labels = {key: kind.num_classes for key, kind in features.items() if isinstance(kind, ClassLabel)}
    if image is None or not labels:
        raise CalibrationError(f"{name}: has the columns {', '.join(features)}, none of images or none of class labels")
    label = max(labels, key=lambda key: labels[key])
    arrays = []
    for split in ("train", "test"):
        pixels = [np.asarray(picture.convert("RGB")).transpose(2, 0, 1) for picture in data[split][image]]
        if len({one.shape for one in pixels}) > 1:
            raise CalibrationError(f"{name}: holds images of several sizes; resize them first")
        arrays += [np.stack(pixels).astype(np.float32), np.asarray(data[split][label])]
    return normalised(*arrays)


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Every image moved by up to an eighth of its side, at random; what comes in repeats the border."""
    side = images.shape[-1]
    reach = max(1, side // 8)
    padded = torch.nn.functional.pad(images, [reach] * 4, mode="replicate")
    moves = torch.randint(0, 2 * reach + 1, (2, len(images), 1), generator=generator)
    rows, columns = (moves + torch.arange(side)).to(images.device)
    which = torch.arange(len(images), device=images.device)[:, None, None]
    return padded[which, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def train(design: str, seed: int, images: Images, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Train one classifier and measure its accuracy; weights and order of the images follow from the seed."""
    torch.manual_seed(seed)
    config = MasaViTConfig(
        image_size=images.train.shape[-1],
        num_channels=images.train.shape[1],
        patch_size=options.patch,
        hidden_size=options.hidden,
        intermediate_size=4 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_labels=images.classes,
        initializer_range=options.hidden**-0.5,  # narrow models hardly learn from the usual 0.02
        **DESIGNS[design],
    )
    model = MasaViTForImageClassification(config).to(device).train()
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.rate)
    steps = options.epochs * (len(images.train) // options.batch)
    warm = max(1, steps // 10)

    def factor(step: int) -> float:
        rest = (step - warm) / max(1, steps - warm)
        return (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * rest))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    generator = torch.Generator().manual_seed(seed)
    pixels, labels = images.train.to(device), images.train_labels.to(device)
    began = time.perf_counter()
    for _ in range(options.epochs):
        order = torch.randperm(len(pixels), generator=generator)
        for start in range(0, len(order) - options.batch + 1, options.batch):
            chosen = order[start : start + options.batch].to(device)
            model(shifted(pixels[chosen], generator), labels=labels[chosen]).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
    model.eval()
    model.fold()
    model.compose()
    right = 0
    with torch.no_grad():
        for start in range(0, len(images.test), 512):
            found = model(images.test[start : start + 512].to(device)).logits.argmax(-1).cpu()
            right += int((found == images.test_labels[start : start + 512]).sum())
    return {
        "design": design,
        "seed": seed,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "attention_parameters": attention_parameters(config),
        "attention_removed": removed_share(config),
        "accuracy": right / len(images.test),
        "seconds": time.perf_counter() - began,
    }


def run(job: tuple[str, int, Images | None, argparse.Namespace, torch.device]) -> dict[str, Any]:
    """Train one classifier of one seed; what a process of several does."""
    design, seed, images, options, device = job
    return train(design, seed, images or digits(seed, validate=options.validate), options, device)


def table(rows: list[dict[str, Any]]) -> str:
    """One line a design: exact parameters, share of attention removed, accuracy and its deviation."""
    lines = [f"{'design':<15} {'parameters':>11} {'attention':>10} {'removed':>8} {'accuracy':>9} {'deviation':>10}"]
    for design in dict.fromkeys(row["design"] for row in rows):
        runs = [row for row in rows if row["design"] == design]
        found = [run["accuracy"] for run in runs]
        spread = f"{statistics.stdev(found):.2%}" if len(found) > 1 else "–"
        lines.append(
            f"{design:<15} {runs[0]['parameters']:>11,} {runs[0]['attention_parameters']:>10,} "
            f"{runs[0]['attention_removed']:>8.1%} {statistics.mean(found):>9.2%} {spread:>10}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Run what the command line says; gives the rows of the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--images", default=DIGITS, help="hub data set; default: scikit-learn's digits")
    parser.add_argument("--designs", nargs="+", choices=list(DESIGNS), default=["dense", "masa_qkv", "masa_qkvo"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--validate", action="store_true", help="leave the test images unseen; to choose settings with")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time, each on one core; %(default)s")
    parser.add_argument("--device", default="auto")
    for name, value in {"layers": 6, "hidden": 32, "heads": 4, "patch": 2, "epochs": 30, "batch": 32}.items():
        parser.add_argument(f"--{name}", type=int, default=value, help="%(default)s")
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate; %(default)s")
    options = parser.parse_args(arguments)
    device = resolve_device(options.device)
    if options.validate and options.images != DIGITS:
        raise CalibrationError("--validate is for the digits; a hub data set has no split for it here")
    fixed = None if options.images == DIGITS else hub_images(options.images)
    jobs = [(design, seed, fixed, options, device) for seed in options.seeds for design in options.designs]
    with ExitStack() as stack:
        each: Iterable[dict[str, Any]] = map(run, jobs)
        if options.processes > 1:
            pool = get_context("spawn").Pool(options.processes, torch.set_num_threads, (1,))
            each = stack.enter_context(pool).imap(run, jobs)
        rows = []
        for row in each:
            rows.append(row)
            print(f"{row['design']} seed {row['seed']}: {row['accuracy']:.2%} in {row['seconds']:.0f} s", flush=True)
    about: dict[str, Any] = {"command": " ".join(["python", *sys.argv]), "hardware": device_name(device)}
    about |= {"cores": os.cpu_count(), "system": platform.system(), "threads": torch.get_num_threads()}
    about |= {"versions": versions(), "options": {key: str(value) for key, value in vars(options).items()}}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
    print(table(rows))
    return rows


if __name__ == "__main__":
    try:
        main()
    except CospadiError as error:
        sys.exit(f"error: {error}")
