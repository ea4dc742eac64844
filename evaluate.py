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
from collections import Counter
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import sdser
import train

THRESHOLDS = np.linspace(0, 1, 101).round(2).tolist()
DRAWS = 2000  # of the bootstrap


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    checkpoint = dict(nargs="+", metavar="CHECKPOINT")
    add("checkpoints", help="folder written by train.py, or a Hub name; several of one kind are pooled", **checkpoint)
    add("--data", metavar="SOURCE", help="another corpus than the checkpoint's own (see train.py)")
    add("--split", choices=train.SPLITS, help="default: test, or all clips of a --data without splits")
    add("--against", help="also the paired differences to these", **checkpoint)
    real_or_0 = train.positive(float, zero=True)
    add("--tolerance", type=real_or_0, default=0.01, metavar="X", help="UAR early exit may lose on dev (default 0.01)")
    add("--json", metavar="FILE", help="write the results as JSON")
    add("--plot", metavar="DIR", help="write a plot of worth against cost (needs matplotlib)")
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
    run: torch.Tensor  # (N,) the index of each clip's checkpoint
    logits: torch.Tensor  # (exits, N, C)

    @property
    def targets(self) -> torch.Tensor:
        """The class index of each clip's label, (N,)."""
        return torch.tensor([train.target_of(clip, self.model.labels) for clip in self.clips])

    @property
    def units(self) -> np.ndarray:
        """What the bootstrap draws, (N,): each clip's speaker, or the clip itself if any speaker is unknown."""
        known = all(clip.speaker for clip in self.clips)
        return np.array([clip.speaker if known else clip.path for clip in self.clips])


def load_and_score(checkpoints: list[str], split: str | None, source: str | None, device: str) -> Scored:
    """Scores every run on its own clips of a split, or on another corpus; ValueError unless all are of one kind."""
    kinds, clips, run, logits = [], [], [], []
    for i, checkpoint in enumerate(checkpoints):
        model = sdser.MultiExitSER.from_pretrained(checkpoint).to(device)
        kinds.append((model.labels, model.tile_seconds, str(model)))  # str(model) lists the layers and their sizes
        if kinds[i] != kinds[0]:
            raise ValueError(f"{checkpoint}: its labels, window, exits or backbone differ; pool runs of one kind")
        chosen = choose_clips(checkpoint, split, source, model.labels)
        clips += chosen
        run += [i] * len(chosen)
        logits.append(train.predict(model, chosen))
    return Scored(model, clips, torch.tensor(run), torch.cat(logits, 1))


def choose_clips(checkpoint: str, split: str | None, source: str | None, labels: list[str]) -> list[train.Clip]:
    """Returns the run's own clips of a split, as its split.csv lists them, or else the clips of another corpus.

    Clips that were trained on are never scored by mistake: a corpus that has splits gives its test split, and one that
    looks like the run's own is refused. Clips with other labels than the model's are left out, with a warning.
    """
    listed = os.path.join(checkpoint, "split.csv")
    clips = train.load_corpus(listed if source is None else source)
    has_splits = any(clip.split for clip in clips)
    if source is not None and not has_splits and os.path.isfile(listed):
        ours = set(map(name_and_label, train.load_corpus(listed)))
        shared = sum(name_and_label(clip) in ours for clip in clips)
        if shared > len(clips) / 3:
            raise ValueError(f"{source}: {shared} of its {len(clips)} clips have names and labels of {listed}, so it "
                             "looks like the run's own corpus: leave --data out; if it really is another, list it in "
                             "a manifest with a column split")  # fmt: skip
    split = split or ("test" if has_splits else None)
    if split:
        clips = [clip for clip in clips if clip.split == split]
    known = [clip for clip in clips if clip.label in labels]
    if not known:
        raise ValueError(f"{source or checkpoint}: has no clips of {', '.join(labels)} in {split or 'any split'}")
    if len(known) < len(clips):
        others = ", ".join(sorted({clip.label for clip in clips} - set(labels)))
        message = f"left out {len(clips) - len(known)} of {len(clips)} clips, whose labels the model does not know"
        warnings.warn(f"{source or checkpoint}: {message}: {others}", stacklevel=2)
    return train.look_at(known, listed if source is None else None)


def name_and_label(clip: train.Clip) -> tuple[str, str]:
    """Identifies a clip whatever folder it is in; PureWindowsPath takes both kinds of slash for separators."""
    return PureWindowsPath(clip.path).stem, clip.label


def bootstrap(targets: torch.Tensor, logits: torch.Tensor, units: np.ndarray) -> np.ndarray:
    """Returns the metric (rows, DRAWS) of logits (rows, N, C) on DRAWS resamples, each of as many units as there are.

    Units are drawn with replacement: a speaker with all their clips, which are not independent. Two calls on the same
    units draw the same, so that their differences are paired.
    """
    names, unit = np.unique(units, return_inverse=True)
    clips_of = [torch.from_numpy(np.flatnonzero(unit == i)) for i in range(len(names))]
    rng, values = np.random.default_rng(0), []
    for _ in range(DRAWS):
        drawn = torch.cat([clips_of[i] for i in rng.integers(len(names), size=len(names))])
        values.append([sdser.scores(targets[drawn], row[drawn])[sdser.METRIC] for row in logits])
    return np.array(values).T


def interval(draws: np.ndarray, units: np.ndarray) -> list[float] | None:
    """Returns the 95 % interval of draws (DRAWS,); None if there is only one unit."""
    return np.percentile(draws, [2.5, 97.5]).tolist() if len(set(units)) > 1 else None


def compare(ours: Scored, theirs: Scored) -> list[dict]:
    """Returns the paired difference, ours minus theirs, at each exit that both have, and of fusion if both fuse."""
    rows_of_ours = train.answers(ours.model.exits, ours.logits)
    rows_of_theirs = train.answers(theirs.model.exits, theirs.logits)
    shared = [exit for exit in rows_of_ours if exit in rows_of_theirs]
    # Both sides must hold the same clips. One may hold each of them n times (n seeds), if n is the same for all clips.
    our_counts = Counter(zip((clip[:2] for clip in ours.clips), ours.units))
    their_counts = Counter(zip((clip[:2] for clip in theirs.clips), theirs.units))
    ratios = {count / their_counts[key] for key, count in our_counts.items() if key in their_counts}
    if our_counts.keys() != their_counts.keys() or len(ratios) != 1:
        raise ValueError("--against: give runs scored on the same clips, each clip equally often")
    if ours.model.labels != theirs.model.labels or not shared:
        raise ValueError("--against: give runs with the same labels and some exit in common")
    values, draws = [], []
    for scored, rows in ((ours, rows_of_ours), (theirs, rows_of_theirs)):
        logits = torch.stack([rows[exit] for exit in shared])
        values.append([sdser.scores(scored.targets, row)[sdser.METRIC] for row in logits])
        draws.append(bootstrap(scored.targets, logits, scored.units))
    differences = zip(shared, np.subtract(*values).tolist(), np.subtract(*draws))
    return [{"exit": exit, "difference": value, "ci95": interval(row, ours.units)} for exit, value, row in differences]


# -- early exit, and cost ---------------------------------------------------------------------------------------------
def exit_index(logits: torch.Tensor, thresholds: float | torch.Tensor) -> torch.Tensor:
    """Returns the index of the exit (N,) at which each clip leaves; logits: (exits, N, C); thresholds: one or (N,)."""
    stops = torch.stack([sdser.should_stop(logits[: i + 1], thresholds) for i in range(len(logits))])  # (exits, N)
    stops[-1] = True
    return stops.int().argmax(0)  # the first that stops


def early_logits(logits: torch.Tensor, thresholds: float | torch.Tensor) -> torch.Tensor:
    """Returns each clip's logits (N, C) from the exit at which it leaves."""
    return logits[exit_index(logits, thresholds), torch.arange(logits.shape[1])]


def lowest_threshold(targets: torch.Tensor, logits: torch.Tensor, tolerance: float) -> float:
    """Returns the lowest threshold, and so the cheapest, whose metric is within the tolerance of the deepest exit's."""
    deepest = sdser.scores(targets, logits[-1])[sdser.METRIC]
    for threshold in THRESHOLDS:
        if sdser.scores(targets, early_logits(logits, threshold))[sdser.METRIC] >= deepest - tolerance:
            return threshold
    raise ValueError(f"at no threshold is dev within {tolerance} of the deepest exit; give a larger --tolerance")


def calibrate(checkpoints: list[str], args) -> list[float]:
    """Chooses each run's threshold on its dev clips and keeps it in its config.json.

    Returns an empty list, and warns, if a run has no dev clips or no threshold is good enough.
    """
    chosen = []
    try:
        dev = load_and_score(checkpoints, "dev", None, args.device)
        runs = [dev.run == i for i in range(len(checkpoints))]
        chosen = [lowest_threshold(dev.targets[run], dev.logits[:, run], args.tolerance) for run in runs]
        for checkpoint, threshold in zip(checkpoints, chosen) if train.RANK == 0 else []:
            path = Path(checkpoint, "config.json")
            config = {**json.loads(path.read_text()), "threshold": threshold}
            sdser.replace_file(path, json.dumps(config, indent=2))
    except (OSError, ValueError) as error:  # --final trains on dev; a Hub model has none; a folder may be read-only
        problem = "the threshold is not kept" if chosen else "early exit is not calibrated"
        warnings.warn(f"{problem}: {error}", stacklevel=2)
    return chosen


@torch.no_grad()
def count_macs(model: sdser.MultiExitSER, samples: int, exit: int, heads_on_the_way: bool = False) -> int:
    """Counts the multiply-accumulates of the matrix products and convolutions that answer for one clip at an exit.

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
    """Counts the parameters of a model that has only these exits, and only the layers that they need."""
    heads = [model.head_kinds[model.exits.index(k)] for k in exits]
    with torch.device("meta"):  # shapes without memory
        small = sdser.MultiExitSER(model.labels, model.backbone.config.to_dict(), exits, heads)
    return sum(p.numel() for p in small.parameters())


# -- the report, and plots --------------------------------------------------------------------------------------------
class Cost(NamedTuple):
    """The cost of a row of the table, for a clip of mean length; for early exit, averaged over the exits taken."""

    layers: float
    parameters: int
    macs_per_second: float  # of audio


def evaluate(args) -> tuple[dict, list[tuple[float, float]]]:
    """Returns everything that goes into the JSON, and early exit's cost and metric at each threshold."""
    scored = load_and_score(args.checkpoints, args.split, args.data, args.device)
    chosen = calibrate(args.checkpoints, args)
    model, clips, targets = scored.model, scored.clips, scored.targets
    exits, labels = model.exits, model.labels
    thresholds = torch.tensor(chosen)[scored.run] if chosen else None  # (N,), of each clip's run

    seconds = float(np.mean([clip.seconds for clip in clips]))
    samples = round(seconds * sdser.SAMPLE_RATE)
    on_the_way = np.array([count_macs(model, samples, k, heads_on_the_way=True) for k in exits]) / seconds
    logits_of = train.answers(exits, scored.logits)  # of each row of the table
    costs = {k: Cost(k, count_parameters(model, [k]), count_macs(model, samples, k) / seconds) for k in exits}
    if "fusion" in logits_of:
        costs["fusion"] = Cost(exits[-2], count_parameters(model, exits[:-1]), on_the_way[-2])
    if chosen:
        left_at = exit_index(scored.logits, thresholds).numpy()  # (N,)
        layers, macs = np.array(exits)[left_at].mean(), on_the_way[left_at].mean()
        costs["early exit"] = Cost(layers, count_parameters(model, exits), macs)
        logits_of["early exit"] = early_logits(scored.logits, thresholds)

    draws = bootstrap(targets, torch.stack(list(logits_of.values())), scored.units)
    rows = []
    for (exit, logits), row_draws in zip(logits_of.items(), draws):
        confusion = sdser.confusion_matrix(targets, logits.argmax(-1), len(labels))
        counts = zip(confusion.diagonal().tolist(), confusion.sum(1).tolist())
        recall = dict(zip(labels, [hits / total if total else None for hits, total in counts]))
        ci95 = interval(row_draws, scored.units)
        rows.append({"exit": exit, **sdser.scores(targets, logits), f"{sdser.METRIC}_ci95": ci95, "recall": recall,
                     "confusion": confusion.tolist(), **costs[exit]._asdict()})  # fmt: skip
    speakers = {clip.speaker for clip in clips}
    results = {"labels": labels, "checkpoints": args.checkpoints, "split": args.split or clips[0].split or "all",
               "clips": len(clips), "speakers": None if None in speakers else len(speakers),
               "chance": 1 / len({clip.label for clip in clips}), "rows": rows, "thresholds": chosen}  # fmt: skip
    results["predictions"], curve = [], []
    for i, clip in enumerate(clips):
        said = {str(exit): labels[logits[i].argmax()] for exit, logits in logits_of.items()}
        about = {"path": clip.path, "speaker": clip.speaker, "label": clip.label}
        results["predictions"].append({**about, "answers": said})
    if chosen:
        results["exit_share"] = {str(k): float((left_at == i).mean()) for i, k in enumerate(exits)}
        results["mean_layers"] = costs["early exit"].layers
        for threshold in THRESHOLDS:
            value = sdser.scores(targets, early_logits(scored.logits, threshold))[sdser.METRIC]
            curve.append((on_the_way[exit_index(scored.logits, threshold)].mean() / 1e9, value))
    if args.against:
        results["against"] = compare(scored, load_and_score(args.against, args.split, args.data, args.device))
    return results, curve


def report(results: dict, args) -> None:
    """Prints the result tables."""
    labels, rows = results["labels"], results["rows"]
    exits = [row["exit"] for row in rows if isinstance(row["exit"], int)]
    print(f"{', '.join(args.checkpoints)} on {args.data or 'its own clips'}: {results['split']}\n")
    metric = sdser.METRIC.upper()
    others = [name for name in ("accuracy", "macro_f1") if name in rows[0]]
    columns = "".join(f"  {name:>8}" for name in others)
    print(f"exit          layers  params M  GMAC/s  {metric:>5}  95 % interval {columns}")
    for row in rows:
        title = f"{row['exit']} (teacher)" if row["exit"] == exits[-1] and len(exits) > 1 else str(row["exit"])
        ci95 = between(row[f"{sdser.METRIC}_ci95"], ".3f")
        cost = f"{row['layers']:6.3g}  {row['parameters'] / 1e6:8.2f}  {row['macs_per_second'] / 1e9:6.2f}"
        worth = f"{row[sdser.METRIC]:.3f}  {ci95:14}" + "".join(f"  {row[name]:8.3f}" for name in others)
        print(f"{title:12}  {cost}  {worth}")
    speakers = "unknown speakers (so the intervals are too narrow)"
    if results["speakers"] == 1:
        speakers = "one speaker (an interval needs two: pool the runs of several folds)"
    elif results["speakers"]:
        speakers = f"{results['speakers']} speakers{' (few: rough intervals)' if results['speakers'] < 8 else ''}"
    print(f"{results['clips']} clips of {speakers}; chance is {results['chance']:.3f}")
    print("GMAC/s: billions of multiply-accumulates per second of audio, for a clip of the mean length")
    if results["thresholds"]:
        leaves = ", ".join(f"{100 * share:.0f} % at exit {k}" for k, share in results["exit_share"].items())
        chosen = ", ".join(map(str, results["thresholds"]))
        print(f"early exit at confidence {chosen}, the lowest whose {metric} on dev is within {args.tolerance} of exit "
              f"{exits[-1]}'s: {leaves}")  # fmt: skip

    print("\nrecall      " + "".join(f"{label[:10]:>11}" for label in labels))
    for row in rows:
        recalls = [f"{'-':>11}" if recall is None else f"{recall:11.3f}" for recall in row["recall"].values()]
        print(f"{row['exit']!s:12}" + "".join(recalls))
    if args.against:
        print(f"\ndifference in {metric} to {', '.join(args.against)}, paired, with 95 % interval")
        for row in results["against"]:
            print(f"  {row['exit']!s:8} {row['difference']:+.3f}  {between(row['ci95'], '+.3f')}")


def between(ci95: list[float] | None, form: str) -> str:
    """Returns an interval as text, "-" if there is none."""
    return "-" if ci95 is None else f"{ci95[0]:{form}} to {ci95[1]:{form}}"


def plot(results: dict, curve: list[tuple[float, float]], folder: str) -> None:
    figure = new_figure(figsize=(5.5, 4))
    axes = figure.subplots()
    for row in results["rows"]:
        cost, value = row["macs_per_second"] / 1e9, row[sdser.METRIC]
        ci95 = row[f"{sdser.METRIC}_ci95"]
        error = None if ci95 is None else np.abs(np.array([ci95]).T - value)
        if isinstance(row["exit"], int):
            axes.errorbar(cost, value, error, fmt="o", color="black", capsize=3)
            axes.annotate(f"exit {row['exit']}", (cost, value), (-5, 6), textcoords="offset points", ha="right")
        elif row["exit"] == "early exit":
            axes.plot(cost, value, "*", color="black", markersize=12, label="early exit, threshold chosen on dev")
            axes.plot(*np.array(curve).T, "-", color="gray", zorder=0, label="early exit, all thresholds")
    axes.axhline(results["chance"], color="gray", linestyle=":", label="chance")
    axes.set(xlabel="GMAC per second of audio", xlim=(0, None))
    axes.set(ylabel=f"{sdser.METRIC.upper()} (95 % interval)", ylim=(0, 1))
    axes.legend(loc="lower right", fontsize="small")
    save_figure(figure, Path(folder, "uar_against_cost.png"))
    print(f"\nplot: {folder}/uar_against_cost.png")


def new_figure(**size):
    with sdser.file_errors("--plot", "needs matplotlib", "pip install matplotlib"):
        import matplotlib.figure
    return matplotlib.figure.Figure(layout="constrained", **size)


def save_figure(figure, path) -> None:
    image = io.BytesIO()
    figure.savefig(image, format=Path(path).suffix[1:] or "png", dpi=120)
    sdser.replace_file(path, image.getbuffer())


# -- classifying files ------------------------------------------------------------------------------------------------
def classify_files(args) -> int:
    """Prints a line per file as soon as it is known; returns the exit status, 2 if a file could not be read."""
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
            new_figure()  # or say that matplotlib is absent
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
