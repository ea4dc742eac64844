"""What each exit of a trained model is worth and what it costs, and how early it may stop.

    python evaluate.py out                                  # the run's own test split
    python evaluate.py fold1 fold2 fold3                    # the runs of several folds, their test clips pooled
    python evaluate.py out --against other                  # the paired difference between two runs, or sets of runs
    python evaluate.py out --data path/to/another/corpus
    python evaluate.py out --audio a.wav b.flac             # classify files

The threshold of early exit that it chooses on dev is kept in the checkpoint's config.json.
"""

import argparse
import io
import json
import os
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import sdser
import train

THRESHOLDS = np.linspace(0, 1, 101).round(2)
DRAWS = 2000  # of the bootstrap


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    checkpoint = dict(nargs="+", metavar="CHECKPOINT")
    add("checkpoints", help="folder written by train.py, or a Hub name; several of one kind are pooled", **checkpoint)
    add("--data", metavar="SOURCE", help="another corpus than the checkpoint's own (see train.py)")
    add("--split", choices=train.SPLITS, help="default: test, or all clips of a --data without splits")
    add("--against", help="also the paired difference in UAR to these", **checkpoint)
    real_or_0 = train.positive(float, zero=True)
    add("--tolerance", type=real_or_0, default=0.01, metavar="X", help="UAR early exit may lose on dev (default 0.01)")
    add("--json", metavar="FILE", help="write the results as JSON")
    add("--plot", metavar="DIR", help="write plots (needs matplotlib)")
    add("--audio", nargs="+", metavar="FILE", help="classify these files instead")
    add("--exit", type=int, metavar="K", help="with --audio: run to this exit")
    add("--threshold", type=float, metavar="P", help="with --audio: leave at this confidence (default: the calibrated)")
    add("--device", metavar="D", help="default: cuda if available, else cpu")
    args = parser.parse_args(argv)
    if args.audio and (len(args.checkpoints) > 1 or args.against or args.data or args.split or args.plot):
        parser.error("--audio goes with one checkpoint, without --against, --data, --split and --plot")
    if not args.audio and (args.exit is not None or args.threshold is not None):
        parser.error("--exit and --threshold go with --audio")
    return args


# -- scoring, and intervals -------------------------------------------------------------------------------------------
class Scored(NamedTuple):
    """N clips, pooled over runs of one kind, and what each clip's own run answered."""

    model: sdser.MultiExitSER  # of one run: labels, exits and costs are the same for all
    clips: list[train.Clip]
    run: np.ndarray  # (N,) the index of each clip's checkpoint
    logits: torch.Tensor  # (exits, N, C)

    @property
    def targets(self) -> np.ndarray:
        return np.array([self.model.labels.index(clip.label) for clip in self.clips])

    @property
    def units(self) -> np.ndarray:
        """What the bootstrap draws, (N,): each clip's speaker, or the clip itself if any speaker is unknown."""
        known = all(clip.speaker for clip in self.clips)
        return np.array([clip.speaker if known else clip.path for clip in self.clips])


def load_and_score(checkpoints: list[str], split: str | None, source: str | None, device: str) -> Scored:
    """Every run on its own clips of a split, or on those of another corpus; ValueError if they are not of one kind."""
    kinds, clips, run, logits = [], [], [], []
    for i, checkpoint in enumerate(checkpoints):
        model = sdser.MultiExitSER.from_pretrained(checkpoint).to(device)
        kind = (model.labels, model.exits, model.head_kinds, model.tile_seconds)
        if kinds and kind not in kinds:
            raise ValueError(f"{checkpoint}: its labels, exits, heads or window differ; pool runs of one kind")
        own = train.look_at(choose_clips(checkpoint, split, source))
        unknown = {clip.label for clip in own} - set(model.labels)
        if unknown:
            raise ValueError(f"{checkpoint}: knows {', '.join(model.labels)}, not {', '.join(sorted(unknown))}")
        kinds.append(kind)
        clips += own
        run += [i] * len(own)
        logits.append(train.predict(model, own))
    return Scored(model, clips, np.array(run), torch.cat(logits, 1))


def choose_clips(checkpoint: str, split: str | None, source: str | None) -> list[train.Clip]:
    """The run's own clips, as split.csv lists them or as they lie in `source`, or else those of another corpus.

    Where they have splits, those of one split: clips that were trained on are never scored by mistake.
    """
    listed = os.path.join(checkpoint, "split.csv")
    if source is None and not os.path.isfile(listed):
        raise FileNotFoundError(f"{checkpoint}: holds no split.csv, so its clips are unknown; name a corpus by --data")
    clips = train.load_corpus(listed if source is None else source)
    if source is not None and os.path.isfile(listed):
        own = train.find_again(train.load_corpus(listed), clips)
        if own and len(own) < len(clips):
            others = len(clips) - len(own)
            warnings.warn(f"{source}: {others} clips that are not {checkpoint}'s are not scored", stacklevel=2)
        clips = own or clips
    if split is None and any(clip.split for clip in clips):
        split = "test"
    if split:
        clips = [clip for clip in clips if clip.split == split]
    if not clips:
        raise ValueError(f"{source or checkpoint}: has no clips in the split {split}")
    return clips


def bootstrap(targets, predictions, units, num_classes: int) -> np.ndarray:
    """UARs (rows, DRAWS) of `predictions` (rows, N), each from as many units as there are, drawn with replacement.

    A speaker is drawn with all their clips, which are not independent. Calls on the same speakers are paired.
    """
    names, unit = np.unique(units, return_inverse=True)
    cells = unit * num_classes + targets  # a cell per unit and class
    size = len(names) * num_classes
    total = np.bincount(cells, minlength=size).reshape(len(names), num_classes)
    hits = np.stack([np.bincount(cells, row == targets, size).reshape(total.shape) for row in predictions])
    rng, uars = np.random.default_rng(0), []
    for _ in range(DRAWS):
        weight = np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names))
        drawn = weight @ total  # (C,)
        uars.append((weight @ hits / np.maximum(drawn, 1)).sum(-1) / (drawn > 0).sum())  # (rows,)
    return np.stack(uars, -1)


def compare(ours: Scored, theirs: Scored) -> list[dict]:
    """The paired difference in UAR, ours minus theirs, at each exit that both have, and of fusion if both fuse."""
    predictions, others, rows = predict_rows(ours), predict_rows(theirs), []
    shared = [exit for exit in predictions if exit in others]
    same = {clip.path for clip in ours.clips} == {clip.path for clip in theirs.clips}
    if not same or ours.model.labels != theirs.model.labels or not shared:
        raise ValueError("--against: give runs scored on the same clips, with the same labels and some exit in common")
    for exit in shared:
        uars, draws = [], []
        for scored, answers in ((ours, predictions[exit]), (theirs, others[exit])):
            uars.append(sdser.unweighted_average_recall(scored.targets, answers, len(scored.model.labels)))
            draws.append(bootstrap(scored.targets, answers[None], scored.units, len(scored.model.labels))[0])
        interval = np.percentile(draws[0] - draws[1], [2.5, 97.5]).tolist()
        rows.append({"exit": exit, "difference": uars[0] - uars[1], "ci95": interval})
    return rows


# -- early exit, and cost ---------------------------------------------------------------------------------------------
def exit_index(logits: torch.Tensor, thresholds) -> np.ndarray:
    """The index of the exit (N,) at which each clip leaves, from logits (exits, N, C) and a threshold for each clip."""
    certain = logits.softmax(-1).amax(-1).numpy() >= thresholds  # (exits, N)
    certain[-1] = True
    return certain.argmax(0)


def early_predictions(logits: torch.Tensor, thresholds) -> np.ndarray:
    """The class (N,) that each clip gets where it leaves."""
    return logits.argmax(-1).numpy()[exit_index(logits, thresholds), np.arange(logits.shape[1])]


def calibrate(checkpoints: list[str], args) -> list[float]:
    """Each run's lowest threshold, and so its cheapest, whose UAR on dev is within the tolerance of the deepest exit's.

    It is kept in config.json. Where a run has no dev clips, the list is empty and standard error says why.
    """
    try:
        dev = load_and_score(checkpoints, "dev", None, args.device)
    except (OSError, ValueError) as error:  # --final trains on them; a Hub model has none
        warnings.warn(f"early exit is not calibrated: {error}", stacklevel=2)
        return []
    chosen, classes = [], len(dev.model.labels)
    for i, checkpoint in enumerate(checkpoints):
        logits, targets = dev.logits[:, dev.run == i], dev.targets[dev.run == i]
        deepest = sdser.unweighted_average_recall(targets, logits[-1].argmax(-1), classes)
        for threshold in THRESHOLDS.tolist():
            uar = sdser.unweighted_average_recall(targets, early_predictions(logits, threshold), classes)
            if uar >= deepest - args.tolerance:
                break
        chosen.append(threshold)
        if train.RANK == 0:
            path = Path(checkpoint, "config.json")
            try:
                config = {**json.loads(path.read_text()), "threshold": threshold}
                sdser.replace_file(path, json.dumps(config, indent=2))
            except ValueError as error:
                warnings.warn(f"the threshold is not kept: {error}", stacklevel=2)
    return chosen


@torch.no_grad()
def count_macs(model: sdser.MultiExitSER, samples: int, exit: int, heads_on_the_way: bool = False) -> int:
    """Multiply-accumulates of the matrix products and convolutions that answer for one clip at an exit.

    samples: the clip's length at 16 kHz, not tiled yet. heads_on_the_way: with the shallower exits' heads.
    """
    if model.tile_seconds:
        samples = round(model.tile_seconds * sdser.SAMPLE_RATE)
    exits = [k for k in model.exits if k < exit and heads_on_the_way] + [exit]
    # torch's counter sees neither fused attention nor oneDNN's convolutions and recurrent networks
    no_mkldnn = torch.backends.mkldnn.flags(enabled=False, allow_tf32=None)
    no_cudnn = torch.backends.cudnn.flags(enabled=False)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), no_mkldnn, no_cudnn:
        frames = model.embed_frames(torch.zeros(1, samples, device=model.backbone.device))
        for previous, k in zip([0, *exits], exits):
            frames = model.run_layers(frames, previous, k)
            model.read_exit(k, frames)
    return counter.get_total_flops() // 2


def count_parameters(model: sdser.MultiExitSER, exits: list[int]) -> int:
    """Parameters of the heads at some exits, shallow to deep, and of the backbone up to the last of them."""
    parts = [model.backbone, *(model.heads[str(k)] for k in exits)]
    total = sum(p.numel() for part in parts for p in part.parameters())
    return total - sum(p.numel() for p in model.backbone.encoder.layers[exits[-1] :].parameters())


# -- the report, and plots --------------------------------------------------------------------------------------------
def predict_rows(scored: Scored, thresholds=None) -> dict:
    """What the table has a row for -> the class (N,) that it gives each clip: exits, fusion, early exit."""
    rows = dict(zip(scored.model.exits, scored.logits.argmax(-1).numpy()))
    if len(scored.logits) > 2:
        rows["fusion"] = sdser.fuse(scored.logits[:-1]).argmax(-1).numpy()  # of the students
    if thresholds is not None:
        rows["early exit"] = early_predictions(scored.logits, thresholds)
    return rows


def evaluate(args) -> tuple[dict, list[tuple[float, float]]]:
    """Everything about the checkpoints, as it goes into the JSON; and early exit's cost and UAR at each threshold."""
    scored = load_and_score(args.checkpoints, args.split, args.data, args.device)
    chosen = calibrate(args.checkpoints, args)
    model, clips, targets = scored.model, scored.clips, scored.targets
    exits, labels = model.exits, model.labels
    thresholds = np.array(chosen)[scored.run] if chosen else None  # (N,)
    left = exit_index(scored.logits, thresholds) if chosen else None  # (N,)

    # Costs are those of a clip of the mean length.
    seconds = float(np.mean([clip.seconds for clip in clips]))
    samples = round(seconds * sdser.SAMPLE_RATE)
    alone = np.array([count_macs(model, samples, k) for k in exits]) / seconds
    on_the_way = np.array([count_macs(model, samples, k, True) for k in exits]) / seconds
    costs = {k: (k, [k], macs) for k, macs in zip(exits, alone)}  # layers, heads in use, multiply-accumulates
    if len(exits) > 2:
        costs["fusion"] = (exits[-2], exits[:-1], on_the_way[-2])
    if chosen:
        costs["early exit"] = (float(np.array(exits)[left].mean()), exits, on_the_way[left].mean())

    predictions, rows = predict_rows(scored, thresholds), []
    draws = bootstrap(targets, list(predictions.values()), scored.units, len(labels))
    for (exit, answers), uars in zip(predictions.items(), draws):
        confusion = sdser.confusion_matrix(targets, answers, len(labels))
        counts = zip(confusion.diagonal().tolist(), confusion.sum(1).tolist())
        recall = dict(zip(labels, [hits / total if total else None for hits, total in counts]))
        interval = np.percentile(uars, [2.5, 97.5]).tolist()
        layers, heads, macs = costs[exit]
        rows.append({"exit": exit, **sdser.scores(targets, answers, len(labels)), "uar_ci95": interval,
                     "recall": recall, "confusion": confusion.tolist(), "layers": layers,
                     "parameters": count_parameters(model, heads), "macs_per_second": macs})  # fmt: skip
    speakers = {clip.speaker for clip in clips}
    results = {"labels": labels, "checkpoints": args.checkpoints, "split": args.split or clips[0].split or "all",
               "clips": len(clips), "speakers": None if None in speakers else len(speakers),
               "chance": 1 / len(set(targets)), "rows": rows, "thresholds": chosen}  # fmt: skip
    curve = []
    if chosen:
        results["exit_share"] = {str(k): float((left == i).mean()) for i, k in enumerate(exits)}
        results["mean_layers"] = costs["early exit"][0]
        for threshold in THRESHOLDS:
            uar = sdser.unweighted_average_recall(targets, early_predictions(scored.logits, threshold), len(labels))
            curve.append((on_the_way[exit_index(scored.logits, threshold)].mean() / 1e9, uar))
    if args.against:
        results["against"] = compare(scored, load_and_score(args.against, args.split, args.data, args.device))
    return results, curve


def report(results: dict, args) -> None:
    """The tables a person wants."""
    labels, rows = results["labels"], results["rows"]
    exits = [row["exit"] for row in rows if isinstance(row["exit"], int)]
    print(f"{', '.join(args.checkpoints)} on {args.data or 'its own clips'}: {results['split']}\n")
    print("exit          layers  params M  GMAC/s    UAR  95 % interval   accuracy  macro F1")
    for row in rows:
        name = f"{row['exit']} (teacher)" if row["exit"] == exits[-1] and len(exits) > 1 else str(row["exit"])
        low, high = row["uar_ci95"]
        cost = f"{row['layers']:6.3g}  {row['parameters'] / 1e6:8.2f}  {row['macs_per_second'] / 1e9:6.2f}"
        worth = f"{row['uar']:.3f}  {low:.3f} to {high:.3f}  {row['accuracy']:8.3f}  {row['macro_f1']:8.3f}"
        print(f"{name:12}  {cost}  {worth}")
    speakers = "unknown speakers (so the intervals are too narrow)"
    if results["speakers"]:
        speakers = f"{results['speakers']} speakers{' (few: rough intervals)' if results['speakers'] < 8 else ''}"
    print(f"{results['clips']} clips of {speakers}; chance is {results['chance']:.3f}")
    print("GMAC/s: billions of multiply-accumulates per second of audio, for a clip of the mean length")
    if results["thresholds"]:
        leaves = ", ".join(f"{100 * share:.0f} % at exit {k}" for k, share in results["exit_share"].items())
        chosen = ", ".join(map(str, results["thresholds"]))
        print(f"early exit at confidence {chosen}, the lowest whose UAR on dev is within {args.tolerance} of exit "
              f"{exits[-1]}'s, kept in config.json: {leaves}")  # fmt: skip

    print("\nrecall      " + "".join(f"{label[:10]:>11}" for label in labels))
    for row in rows:
        recalls = [f"{'-':>11}" if recall is None else f"{recall:11.3f}" for recall in row["recall"].values()]
        print(f"{row['exit']!s:12}" + "".join(recalls))
    if args.against:
        print(f"\ndifference in UAR to {', '.join(args.against)}, paired, with 95 % interval")
        for row in results["against"]:
            print(f"  {row['exit']!s:8} {row['difference']:+.3f}  {row['ci95'][0]:+.3f} to {row['ci95'][1]:+.3f}")


def plot(results: dict, curve: list[tuple[float, float]], folder: str) -> None:
    """Writes uar_against_cost.png and confusion.png."""
    pyplot = import_pyplot()
    exits = [row for row in results["rows"] if isinstance(row["exit"], int)]
    figure, axes = pyplot.subplots(figsize=(5.5, 4), layout="constrained")
    for row in results["rows"]:
        cost, uar = row["macs_per_second"] / 1e9, row["uar"]
        error = np.abs(np.array([row["uar_ci95"]]).T - uar)
        if row in exits:
            axes.errorbar(cost, uar, error, fmt="o", color="black", capsize=3)
            axes.annotate(f"exit {row['exit']}", (cost, uar), (-5, 6), textcoords="offset points", ha="right")
        elif row["exit"] == "early exit":
            axes.plot(cost, uar, "*", color="black", markersize=12, label="early exit, threshold chosen on dev")
            axes.plot(*np.array(curve).T, "-", color="gray", zorder=0, label="early exit, all thresholds")
    axes.axhline(results["chance"], color="gray", linestyle=":", label="chance")
    axes.set(xlabel="GMAC per second of audio", ylabel="UAR (95 % interval)", xlim=(0, None), ylim=(0, 1))
    axes.legend(loc="lower right", fontsize="small")
    save_figure(figure, Path(folder, "uar_against_cost.png"))

    labels, confusion = results["labels"], np.array(exits[-1]["confusion"])
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    size = 2.5 + 0.6 * len(labels)
    figure, axes = pyplot.subplots(figsize=(size + 0.5, size), layout="constrained")
    axes.imshow(share, cmap="Greys", vmin=0, vmax=1)
    for (i, j), count in np.ndenumerate(confusion):
        axes.text(j, i, count, ha="center", va="center", color="white" if share[i, j] > 0.5 else "black")
    axes.set_xticks(range(len(labels)), labels, rotation=45, ha="right")
    axes.set_yticks(range(len(labels)), labels)
    axes.set(xlabel="predicted", ylabel="true", title=f"clips, exit {exits[-1]['exit']}")
    save_figure(figure, Path(folder, "confusion.png"))
    print(f"\nplots: {folder}/uar_against_cost.png, {folder}/confusion.png")


def import_pyplot():
    with sdser.file_errors("--plot", "needs matplotlib", "pip install matplotlib"):
        import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save_figure(figure, path) -> None:
    image = io.BytesIO()
    figure.savefig(image, format=Path(path).suffix[1:] or "png", dpi=120)
    sdser.replace_file(path, image.getbuffer())


# -- classifying files ------------------------------------------------------------------------------------------------
def classify_files(args) -> int:
    """A line per file as soon as it is known; returns the exit status, 2 if a file could not be read."""
    model = sdser.MultiExitSER.from_pretrained(args.checkpoints[0]).to(args.device)
    threshold = args.threshold
    if threshold is None and args.exit is None:
        threshold = model.threshold
    status, answers = 0, []
    for path in args.audio:
        try:
            answer = model.classify(path, args.exit, threshold)[0]
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            status = 2
            continue
        answers.append({"path": path, **answer._asdict()})
        print(f"{path}  {answer.label}  {answer.confidence:.3f}  exit {answer.exit}  {answer.milliseconds:.0f} ms",
              flush=True)  # fmt: skip
    if args.json:
        sdser.replace_file(args.json, json.dumps(answers, indent=2))
    return status


def main(argv=None) -> None:
    args = parse_args(argv)
    with train.script():
        args.device = train.usable_device(args.device)
        if args.json:
            train.check_writable(args.json)
        if args.plot:
            train.check_writable(args.plot, folder=True)
            import_pyplot()
        if args.audio:
            sys.exit(classify_files(args))
        results, curve = evaluate(args)
        if train.RANK == 0:
            if args.json:
                sdser.replace_file(args.json, json.dumps(results, indent=2))
            report(results, args)
            if args.plot:
                plot(results, curve, args.plot)


if __name__ == "__main__":
    main()
