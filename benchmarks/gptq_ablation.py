"""What each part of GPTQ is worth: statistics, order, damping, grid, descent, targets.

    python benchmarks/gptq_ablation.py MODEL --calibration FILE --test FILE --valid NAME=FILE --out JSON

Every row changes one part of a reference setting and quantises all linear layers with the package's own solvers at 4,
3 and 2 bits in groups of 64. The last 64 documents of the calibration file are held out of the calibration; they and
those of every further `--valid` file are validation text. Perplexity, and KL to the dense model, are measured in the
model's own dtype with every quantised weight multiplied out. A row is a setting at a number of bits; rows already in
the output file are kept.
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from measuring import measured, stream
from torch import Tensor

from cospadi.calibration import Texts, read_texts, token_blocks
from cospadi.calibration.statistics import Accumulator
from cospadi.engine.plan.plan import make_plan
from cospadi.engine.tune.streams import Moments, anchored_target
from cospadi.format.schema import Stored
from cospadi.model_view import LayerReplay, LinearGroup, ModelView, discover, open_model
from cospadi.recipe import Recipe
from cospadi.runtime.devices import device_name, resolve_device
from cospadi.runtime.fingerprints import versions
from cospadi.solvers.feedback import Feedback, damped, feedback, refine, sweep
from cospadi.solvers.quantise import fit_grid
from cospadi.solvers.rescale import rescaled

HELD_OUT = 64
BATCH = 16


@dataclass(frozen=True)
class Setting:
    """One way to quantise.

    Attributes:
        statistics: ``"dense"``: Grams of the original model. ``"layers"``: of a model whose layers before this one are
            compressed. ``"groups"``: also the matrices before this one in its layer.
        samples: calibration sequences.
        skip: tokens at the start of every sequence that stay out of the Grams.
        blend: share of the correction towards the original outputs (`anchor`).
        damping: of the Gram.
        ordered: columns by falling diagonal, else as they are.
        search: clipping ranges tried per group.
        weights: by what errors count in that search: a power of the Gram's diagonal, or ``"cost"``, the square of the
            Cholesky factor's diagonal, which is what a missed target costs under error feedback. With several, every
            row takes the grid that leaves it the least error after all is done.
        shifts: zero points tried on either side.
        half: zero points in half steps.
        sweeps: of coordinate descent.
        rescale: rounds of fitted scales.
        symmetric: no zero points.
        group: weights per scale; -1: whatever the product plans at `keep`.
    """

    statistics: str = "dense"
    samples: int = 256
    skip: int = 0
    blend: float = 0.0
    damping: float = 0.01
    ordered: bool = True
    search: int = 30
    weights: tuple[float | str, ...] = (0.5,)
    shifts: int = 0
    half: bool = False
    sweeps: int = 2
    rescale: int = 0
    symmetric: bool = False
    group: int = 64


DENSE = Setting()
LAYERS = Setting(statistics="layers")
GROUPS = Setting(statistics="groups")
DEFAULT = replace(LAYERS, weights=(1.0,), shifts=1, rescale=3)
"""What `gptq` does when nothing is set."""

PLANNED = {4: 0.27, 3: 0.20, 2: 0.14}
"""Keep at which the product's plan has so many bits, in coarser groups where 64 do not fit."""

SETTINGS = {
    "as planned, bytes of keep": replace(DENSE, group=-1),
    "dense Grams": DENSE,
    "sequential, layers": LAYERS,
    "sequential, groups": GROUPS,
    "sequential, 128 samples": replace(LAYERS, samples=128),
    "sequential, spanning grid": replace(LAYERS, search=0),
    "sequential, grid by plain error": replace(LAYERS, weights=(0.0,)),
    "sequential, grid by diagonal": replace(LAYERS, weights=(1.0,)),
    "sequential, damping .001": replace(LAYERS, damping=1e-3),
    "sequential, damping .0001": replace(LAYERS, damping=1e-4),
    "sequential, damping .1": replace(LAYERS, damping=1e-1),
    "sequential, natural order": replace(LAYERS, ordered=False),
    "sequential, no descent": replace(LAYERS, sweeps=0),
    "sequential, 8 sweeps": replace(LAYERS, sweeps=8),
    "sequential, symmetric": replace(LAYERS, symmetric=True),
    "sequential, without first token": replace(LAYERS, skip=1),
    "default": DEFAULT,
    "default, bytes of keep": replace(DEFAULT, group=-1),
    "default, blend .25": replace(DEFAULT, statistics="groups", blend=0.25),
    "dense, fitted": replace(DENSE, shifts=1, rescale=3),
    "sequential, fitted": replace(LAYERS, shifts=1, rescale=3),
    "sequential, half": replace(LAYERS, half=True, shifts=2),
    "sequential, fitted, half": replace(LAYERS, half=True, shifts=2, rescale=3),
    "sequential groups, fitted, half": replace(GROUPS, half=True, shifts=2, rescale=3),
    "sequential, blend .25": replace(GROUPS, blend=0.25),
    "sequential, blend .5": replace(GROUPS, blend=0.5),
    "sequential, blend 1": replace(GROUPS, blend=1.0),
    "128, diagonal": replace(LAYERS, samples=128, weights=(1.0,)),
    "128, cost": replace(LAYERS, samples=128, weights=("cost",)),
    "128, best of .5, 1": replace(LAYERS, samples=128, weights=(0.5, 1.0)),
    "128, best of .5, 1, cost": replace(LAYERS, samples=128, weights=(0.5, 1.0, "cost")),
    "128, diagonal, fitted": replace(LAYERS, samples=128, weights=(1.0,), shifts=1, rescale=3),
    "128, diagonal, fitted, half": replace(LAYERS, samples=128, weights=(1.0,), half=True, shifts=2, rescale=3),
    "128, best of .5, 1, fitted, half": replace(
        LAYERS, samples=128, weights=(0.5, 1.0), half=True, shifts=2, rescale=3
    ),
    "128, blend .25": replace(GROUPS, samples=128, blend=0.25),
    "128, blend .5": replace(GROUPS, samples=128, blend=0.5),
    "128, blend .25, diagonal": replace(GROUPS, samples=128, blend=0.25, weights=(1.0,)),
    "128, blend .5, diagonal": replace(GROUPS, samples=128, blend=0.5, weights=(1.0,)),
    "128, blend .5, best of .5, 1, fitted, half": replace(
        GROUPS, samples=128, blend=0.5, weights=(0.5, 1.0), half=True, shifts=2, rescale=3
    ),
    "128, blend .25, best of .5, 1, fitted, half": replace(
        GROUPS, samples=128, blend=0.25, weights=(0.5, 1.0), half=True, shifts=2, rescale=3
    ),
    "128, blend .5, diagonal, fitted": replace(GROUPS, samples=128, blend=0.5, weights=(1.0,), shifts=1, rescale=3),
    "128, blend 1, diagonal": replace(GROUPS, samples=128, blend=1.0, weights=(1.0,)),
    "128, blend .25, diagonal, fitted": replace(GROUPS, samples=128, blend=0.25, weights=(1.0,), shifts=1, rescale=3),
    "128, fitted": replace(LAYERS, samples=128, shifts=1, rescale=3),
    "128, blend .25, diagonal, fitted, half": replace(
        GROUPS, samples=128, blend=0.25, weights=(1.0,), half=True, shifts=2, rescale=3
    ),
    "prototype's": replace(LAYERS, samples=128, search=0),
    "dense, damping .001": replace(DENSE, damping=1e-3),
    "dense, without first token": replace(DENSE, skip=1),
}


def quantised(rows: Tensor, gram: Tensor, setting: Setting, bits: int, group: int) -> Tensor:
    """Rows (count, n) on their grids; the best of several grids row by row."""
    rows = rows.float()
    order = None if setting.ordered else torch.arange(rows.shape[1], device=rows.device)
    plan = feedback(gram, setting.damping, order)
    cost = torch.empty_like(plan.cost).scatter_(0, plan.order, plan.cost)
    curvature = damped(gram, setting.damping).float()
    best, least = None, None
    for weight in setting.weights:
        diagonal = gram.diagonal().clamp_min(0)
        importance = cost.float() if weight == "cost" else diagonal.pow(float(weight)).float()
        found = on_grid(rows, gram, plan, importance, setting, bits, group)
        loss = (((rows - found) @ curvature) * (rows - found)).sum(1, keepdim=True)
        better = loss < least if best is not None else None
        best = found if better is None else torch.where(better, found, best)
        least = loss if better is None else torch.where(better, loss, least)
    return best


def on_grid(
    rows: Tensor, gram: Tensor, plan: Feedback, importance: Tensor, setting: Setting, bits: int, group: int
) -> Tensor:
    """Rows on the grids that one importance of the inputs leads to."""
    grid = fit_grid(
        rows,
        bits=bits,
        group=group,
        symmetric=setting.symmetric,
        importance=importance[None],
        search=setting.search,
        shifts=setting.shifts,
        half=setting.half,
    )
    steps = grid.steps(rows.shape[1], group or rows.shape[1])
    found = sweep(rows, plan, steps)
    if setting.sweeps:
        found = refine(rows, found, gram, steps, sweeps=setting.sweeps, damping=setting.damping)
    if setting.rescale:
        before = Stored(found, grid.scales, None if setting.symmetric else grid.zeros)
        found = rescaled(
            rows, before, bits=bits, group=group, hessian=gram, rounds=setting.rescale, damping=setting.damping
        ).matrix
    return found


class Ablation:
    """Quantises one model again and again.

    Args:
        view: of the model, which lies on `device`; it is left dense.
        ids: calibration tokens (sequences, length).
        device: where everything lies.
    """

    def __init__(self, view: ModelView, ids: Tensor, device: torch.device) -> None:
        self.view, self.ids, self.device = view, ids, device
        self.original = {name: view.module(name).weight.detach().clone() for name in view.module_names}
        self.dense: dict[tuple[int, int], dict[str, Tensor]] = {}

    def hidden(self, replay: LayerReplay, samples: int) -> list[Tensor]:
        """Inputs of the first layer, batch by batch."""
        return [replay.embed(part).detach() for part in torch.split(self.ids[:samples], BATCH)]

    def restore(self, names: "tuple[str, ...] | None" = None) -> None:
        """Put the original weights back."""
        with torch.no_grad():
            for name in names or self.view.module_names:
                self.view.module(name).weight.copy_(self.original[name])

    @torch.no_grad()
    def inputs(
        self, replay: LayerReplay, index: int, hidden: list[Tensor], groups: list[LinearGroup]
    ) -> Iterator[dict[str, Tensor]]:
        """Inputs of some groups, batch by batch."""
        for part in hidden:
            seen: dict[str, Tensor] = {}
            handles = [
                self.view.module(g.modules[0]).register_forward_pre_hook(
                    lambda _m, args, _g=g.name, _to=seen: _to.__setitem__(_g, args[0])
                )
                for g in groups
            ]
            replay.layer(index, part)
            for handle in handles:
                handle.remove()
            yield seen

    def grams(
        self, replay: LayerReplay, index: int, hidden: list[Tensor], groups: list[LinearGroup], skip: int
    ) -> dict[str, Tensor]:
        """Grams of the inputs of some groups, with the weights that the model holds."""
        sums = {g.name: Accumulator(g.name, g.d_in, self.device) for g in groups}
        for seen in self.inputs(replay, index, hidden, groups):
            for name, x in seen.items():
                sums[name].add(x[:, skip:])
        return {name: item.finish().mean_gram.to(self.device) for name, item in sums.items()}

    def dense_grams(self, samples: int, skip: int) -> dict[str, Tensor]:
        """Grams of the original model, kept."""
        key = (samples, skip)
        if key not in self.dense:
            found: dict[str, Tensor] = {}
            with LayerReplay(self.view, self.device) as replay:
                hidden = self.hidden(replay, samples)
                for index in range(len(self.view.layers)):
                    found |= self.grams(replay, index, hidden, list(self.view.of_layer(index)), skip)
                    hidden = [replay.layer(index, part).detach() for part in hidden]
            self.dense[key] = found
        return self.dense[key]

    @torch.no_grad()
    def apply(self, setting: Setting, bits: int) -> float:
        """Quantise the model; returns bits a weight."""
        sizes = dict.fromkeys(self.view.module_names, setting.group)
        widths = dict.fromkeys(self.view.module_names, bits)
        total = weights = 0
        keep = PLANNED[bits] if setting.group < 0 else 0.9
        options = {} if setting.group < 0 else {"bits": bits, "group": setting.group, "symmetric": setting.symmetric}
        for planned in make_plan(self.view, Recipe(method="gptq", keep=keep, options=options)).groups:
            name = planned.spec.modules[0]
            sizes[name], widths[name] = planned.spec.codes.group, planned.spec.codes.bits
            total += 8 * planned.spec.bytes + setting.half * planned.spec.codes.rows * planned.spec.codes.groups
            weights += planned.spec.dense_bytes // 2
        dense = self.dense_grams(setting.samples, setting.skip) if setting.statistics == "dense" else {}
        with LayerReplay(self.view, self.device) as replay:
            hidden = [] if dense else self.hidden(replay, setting.samples)
            truth = hidden
            for index in range(len(self.view.layers)):
                groups = list(self.view.of_layer(index))
                outputs = None
                if setting.blend:
                    outputs = [replay.layer(index, part).detach() for part in truth]
                found = {}
                if setting.statistics == "layers":
                    found = self.grams(replay, index, hidden, groups, setting.skip)
                for group in groups:
                    gram = dense.get(group.name, found.get(group.name))
                    rows = {m: self.original[m].float() for m in group.modules}
                    if gram is None:
                        gram = self.grams(replay, index, hidden, [group], setting.skip)[group.name]
                    if setting.blend:
                        rows = self.anchored(replay, index, group, hidden, truth, gram, setting.blend)
                    for size in {(widths[m], sizes[m]) for m in group.modules}:
                        names = [m for m in group.modules if (widths[m], sizes[m]) == size]
                        made = quantised(torch.cat([rows[m] for m in names]), gram, setting, *size)
                        for m, part in zip(names, made.split([len(rows[m]) for m in names]), strict=True):
                            self.view.module(m).weight.copy_(part)
                if outputs is not None:
                    truth = outputs
                hidden = [replay.layer(index, part).detach() for part in hidden]
        return total / weights

    def anchored(
        self,
        replay: LayerReplay,
        index: int,
        group: LinearGroup,
        hidden: list[Tensor],
        truth: list[Tensor],
        gram: Tensor,
        blend: float,
    ) -> dict[str, Tensor]:
        """Rows that bring the compressed stream nearer to the original outputs."""
        after = [seen[group.name].flatten(0, 1) for seen in self.inputs(replay, index, hidden, [group])]
        made = {m: self.view.module(m).weight.clone() for g in self.view.of_layer(index) for m in g.modules}
        self.restore(tuple(made))
        cross = torch.zeros_like(gram)
        for x, seen in zip(after, self.inputs(replay, index, truth, [group]), strict=True):
            cross += (x.float().T @ seen[group.name].flatten(0, 1).float()).double()
        for m, weight in made.items():
            self.view.module(m).weight.copy_(weight)
        moments = Moments(gram, cross / sum(len(x) for x in after), gram[0])
        return {
            m: anchored_target(self.original[m].T, moments, ridge=1e-2, blend=blend).T.float() for m in group.modules
        }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True, help="jsonl; its last documents are validation text")
    parser.add_argument("--test", required=True)
    parser.add_argument("--valid", action="append", default=[], help="NAME=FILE, more validation text")
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--settings", help="some of them, separated by semicolons")
    parser.add_argument("--bits", default="4,3,2")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--samples", type=int, help="instead of those of the settings")
    parser.add_argument("--max-blocks", type=int, help="only the first blocks of every text")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no row after so long")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    begun = time.perf_counter()
    options = arguments()
    device = resolve_device(options.device)
    model, tokenizer = open_model(options.model)
    model = model.to(device) if device.type == "cuda" else model.float()
    dense = deepcopy(model)
    view = discover(model)
    documents = read_texts(options.calibration).documents
    valid = {"calibration": Texts(documents[-HELD_OUT:], options.calibration)}
    for item in options.valid:
        name, file = item.split("=", 1)
        valid[name] = Texts(read_texts(file).documents[-HELD_OUT:], file)
    texts = {
        name: stream(text, tokenizer, options.max_blocks, options.seq_len)
        for name, text in ({"test": read_texts(options.test)} | valid).items()
    }
    most = options.samples or 256
    kept = Texts(documents[:-HELD_OUT], options.calibration)
    blocks = token_blocks(kept, tokenizer, samples=most, seq_len=options.seq_len, seed=options.seed)
    # a prefix of a sorted draw would be the start of the text only
    shuffled = blocks.ids[torch.randperm(len(blocks.ids), generator=torch.Generator().manual_seed(options.seed))]
    result = {
        "command": shlex.join(["python", *sys.argv]),
        "hardware": device_name(device),
        "versions": versions(),
        "seed": options.seed,
        "calibration": blocks.report,
        "blocks": {name: len(ids) for name, (ids, _) in texts.items()},
        "dense": {name: measured(dense, dense, ids, device) for name, ids in texts.items()},
        "rows": [],
    }
    if options.out.exists():
        result["rows"] = json.loads(options.out.read_text())["rows"]
    have = {(row["setting"], row["bits"]) for row in result["rows"]}
    run = Ablation(view, shuffled, device)
    chosen = options.settings.split(";") if options.settings else list(SETTINGS)
    for name in chosen:
        for bits in (int(b) for b in options.bits.split(",")):
            if (name, bits) in have or time.perf_counter() - begun > options.seconds:
                continue
            setting = SETTINGS[name]
            if options.samples:
                setting = replace(setting, samples=min(options.samples, setting.samples))
            start = time.perf_counter()
            weight_bits = run.apply(setting, bits)
            seconds = time.perf_counter() - start
            row = {
                "setting": name,
                "bits": bits,
                "bits_per_weight": round(weight_bits, 4),
                "seconds": round(seconds, 2),
            }
            row |= {text: measured(model, dense, ids, device) for text, ids in texts.items()}
            result["rows"].append(row | {"parts": asdict(setting)})
            shown = " ".join(f"{text} {row[text]['perplexity']:.3f} {row[text]['kl']:.4f}" for text in texts)
            print(f"{name} | {bits} | {weight_bits:.3f} | {shown} | {seconds:.1f} s", flush=True)
            run.restore()
            options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
