"""What each exit of a trained model is worth and what it costs, and how early it may stop.

The threshold of early exit that it chooses on dev is kept in the checkpoint's config.json.

    python evaluate.py out                                  # the run's own test split
    python evaluate.py fold1 fold2 fold3                    # the runs of several folds, their test clips pooled
    python evaluate.py out --against other                  # the paired difference between two runs
    python evaluate.py out --data path/to/another/corpus
    python evaluate.py out --audio a.wav b.flac --json -    # classify files

Read top to bottom: the flags, classifying files, scoring, intervals, early exit, cost, the report, the plots.
"""

import argparse
import json
import os
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import sdser
import train

THRESHOLDS = np.linspace(0, 1, 101)
DRAWS = 2000  # of the bootstrap


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add(
        "checkpoints",
        nargs="+",
        metavar="CHECKPOINT",
        help="folder written by train.py, or a Hub name; several: pooled",
    )
    add("--data", metavar="SOURCE", help="another corpus than the checkpoint's own (see train.py)")
    add("--split", choices=("test", "dev", "train", "all"), help="default: test, or all of a --data without splits")
    add(
        "--against",
        nargs="+",
        action="append",
        default=[],
        metavar="CHECKPOINT",
        help="also the paired difference to these, pooled; may be repeated, for runs of other exits",
    )
    add("--common-labels", action="store_true", help="leave out clips whose label the model does not know")
    add(
        "--tolerance",
        type=train.share,
        default=0.01,
        metavar="X",
        help="UAR that early exit may cost on dev (default 0.01)",
    )
    add("--audio", nargs="+", metavar="FILE", help="classify these files instead")
    add("--exit", type=int, metavar="K", help="with --audio: run to this exit; else the one whose confusions are shown")
    add(
        "--threshold",
        metavar="P",
        help="with --audio: stop at the first exit this certain, 0 to 1, or auto (the default once calibrated)",
    )
    add("--json", metavar="FILE", help="write the results as JSON; - for standard output")
    add("--plot", metavar="DIR", help="write plots (needs matplotlib)")
    add("--batch-size", type=train.positive_int, default=16, metavar="N")
    add("--workers", type=train.natural, default=0, metavar="N", help="processes that load audio")
    add("--device", metavar="D", help="default: cuda where there is one, else cpu")
    args = parser.parse_args(argv)
    if args.threshold not in (None, "auto"):
        try:
            args.threshold = float(args.threshold)
        except ValueError:
            parser.error(f"--threshold {args.threshold}: give a number from 0 to 1, or auto")
        if not 0 <= args.threshold <= 1:
            parser.error(f"--threshold {args.threshold}: give a probability from 0 to 1, or auto")
    if args.audio and (len(args.checkpoints) > 1 or args.against or args.data or args.split or args.plot):
        parser.error("--audio goes with one checkpoint, without --against, --data, --split and --plot")
    if args.threshold is not None and (not args.audio or args.exit is not None):
        parser.error("--threshold goes with --audio, and without --exit")
    return args


# -- classifying files ------------------------------------------------------------------------------------------------


def classify_files(args) -> int:
    """A line per file as soon as it is known; the exit status, 2 if a file could not be read."""
    checkpoint, threshold, status, lines = args.checkpoints[0], args.threshold, 0, []
    model = sdser.MultiExitSER.from_pretrained(checkpoint).to(args.device)
    if args.exit is not None:
        model.check_exit(args.exit)
    elif threshold is None and model.threshold is not None:
        threshold = "auto"
    foreign = [path for path in args.audio if not is_synthetic(path)]
    if foreign and knows_synthetic_voices_alone(checkpoint):
        print(f"note: {checkpoint} was trained on synthetic voices; its answer to {foreign[0]} means nothing",
              file=sys.stderr)  # fmt: skip
    try:
        for path in args.audio:
            try:
                [answer] = model.classify(path, args.exit, threshold)
            except (ValueError, OSError) as error:
                print(f"error: {error}", file=sys.stderr)
                status = 2
                continue
            lines.append(json.dumps({"path": path, **answer._asdict()}) + "\n")
            table = f"{path}  {answer.label}  {answer.confidence:.3f}  exit {answer.exit}  {answer.milliseconds:.0f} ms"
            print(lines[-1].rstrip() if args.json == "-" else table, flush=True)
    finally:
        if args.json not in (None, "-"):
            train.write_text(args.json, "".join(lines))
    return status


def knows_synthetic_voices_alone(checkpoint: str) -> bool:
    try:
        return all(is_synthetic(clip.path) for clip in own_clips(checkpoint))
    except (OSError, ValueError):
        return False


def is_synthetic(path: str) -> bool:
    folder = Path(path).absolute().parent
    return folder.parent == train.cache_folder() and folder.name.startswith("synthetic-")


# -- scoring ----------------------------------------------------------------------------------------------------------


class Scored(NamedTuple):
    """A checkpoint's logits for N clips."""

    checkpoint: str
    model: sdser.MultiExitSER
    clips: list[train.Clip]
    seconds: np.ndarray  # (N,)
    logits: torch.Tensor  # (exits, N, C)

    @property
    def samples(self) -> np.ndarray:
        return (self.seconds * sdser.SAMPLE_RATE).round().astype(int)

    @property
    def targets(self) -> np.ndarray:
        return np.array([self.model.labels.index(clip.label) for clip in self.clips])

    @property
    def rows(self) -> list:
        """What is scored: each exit, then the fusion of the students where there are several."""
        return [*self.model.exits, *(["fusion"] if len(self.model.exits) > 2 else [])]

    @property
    def predictions(self) -> np.ndarray:
        """(rows, N) class indices."""
        fused = [sdser.fuse(self.logits[:-1]).argmax(-1)] if "fusion" in self.rows else []
        return torch.stack([*self.logits.argmax(-1), *fused]).numpy()


def own_clips(checkpoint: str) -> list[train.Clip]:
    """The clips that train.py listed in the checkpoint's split.csv."""
    path = os.path.join(checkpoint, "split.csv")
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"{checkpoint}: holds no split.csv, so its test clips are unknown; name a corpus by --data"
        )
    return train.load_corpus(path)


def choose_clips(checkpoint: str, model: sdser.MultiExitSER, args) -> tuple[list[train.Clip], str]:
    """The clips to score, of the checkpoint's own splits or of --data that it was not trained on; and which split."""
    if args.data is None:
        clips, split = own_clips(checkpoint), args.split or "test"
    else:
        clips, split = train.load_corpus(args.data), args.split
        if any(clip.split for clip in clips):
            split = split or "test"
        elif split not in (None, "all"):
            clips = train.split_clips(clips)
        if os.path.isfile(os.path.join(checkpoint, "split.csv")):
            refuse_training_clips(checkpoint, [clip for clip in clips if split in (None, "all", clip.split)], args.data)
    clips = [clip for clip in clips if split in (None, "all", clip.split)]
    if args.data is None and split in ("train", "all"):
        warnings.warn(
            f"{checkpoint} was trained on clips of the split {split}; scores on them say little", stacklevel=2
        )
    if not clips:
        raise ValueError(f"{args.data or checkpoint}: has no clips in the split {split}")
    known = [clip for clip in clips if clip.label in model.labels]
    if len(known) < len(clips):
        unknown = ", ".join(sorted({clip.label for clip in clips} - set(model.labels)))
        if not args.common_labels or not known:
            raise ValueError(
                f"{args.data}: has labels that {checkpoint} does not know ({unknown}; it knows "
                f"{', '.join(model.labels)}); --common-labels leaves them out"
            )
        if train.RANK == 0:
            print(f"left out {len(clips) - len(known)} of {len(clips)} clips, labelled {unknown}", file=sys.stderr)
    return known, split or "all"


def refuse_training_clips(checkpoint: str, clips: list[train.Clip], source: str) -> None:
    """Raises ValueError if the model was trained on one of the clips, known by path, or by file name and speaker."""
    trained = [clip for clip in own_clips(checkpoint) if clip.split == "train"]
    paths = {clip.path for clip in trained}
    names = {(Path(clip.path).stem, clip.speaker) for clip in trained if clip.speaker}
    seen = [c for c in clips if os.path.abspath(c.path) in paths or (Path(c.path).stem, c.speaker) in names]
    if seen:
        raise ValueError(
            f"{source}: {checkpoint} was trained on {len(seen)} of these clips, {seen[0].path} for one; "
            "leave --data out to score the run's own test clips"
        )


def score(checkpoint: str, model, clips, args) -> Scored:
    seconds = train.look_at([clip._replace(split=None) for clip in clips])
    if bad := [problem for problem in seconds if isinstance(problem, str)]:
        raise ValueError(bad[0])
    paths = [clip.path for clip in clips]
    logits, _ = train.predict(model, paths, seconds, batch_size=args.batch_size, workers=args.workers)
    return Scored(checkpoint, model, clips, np.array(seconds), logits)


def load_and_score(checkpoints: list[str], args, exit: int | None = None) -> tuple[list[Scored], str]:
    """The runs, all of the same labels and exits, on their clips of the split that is returned with them.

    exit: one that they must have, if any.
    """
    runs = []
    for checkpoint in checkpoints:
        model = sdser.MultiExitSER.from_pretrained(checkpoint).to(args.device)
        if exit is not None:
            model.check_exit(exit)
        if runs and (model.labels, model.exits) != (runs[0].model.labels, runs[0].model.exits):
            raise ValueError(f"{checkpoint}: other labels or exits than {runs[0].checkpoint}; pool runs of one kind")
        clips, split = choose_clips(checkpoint, model, args)
        runs.append(score(checkpoint, model, clips, args))
    return runs, split


# -- intervals --------------------------------------------------------------------------------------------------------


def speakers_or_clips(runs: list[Scored]) -> tuple[np.ndarray, bool]:
    """What the bootstrap draws: each clip's speaker, or the clip itself if any is unknown; and if all are known."""
    known = all(clip.speaker for run in runs for clip in run.clips)
    return np.array([clip.speaker if known else clip.path for run in runs for clip in run.clips]), known


def bootstrap(targets, predictions, units, num_classes: int) -> np.ndarray:
    """UARs (rows, DRAWS) of `predictions` (rows, N), each from as many units as there are, drawn with replacement.

    A unit, a speaker, is drawn with all its clips, since clips of one speaker are not independent. The draws depend on
    the set of units alone, so two calls on the same speakers are paired.
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


def interval(draws: np.ndarray) -> list[float]:
    return np.percentile(draws, [2.5, 97.5]).tolist()


def compare(ours: list[Scored], theirs: list[Scored]) -> list[dict]:
    """The paired difference in UAR, ours minus theirs, at each exit that both have, and of fusion if both fuse."""
    clips, others = ({clip.path for run in runs for clip in run.clips} for runs in (ours, theirs))
    if clips != others:
        raise ValueError(
            f"--against: {len(clips ^ others)} clips were scored on one side alone; compare runs of the same splits"
        )
    labels, exits, other = ours[0].model.labels, ours[0].model.exits, theirs[0].model
    if other.labels != labels:
        raise ValueError(
            f"--against: {theirs[0].checkpoint} has other labels than {ours[0].checkpoint}; compare like with like"
        )
    common = [row for row in ours[0].rows if row in theirs[0].rows]
    if not common:
        raise ValueError(
            f"--against: {theirs[0].checkpoint} has no exit of {exits}, only {other.exits}; compare runs that share one"
        )
    draws, points = [], []
    for runs in (ours, theirs):
        rows = [runs[0].rows.index(row) for row in common]
        targets = np.concatenate([run.targets for run in runs])
        predictions = np.concatenate([run.predictions for run in runs], -1)[rows]
        points.append([sdser.unweighted_average_recall(targets, row, len(labels)) for row in predictions])
        draws.append(bootstrap(targets, predictions, speakers_or_clips(runs)[0], len(labels)))
    return [
        {"exit": exit, "difference": our - their, "ci95": interval(row), "against": [run.checkpoint for run in theirs],
         "against_uar": their, "against_uar_ci95": interval(their_draws)}
        | ({"against_macs_per_second": macs_per_second(theirs, exit)} if exit != "fusion" else {})
        for exit, our, their, row, their_draws in zip(common, *points, draws[0] - draws[1], draws[1])
    ]  # fmt: skip


# -- early exit -------------------------------------------------------------------------------------------------------


def exit_index(logits: torch.Tensor, threshold: float) -> np.ndarray:
    """The index of the exit (N,) at which each clip would leave, from logits (exits, N, C)."""
    certain = logits.softmax(-1).amax(-1) >= threshold  # (exits, N)
    certain[-1] = True
    return certain.int().argmax(0).numpy()


def adaptive_macs(run: Scored) -> np.ndarray:
    """What a clip that leaves at an exit has cost, all heads on its way included: (exits, N)."""
    exits = run.model.exits
    return np.stack([count_macs(run.model, run.samples, k, exits[: i + 1]) for i, k in enumerate(exits)])


def describe_adaptive(runs: list[Scored], indices: list[np.ndarray], predictions: list[np.ndarray]) -> dict:
    """UAR and cost where clip n of a run left at the exit of index indices[run][n], with that prediction."""
    targets = np.concatenate([run.targets for run in runs])
    exits, index = runs[0].model.exits, np.concatenate(indices)
    macs = sum(adaptive_macs(run)[row, np.arange(len(row))].sum() for run, row in zip(runs, indices))
    return {
        "uar": sdser.unweighted_average_recall(targets, np.concatenate(predictions), len(runs[0].model.labels)),
        "mean_layers": float(np.array(exits)[index].mean()),
        "macs_per_second": float(macs / sum(run.seconds.sum() for run in runs)),
        "exit_share": {str(k): float((index == i).mean()) for i, k in enumerate(exits)},
    }


def sweep(runs: list[Scored]) -> list[dict]:
    """`describe_adaptive` at every threshold, worked out from the logits of all exits."""
    rows = []
    for threshold in THRESHOLDS.round(2).tolist():
        indices = [exit_index(run.logits, threshold) for run in runs]
        predictions = [run.predictions[row, np.arange(len(row))] for run, row in zip(runs, indices)]
        rows.append({"threshold": threshold, **describe_adaptive(runs, indices, predictions)})
    return rows


def calibrate(run: Scored, args) -> tuple[float, Scored] | None:
    """Chooses the run's threshold on its dev split, and keeps it in config.json: the cheapest that costs little UAR."""
    try:
        clips = [clip for clip in own_clips(run.checkpoint) if clip.split == "dev"]
        if not clips:
            raise ValueError(f"{run.checkpoint} has no dev clips of its own (--final trains on them)")
        dev = score(run.checkpoint, run.model, clips, args)
    except (OSError, ValueError) as error:
        if train.RANK == 0:
            print(f"early exit is not calibrated: {error}", file=sys.stderr)
        return None
    deepest = sdser.unweighted_average_recall(
        dev.targets, dev.predictions[len(run.model.exits) - 1], len(run.model.labels)
    )
    good = [row for row in sweep([dev]) if row["uar"] >= deepest - args.tolerance]
    threshold = min(good, key=lambda row: row["macs_per_second"])["threshold"] if good else 1.0
    before, run.model.threshold = run.model.threshold, threshold
    if train.RANK:
        return threshold, dev
    try:
        train.write_text(os.path.join(run.checkpoint, "config.json"), json.dumps(run.model.arguments, indent=2))
    except ValueError as error:
        run.model.threshold = before
        warnings.warn(f"the threshold is not kept: {error}", stacklevel=2)
    return threshold, dev


@torch.no_grad()
def run_adaptive(run: Scored, threshold: float, args) -> tuple[np.ndarray, np.ndarray]:
    """Really runs early exit over the clips, in batches: each clip's exit, by index, and prediction, (N,) both."""
    answers = torch.zeros(2, len(run.clips), dtype=torch.int64)
    paths = [clip.path for clip in run.clips]
    loading = dict(batch_size=args.batch_size, workers=args.workers)
    for i, waveforms, lengths in train.file_batches(paths, run.seconds, run.model.tile_seconds, **loading):
        logits, exits = run.model.early_exit(waveforms.to(args.device), lengths.to(args.device), threshold)
        answers[0, i] = torch.searchsorted(torch.tensor(run.model.exits), exits.cpu())
        answers[1, i] = logits.argmax(-1).cpu()
    train.wait()  # as in `train.predict`
    index, predictions = train.summed(answers).numpy()
    return index, predictions


# -- cost -------------------------------------------------------------------------------------------------------------


def count_macs(model: sdser.MultiExitSER, samples, exit: int, heads: list[int] | None = None):
    """Multiply-accumulates of the matrix products and convolutions that answer for one clip at an exit.

    Args:
        samples: the clip's length at 16 kHz, an int or an array of them (not tiled yet).
        heads: exits whose heads run; default: that exit's alone. Early exit runs all on its way.
    Returns:
        int64, as many as lengths were given.
    """
    config = model.backbone.config
    t = np.asarray(samples, dtype=np.int64)
    if model.tile_seconds:
        t = np.full_like(t, round(model.tile_seconds * sdser.SAMPLE_RATE))
    d, inner, channels = config.hidden_size, config.intermediate_size, 1
    total = np.zeros_like(t)
    for width, kernel, stride in zip(config.conv_dim, config.conv_kernel, config.conv_stride):
        t = (t - kernel) // stride + 1  # samples become frames
        total += t * width * channels * kernel
        channels = width
    total += t * channels * d  # feature projection
    # the position convolution pads both ends by half its kernel, and drops the frame that an even kernel adds
    kernel = config.num_conv_pos_embeddings
    total += (t + (kernel + 1) % 2) * d * (d // config.num_conv_pos_embedding_groups) * kernel
    layer = t * (4 * d * d + 2 * d * inner) + 2 * t * t * d  # projections and feed-forward; attention
    if config.model_type == "wavlm":
        layer += t * d * 8  # the gate of the position bias
    total += exit * layer
    for k in [exit] if heads is None else heads:
        kind = model.head_kinds[model.exits.index(k)]
        per_frame = {"gru": 6 * d * d, "lstm": 8 * d * d, "attention": d, "mean": 0}[kind] + d  # + the weighted mean
        total += t * per_frame + 256 * (d + len(model.labels))
    return total


def time_clips(run: Scored, threshold: float | None, clips: int = 10, rounds: int = 3) -> dict:
    """Milliseconds per clip at each exit, and "adaptive": the mean over clips of all lengths, one by one."""
    ways = {k: dict(exit=k) for k in run.model.exits}
    if threshold is not None:
        ways["adaptive"] = dict(threshold=threshold)
    some = np.argsort(run.seconds)[np.linspace(0, len(run.clips) - 1, min(clips, len(run.clips))).round().astype(int)]
    times = {way: [] for way in ways}
    for i in some:
        waveform = sdser.load_audio(run.clips[i].path)
        for way, how in ways.items():
            run.model.classify([waveform], **how)  # warm up
            times[way].append([])
        for _ in range(rounds):
            for way, how in ways.items():
                times[way][-1].append(run.model.classify([waveform], **how)[0].milliseconds)
    return {way: float(np.mean(np.median(rows, axis=1))) for way, rows in times.items()}


def macs_per_second(runs: list[Scored], exit: int) -> float:
    """Multiply-accumulates per second of audio, over all clips."""
    macs = sum(count_macs(run.model, run.samples, exit).sum() for run in runs)
    return float(macs / sum(run.seconds.sum() for run in runs))


def kept_parameters(model: sdser.MultiExitSER, exit: int) -> int:
    """Parameters of `model.truncate(exit)`."""
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    dropped = sum(count(layer) for layer in model.backbone.encoder.layers[exit:])
    return count(model.backbone) - dropped + count(model.heads[str(exit)])


# -- the report -------------------------------------------------------------------------------------------------------


def evaluate(args) -> dict | None:
    """Everything about the checkpoints, as it goes into the JSON; of several processes, the first one's result."""
    # Whatever runs over files, all processes share.
    runs, split = load_and_score(args.checkpoints, args, args.exit)
    calibrated = [calibrate(run, args) for run in runs]
    thresholds = [threshold for threshold, _ in filter(None, calibrated)]
    adaptive = len(thresholds) == len(runs)
    ways = [run_adaptive(run, threshold, args) for run, threshold in zip(runs, thresholds)] if adaptive else []
    against = [load_and_score(other, args)[0] for other in args.against]
    if train.RANK:
        return None

    model, milliseconds = runs[0].model, time_clips(runs[0], thresholds[0] if adaptive else None)
    rows, (units, by_speaker) = describe_rows(runs, milliseconds), speakers_or_clips(runs)
    results = {
        "labels": model.labels,
        "checkpoints": args.checkpoints,
        "split": split,
        "clips": sum(len(run.clips) for run in runs),
        "speakers": len(set(units)) if by_speaker else None,
        "chance": 1 / len({clip.label for run in runs for clip in run.clips}),
        "confusion_exit": args.exit or model.exits[-1],
        split: {"exits": rows[: len(model.exits)]},
    }
    if "fusion" in runs[0].rows:
        results[split]["fusion"] = rows[-1]
    if adaptive:
        results["adaptive"] = sweep([dev for _, dev in calibrated])
        results["curve"] = sweep(runs)
        results["chosen"] = {
            "threshold": thresholds[0] if len(runs) == 1 else thresholds,
            **describe_adaptive(runs, *zip(*ways)),
            "ms_per_clip": milliseconds["adaptive"],
            "kept": [run.model.threshold for run in runs] == thresholds,
        }
    if against:
        results["against"] = [row for theirs in against for row in compare(runs, theirs)]
    return results


def describe_rows(runs: list[Scored], milliseconds: dict) -> list[dict]:
    """What each exit, and fusion, is worth, and what each exit costs."""
    model, targets = runs[0].model, np.concatenate([run.targets for run in runs])
    predictions = np.concatenate([run.predictions for run in runs], -1)  # (rows, N)
    draws = bootstrap(targets, predictions, speakers_or_clips(runs)[0], len(model.labels))
    rows = []
    for name, row, uars in zip(runs[0].rows, predictions, draws):
        confusion = sdser.confusion_matrix(targets, row, len(model.labels))
        recall = [hits / n if n else None for hits, n in zip(confusion.diagonal().tolist(), confusion.sum(1).tolist())]
        rows.append({"exit": name, **sdser.scores(targets, row, len(model.labels)), "uar_ci95": interval(uars),
                     "recall": dict(zip(model.labels, recall)), "confusion": confusion.tolist()})  # fmt: skip
        if name != "fusion":
            rows[-1] |= {"layers": name, "parameters": kept_parameters(model, name),
                         "macs_per_second": macs_per_second(runs, name), "ms_per_clip": milliseconds[name]}  # fmt: skip
    return rows


def dim(text: str) -> str:
    return f"\033[2m{text}\033[0m" if sys.stdout.isatty() else text


def report(results: dict, args) -> None:
    """The tables a person wants."""
    labels, split, scored = results["labels"], results["split"], results[results["split"]]
    deepest = scored["exits"][-1]["exit"]
    print(f"{', '.join(args.checkpoints)} on {args.data or 'its own splits'}: {split}\n")
    print("exit          layers  params M  GMAC/s  ms/clip    UAR  95 % interval   accuracy  macro F1")
    for row in train.score_rows(scored):
        name = f"{row['exit']} (teacher)" if row["exit"] == deepest and len(scored["exits"]) > 1 else str(row["exit"])
        low, high = row["uar_ci95"]
        cost = " " * 33
        if "layers" in row:
            cost = f"{row['layers']:6d}  {row['parameters'] / 1e6:8.2f}  "
            cost += f"{row['macs_per_second'] / 1e9:6.2f}  {row['ms_per_clip']:7.1f}"
        worth = f"{row['uar']:.3f}  {low:.3f} to {high:.3f}  {row['accuracy']:8.3f}  {row['macro_f1']:8.3f}"
        print(f"{name:12}  {cost}  {worth}")
    speakers = results["speakers"]
    whom = f"{speakers} speakers" if speakers else "speakers unknown, so the intervals are over clips and too narrow"
    print(dim(f"{results['clips']} clips, {whom}; chance is {results['chance']:.3f}"))
    print(
        dim("GMAC/s: billions of multiply-accumulates per second of audio; ms/clip: one clip alone, first checkpoint")
    )
    if speakers and speakers < 8:
        print(dim("few speakers: the intervals are rough; train folds and give them all, to pool their test clips"))

    print("\nrecall        " + "".join(f"{label[:10]:>11}" for label in labels))
    for row in train.score_rows(scored):
        recalls = (f"{recall:11.3f}" if recall is not None else f"{'-':>11}" for recall in row["recall"].values())
        print(f"{row['exit']!s:14}" + "".join(recalls))
    shown = results["confusion_exit"]
    [confusion] = [row["confusion"] for row in scored["exits"] if row["exit"] == shown]
    print(f"\nconfusions of exit {shown}, a row per true label")
    print(" " * 14 + "".join(f"{label[:10]:>11}" for label in labels))
    for label, counts in zip(labels, confusion):
        print(f"{label[:13]:14}" + "".join(f"{count:11d}" for count in counts))

    if chosen := results.get("chosen"):
        full = scored["exits"][-1]
        shares = ", ".join(f"{100 * share:.0f} % at exit {k}" for k, share in chosen["exit_share"].items())
        print(
            f"\nearly exit at confidence {chosen['threshold']}: the cheapest on dev that costs at most {args.tolerance}"
        )
        print(f"  UAR {chosen['uar']:.3f} against {full['uar']:.3f} at exit {deepest}")
        print(f"  {chosen['mean_layers']:.1f} layers on average; {shares}")
        print(f"  {chosen['macs_per_second'] / 1e9:.2f} GMAC/s against {full['macs_per_second'] / 1e9:.2f}, "
              f"{chosen['ms_per_clip']:.1f} ms a clip against {full['ms_per_clip']:.1f}")  # fmt: skip
        if chosen["kept"]:
            print(dim('  kept in config.json: --audio and classify(..., threshold="auto") use it'))
    compared = None
    for row in results.get("against", []):
        if row["against"] != compared:
            compared = row["against"]
            print(f"\ndifference in UAR to {', '.join(compared)}, paired, with 95 % interval")
        low, high = row["ci95"]
        print(f"  {row['exit']!s:8} {row['difference']:+.3f}  {low:+.3f} to {high:+.3f}")


# -- plots ------------------------------------------------------------------------------------------------------------


def plot(results: dict, folder: str) -> list[str]:
    """Writes three PNGs: UAR against cost, confusions, recall per class and exit."""
    from matplotlib import pyplot as plt

    labels, exits = results["labels"], results[results["split"]]["exits"]
    Path(folder).mkdir(parents=True, exist_ok=True)
    written = []

    def save(figure, name):
        written.append(os.path.join(folder, name))
        with sdser.replacing(written[-1]) as file:
            figure.savefig(file, format="png", dpi=120)

    figure, axes = plt.subplots(figsize=(5.5, 4), layout="constrained")
    cost, uar = [row["macs_per_second"] / 1e9 for row in exits], [row["uar"] for row in exits]
    errors = np.abs(np.array([row["uar_ci95"] for row in exits]).T - uar)
    axes.errorbar(cost, uar, errors, fmt="o", color="black", capsize=3, label="one exit (95 % interval)")
    for row, x, y in zip(exits, cost, uar):
        axes.annotate(f"exit {row['exit']}", (x, y), (-5, 6), textcoords="offset points", ha="right")
    if "curve" in results:
        points = [(row["macs_per_second"] / 1e9, row["uar"]) for row in results["curve"]]
        axes.plot(*zip(*points), "-", color="gray", zorder=0, label="early exit, all thresholds")
        chosen = results["chosen"]
        axes.plot(chosen["macs_per_second"] / 1e9, chosen["uar"], "*", color="black", markerfacecolor="white",
                  markersize=14, label="early exit, threshold chosen on dev")  # fmt: skip
    if others := [row for row in results.get("against", []) if row["exit"] != "fusion"]:
        at, height = np.array([(row["against_macs_per_second"] / 1e9, row["against_uar"]) for row in others]).T
        errors = np.abs(np.array([row["against_uar_ci95"] for row in others]).T - height)
        axes.errorbar(at + 0.015 * max(cost), height, errors, fmt="s", color="gray", markerfacecolor="white", capsize=3,
                      label="--against, moved right")  # fmt: skip
    axes.axhline(results["chance"], color="gray", linestyle=":", label="chance")
    axes.set(xlabel="billion multiply-accumulates per second of audio", ylabel="UAR", ylim=(0, 1))
    axes.set_xlim(0, 1.1 * max(cost))
    axes.legend(loc="lower right", fontsize="small")
    save(figure, "uar_against_cost.png")

    [confusion] = [np.array(row["confusion"]) for row in exits if row["exit"] == results["confusion_exit"]]
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    size = 2.5 + 0.6 * len(labels)
    figure, axes = plt.subplots(figsize=(size + 0.5, size), layout="constrained")
    axes.imshow(share, cmap="Greys", vmin=0, vmax=1)
    for (i, j), count in np.ndenumerate(confusion):
        axes.text(j, i, count, ha="center", va="center", color="white" if share[i, j] > 0.5 else "black")
    axes.set_xticks(range(len(labels)), labels, rotation=45, ha="right")
    axes.set_yticks(range(len(labels)), labels)
    axes.set(xlabel="predicted", ylabel="true", title=f"clips, exit {results['confusion_exit']}")
    save(figure, "confusion.png")

    figure, axes = plt.subplots(figsize=(2 + 0.9 * len(labels), 3.5), layout="constrained")
    width = 0.8 / len(exits)
    for i, row in enumerate(exits):
        heights = [recall or 0 for recall in row["recall"].values()]
        shade, hatch = str(0.85 - 0.65 * i / max(1, len(exits) - 1)), ["", "//", "..", "xx"][i % 4]
        axes.bar(np.arange(len(labels)) + (i - (len(exits) - 1) / 2) * width, heights, width, color=shade, hatch=hatch,
                 edgecolor="black", linewidth=0.5, label=f"exit {row['exit']}")  # fmt: skip
    axes.set_xticks(range(len(labels)), labels, rotation=30, ha="right")
    axes.set(ylabel="recall", ylim=(0, 1))
    figure.legend(loc="outside right upper", fontsize="small")
    save(figure, "recall.png")
    plt.close("all")
    return written


def check_outputs(json_file: str | None, plot: str | None, folder: bool) -> None:
    """Before the work, not after it: whether what was asked for can be written."""
    if json_file not in (None, "-"):
        train.check_writable(json_file)
    if plot is not None:
        try:
            import matplotlib.backend_bases
        except ImportError:
            raise ValueError("--plot needs matplotlib: pip install matplotlib") from None
        matplotlib.use("Agg")
        train.check_writable(plot, folder)
        kinds = matplotlib.backend_bases.FigureCanvasBase.get_supported_filetypes()
        if not folder and (kind := Path(plot).suffix[1:].lower()) not in ("", *kinds):
            raise ValueError(f"--plot {plot}: .{kind} is no kind of picture; give one of .{', .'.join(kinds)}")


def tell(results: dict, args, report) -> None:
    """The report, and the JSON where one is asked for; for --json - the JSON alone, on standard output."""
    text = json.dumps(results, indent=2)
    if args.json == "-":
        return print(text)
    report(results, args)
    if args.json:
        train.write_text(args.json, text)


def main(argv=None) -> None:
    args = parse_args(argv)
    with train.script():
        args.device = train.usable_device(args.device)
        check_outputs(args.json, args.plot, folder=True)
        if args.audio:
            sys.exit(0 if train.RANK else classify_files(args))
        results = evaluate(args)
        if results is None:
            return  # the first process reports
        tell(results, args, report)
        if args.plot:
            print("\nplots:", ", ".join(plot(results, args.plot)), file=sys.stderr if args.json == "-" else sys.stdout)


if __name__ == "__main__":
    main()
