"""Fine-tunes a multi-exit speech emotion model with self-distillation.

    python train.py                                              # real speech, two minutes on a CPU
    python train.py --data path/to/RAVDESS                       # the same small network, another corpus
    python train.py --data path/to/RAVDESS --backbone facebook/wav2vec2-base
    torchrun --nproc_per_node=2 train.py                         # data-parallel, each process on its share of a batch

First the flags, the run and its training loop; then the data: where a clip comes from, its split, its batch.
"""

import argparse
import csv
import io
import json
import math
import os
import random
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import evaluate
import sdser

DEV_METRIC = f"dev_{evaluate.METRIC}"  # of an epoch, averaged over the exits: the best epoch is kept

HUBERT_SMALL = str(evaluate.DATA / "hubert-small")
WAV2VEC2 = "facebook/wav2vec2-base"

# The recipes, side by side; a flag given on the command line wins. toy: fine-tunes the network in data/, in two minutes
# on a CPU. scratch: random weights. paper: the paper's recipe. fast: the same method for pre-trained backbones, several
# times as fast; the one we recommend.
PRESETS = {
    #                   toy           scratch       paper         fast
    "backbone":        (HUBERT_SMALL, "tiny",       WAV2VEC2,     WAV2VEC2),
    "exits":           ([2, 4, 6],    None,         None,         None),       # None: see default_exits in sdser.py
    "head":            ("attention",  "attention",  "gru",        "attention"),
    "distill_warmup":  (0.5,          0.5,          0.0,          0.5),
    "window":          ("natural",    "natural",    "tile",       "natural"),
    "seconds":         (2.0,          3.0,          5.984,        6.0),
    "epochs":          (12,           10,           20,           20),
    "batch_size":      (8,            16,           16,           16),
    "lr":              (5e-4,         2e-3,         3e-5,         5e-5),
    "head_lr":         (1e-3,         None,         None,         1e-3),       # None: as lr
    "weight_decay":    (0.01,         0.01,         0.0,          0.01),       # AdamW; without decay it is Adam
    "warmup":          (0.1,          0.1,          None,         0.1),        # of steps, then cosine; None: constant
    "max_norm":        (1.0,          1.0,          None,         1.0),        # of the gradient
    "freeze_cnn":      (True,         False,        False,        True),
    "dtype":           ("float32",    "float32",    "float32",    None),       # None: bfloat16 if the device has it
}  # fmt: skip
PRESET_NAMES = ("toy", "scratch", "paper", "fast")
ON_RESUME = ("--resume", "--out", "--device", "--workers")  # the flags that --resume takes; the others are the run's


def parse_args(argv=None) -> argparse.Namespace:
    """Parses the flags. Flags win over the preset, and the preset over defaults; on resume, see ON_RESUME."""
    argv = sys.argv[1:] if argv is None else argv
    epilog = "Defaults that depend on the preset: see PRESETS in train.py."
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], epilog=epilog, allow_abbrev=False)
    add, on_or_off = parser.add_argument, argparse.BooleanOptionalAction
    real, real_or_0, share = (
        evaluate.positive(float),
        evaluate.positive(float, zero=True),
        evaluate.positive(float, most=1),
    )
    whole, whole_or_0 = evaluate.positive(int), evaluate.positive(int, zero=True)
    add("--out", default="out", metavar="DIR", help="a new or empty folder (default: out)")
    add("--resume", action="store_true", help="continue the run in --out, with its own flags")
    add("--device", metavar="D", help="default: cuda if available, else cpu")
    add("--workers", type=whole_or_0, metavar="N", help="processes that load audio (default: 4 on cuda, else 0)")
    add(
        "--data",
        default=str(evaluate.DATA / "emodb"),
        metavar="SOURCE",
        help="corpus folder or manifest (default: data/emodb)",
    )
    add("--preset", choices=PRESET_NAMES, help="default: toy; for other backbones scratch if built-in, else fast")
    add("--backbone", help=f"Hub name, folder saved by transformers, or one of {', '.join(sdser.SIZES)}")
    add("--exits", type=int, nargs="+", metavar="K", help="layers that get an exit; the last is the teacher")
    heads = f"one for the shallow exits, or one for each exit: {', '.join(sdser.HEADS)}"
    add("--head", choices=sdser.HEADS, nargs="+", metavar="H", help=heads)
    add("--labels", nargs="+", metavar="L", help="keep only the clips with these labels")
    add("--final", action="store_true", help="train on train and dev, and keep the last epoch")
    add("--balanced", action="store_true", help="weight cross-entropy by inverse class frequency, at all exits")
    add("--kl-weight", type=real_or_0, default=1.0, metavar="A", help="alpha; 0 drops the term (default 1)")
    add("--hint-weight", type=real_or_0, default=1.0, metavar="B", help="beta; 0 drops the term (default 1)")
    add("--temperature", type=real, default=1.0, metavar="T", help="of the KL term (default 1)")
    ramp = "share of the steps, 0 to 1, over which alpha and beta ramp up"
    add("--distill-warmup", type=evaluate.positive(float, zero=True, most=1), metavar="F", help=ramp)
    add("--detach-teacher", action=on_or_off, default=True, help="no KL and hint gradient to the teacher's outputs")
    add("--label-fraction", type=share, default=1.0, metavar="F", help="share of each label's training clips, up to 1")
    add("--fold", type=fold, default="1/5", metavar="I/N", help="deal speakers into N groups; the I-th is test")
    add("--window", choices=("natural", "tile"), help="clips at original length, or repeated or cut to --seconds")
    add("--seconds", type=real, metavar="S", help="natural: crop longer training clips at random; tile: length")
    add("--epochs", type=whole, metavar="N", help="passes over the training clips")
    add("--batch-size", type=whole, metavar="N", help="clips, over all processes")
    add("--accumulate", type=whole, default=1, metavar="N", help="batches per step (default 1)")
    add("--lr", type=real_or_0, metavar="X", help="learning rate of the backbone; 0 trains only the exits")
    add("--head-lr", type=real, metavar="X", help="learning rate of the exits")
    add("--freeze-cnn", action=on_or_off, help="do not train the convolutional encoder")
    add("--dtype", choices=("float32", "bfloat16"), help="fast: bfloat16 (autocast) if the device computes in it")
    add("--seed", type=whole_or_0, default=0, metavar="N", help="default 0")
    add("--skip-bad", action="store_true", help="decode every file first, and leave out those that cannot be read")

    args = parser.parse_args(argv)
    others = {word.partition("=")[0] for word in argv if word.startswith("--")} - set(ON_RESUME)
    if args.resume and others:
        parser.error(f"--resume goes on with the run's own flags; leave out {', '.join(sorted(others))}")
    if args.preset is None and args.backbone in sdser.SIZES:
        args.preset = "scratch"
    elif args.preset is None:
        args.preset = "toy" if os.path.abspath(args.backbone or HUBERT_SMALL) == HUBERT_SMALL else "fast"
    for name, values in PRESETS.items():
        if getattr(args, name, None) is None:
            setattr(args, name, values[PRESET_NAMES.index(args.preset)])
    if args.head_lr is None:
        args.head_lr = args.lr
    if args.head_lr == 0:
        parser.error("--lr 0 trains only the exits: give them a --head-lr")
    return args


def fold(text: str) -> list[int]:
    index, count = map(int, text.split("/"))
    if not 1 <= index <= count or count < 3:
        raise argparse.ArgumentTypeError(f"{text} is not I/N with I from 1 to N and N of at least 3")
    return [index, count]


# -- the run ----------------------------------------------------------------------------------------------------------
def run(args: argparse.Namespace) -> None:
    """Trains, keeps the best epoch by dev UAR, scores it once on test, and reports."""
    start, out, state = time.time(), Path(args.out), None
    if args.resume:
        with sdser.file_errors(out / "train_state.pt", "no run to resume", "train in a new folder, without --resume"):
            state = torch.load(out / "train_state.pt", map_location="cpu", weights_only=True)
            again = {"resume": True, "out": args.out, "device": args.device, "workers": args.workers}
            args = argparse.Namespace(**{**vars(args), **state["args"], **again})
        for left_over in out.glob(".*.tmp"):  # by a process that was killed while it wrote
            left_over.unlink(missing_ok=True)
    elif out.is_dir() and any(out.iterdir()):
        raise ValueError(f"--out {out}: holds files already; name a new or empty folder, or --resume the run in it")
    args.device = evaluate.usable_device(args.device)
    if args.workers is None:  # a GPU takes less time for a step than one process needs to read its clips
        args.workers = 4 if args.device.startswith("cuda") else 0
    args.dtype = args.dtype or ("bfloat16" if computes_in_bfloat16(args.device) else "float32")
    evaluate.check_writable(out, folder=True)

    labels, clips = load_data(args)
    training = [clip for clip in clips if clip.split == "train"]
    torch.manual_seed(args.seed)
    tile_seconds = args.seconds if args.window == "tile" else None
    if state:  # a resumed run no longer needs the backbone that it started from
        model = sdser.MultiExitSER.from_pretrained(out).to(args.device)
        model.threshold = None  # of other weights
    else:
        model = sdser.MultiExitSER(labels, args.backbone, args.exits, args.head, tile_seconds).to(args.device)
    steps_per_epoch = math.ceil(math.ceil(len(training) / args.batch_size) / args.accumulate)
    optimizer, scheduler = make_optimizer(model, args, args.epochs * steps_per_epoch)
    log = []
    if state:
        with sdser.file_errors(out / "train_state.pt", "does not fit its model", "train again"):
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            scheduler.load_state_dict(state["scheduler"])
            log = state["log"]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    name = args.backbone.removeprefix(evaluate.HERE)
    print(f"{name}, preset {args.preset}: exits {model.exits}, {trained:.1f} M parameters to train, "
          f"{args.dtype} on {args.device}")  # fmt: skip
    parallel = DistributedDataParallel(model) if evaluate.WORLD > 1 else model  # averages gradients over processes

    # Each epoch seeds its own dropout, masks, crops and order, so that a resumed run repeats an unbroken one.
    for epoch in range(len(log) + 1, args.epochs + 1):
        epoch_start, title = time.time(), f"epoch {epoch:{len(str(args.epochs))}}/{args.epochs}"
        rng = np.random.default_rng([args.seed, epoch])
        torch.manual_seed(
            int(rng.integers(2**63)) ^ evaluate.RANK
        )  # processes differ in dropout and masks, not in order
        batches = make_batches(training, args, rng)
        dataset = evaluate.ClipDataset(training, labels, tile_seconds, args.seconds, f"{args.seed} {epoch}")
        losses = train_epoch(parallel, dataset, batches, optimizer, scheduler, args, title)
        line = {"epoch": epoch, **losses, "lr": scheduler.get_last_lr()[0]}
        message = f"{title}  loss {losses['loss']:.3f}"
        best = True  # --final has no dev clips to choose by: the last epoch is kept
        if not args.final:
            with autocast(args):  # as in training, for speed
                line["dev"] = score(model, clips, "dev", args)
            values = {row["exit"]: row[evaluate.METRIC] for row in line["dev"]["exits"]}
            line[DEV_METRIC] = sum(values.values()) / len(values)
            best = all(line[DEV_METRIC] > earlier[DEV_METRIC] for earlier in log)
            message += f"  dev {evaluate.METRIC.upper()} at exit "
            message += "  ".join(f"{exit}: {value:.3f}" for exit, value in values.items())
            message += "  best" if best else ""
        line["seconds"] = time.time() - epoch_start
        log.append(line)
        if evaluate.RANK == 0:
            save_epoch(out, args, clips, log, best, model, optimizer, scheduler)
        print(message)  # once it is saved, so that Ctrl-C loses nothing that has been seen

    # The kept epoch is scored in float32, on dev once more and on test for the first time.
    if evaluate.WORLD > 1:
        dist.barrier()  # until rank 0 has saved it
    model = sdser.MultiExitSER.from_pretrained(out).to(args.device)
    results = {"labels": labels, "args": vars(args), "seconds": round(time.time() - start, 1)}
    for split in ("test",) if args.final else ("dev", "test"):
        results[split] = score(model, clips, split, args)
    if evaluate.RANK == 0:
        sdser.replace_file(out / "results.json", json.dumps(results, indent=2))
        report(results, log, out)


def train_epoch(model, dataset, batches, optimizer, scheduler, args, title: str) -> dict[str, float]:
    """Trains one pass over the clips, in batches of indices; returns the mean loss and its parts."""
    model.train()
    my_batches = [batch[evaluate.RANK :: evaluate.WORLD] for batch in batches]
    # A process left without clips runs one anyway, with weight 0, because every process must join every step.
    to_run = [mine or batch[:1] for mine, batch in zip(my_batches, batches)]
    class_weights = inverse_frequencies(dataset).to(args.device) if args.balanced else None
    sums, total_steps = Counter(), args.epochs * math.ceil(len(batches) / args.accumulate)
    bar = evaluate.progress(evaluate.load(dataset, to_run, args.workers), title, len(batches))
    for i, (waveforms, lengths, targets) in enumerate(bar):
        first = i - i % args.accumulate  # index of the step's first batch
        clips_in_step = sum(len(batch) for batch in batches[first : first + args.accumulate])
        # early on there is nothing to be learned from the teacher; last_epoch counts the steps of the whole run
        ramp = min(1.0, scheduler.last_epoch / (args.distill_warmup * total_steps)) if args.distill_warmup else 1.0

        with autocast(args):
            outputs = model(waveforms.to(args.device), lengths.to(args.device))
        loss, parts = sdser.self_distillation_loss(
            outputs, targets.to(args.device), ramp * args.kl_weight, ramp * args.hint_weight, args.temperature,
            args.detach_teacher, class_weights,
        )  # fmt: skip
        # A loss is a mean over this process's clips of a batch. It counts by its share of the step's clips, so that the
        # step has the gradient of one large batch. For example, with --accumulate 2, a step may have batches of 5 and 3
        # clips; of 2 processes, one runs 3 and 2 of them, the other 2 and 1: the shares are 3/8, 2/8, 2/8 and 1/8.
        share = len(my_batches[i]) / clips_in_step
        (share * evaluate.WORLD * loss).backward()  # times WORLD, because DistributedDataParallel divides by it
        for name, value in {"loss": loss.detach(), **parts}.items():
            sums[name] += value * len(my_batches[i])

        if (i + 1) % args.accumulate == 0 or i + 1 == len(batches):
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_norm or math.inf)
            if not (loss + norm).isfinite():
                names = ", ".join(dataset.clips[k].path for k in to_run[i])
                raise ValueError(f"loss or gradient not finite; try a smaller --lr or --dtype float32 (after {names})")
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            bar.set_postfix(loss=f"{loss.item():.3f}")
    totals = torch.stack(list(sums.values())).cpu()
    if evaluate.WORLD > 1:
        dist.all_reduce(totals)  # over the processes
    return dict(zip(sums, (totals / len(dataset.clips)).tolist()))


def autocast(args):
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.dtype == "bfloat16")


def make_optimizer(model: sdser.MultiExitSER, args, steps: int):
    """Freezes what is not trained; returns AdamW for the rest, and its learning-rate schedule over `steps`."""
    if args.freeze_cnn:
        model.freeze_convolutions()
    if args.lr == 0:
        model.backbone.requires_grad_(False)
    groups = [
        {"params": [p for p in model.backbone.parameters() if p.requires_grad], "lr": args.lr},
        {"params": list(model.heads.parameters()), "lr": args.head_lr},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=args.weight_decay)

    def factor(step):
        if args.warmup is None:
            return 1.0
        warmup = max(1, round(args.warmup * steps))
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def inverse_frequencies(dataset: evaluate.ClipDataset) -> Tensor:
    """Returns one weight per class, (C,); their mean over the clips is 1."""
    counts = Counter(clip.label for clip in dataset.clips)
    return torch.tensor([len(dataset.clips) / len(counts) / counts[label] for label in dataset.labels])


def score(model: sdser.MultiExitSER, clips: list[evaluate.Clip], split: str, args) -> dict:
    """Returns {"exits": [{"exit": 2, "uar": 0.8, ...}, ...], "fusion": {...}}; fusion only of two students or more."""
    clips = [clip for clip in clips if clip.split == split]
    targets = torch.tensor([evaluate.target_of(clip, model.labels) for clip in clips])
    logits_of = evaluate.answers(model.exits, evaluate.predict(model, clips, args.batch_size, args.workers))
    rows = {exit: evaluate.scores(targets, logits) for exit, logits in logits_of.items()}
    fusion = {"fusion": rows.pop("fusion")} if "fusion" in rows else {}
    return {"exits": [{"exit": exit, **row} for exit, row in rows.items()], **fusion}


def computes_in_bfloat16(device: str) -> bool:
    """Tells whether a device has bfloat16 in hardware; where it is emulated, it is far slower than float32."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    has_bfloat16 = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)  # a Mac's torch has no oneDNN
    return device == "cpu" and has_bfloat16()


# -- what a run writes ------------------------------------------------------------------------------------------------
def save_epoch(
    out: Path, args, clips: list[evaluate.Clip], log: list[dict], best: bool, model, optimizer, scheduler
) -> None:
    """Writes an epoch's files, train_state.pt last: if the run dies before that is written, the epoch is repeated."""
    if len(log) == 1:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["path", "label", "speaker", "split", *clips[0].more])
        for clip in clips:
            writer.writerow([os.path.abspath(clip.path), clip.label, clip.speaker, clip.split, *clip.more.values()])
        sdser.replace_file(out / "split.csv", text.getvalue())
    if best:
        model.save_pretrained(out)
    sdser.replace_file(out / "log.jsonl", "".join(json.dumps(line) + "\n" for line in log))
    state = {"args": vars(args), "log": log, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
             "scheduler": scheduler.state_dict()}  # fmt: skip
    memory = io.BytesIO()  # first, since torch's zip writer hides why a file cannot be written
    torch.save(state, memory)
    sdser.replace_file(out / "train_state.pt", memory.getbuffer())


def report(results: dict, log: list[dict], out: Path) -> None:
    """Prints which epoch was kept, and the scores of each split and exit."""
    kept = f"last epoch, {len(log)}, kept"
    if "dev" in results:
        best = max(log, key=lambda line: line[DEV_METRIC])["epoch"]
        kept = f"best epoch {best}, by dev {evaluate.METRIC.upper()} averaged over exits"
    print(f"\n{kept} (chance {1 / len(results['labels']):.3f})\n")
    names = list(results["test"]["exits"][0])[1:]  # of the scores
    print("split    exit" + "".join(f"  {name:>8}" for name in names))
    for split in [split for split in ("dev", "test") if split in results]:
        rows = list(results[split]["exits"])
        if "fusion" in results[split]:
            rows.append({"exit": "fusion", **results[split]["fusion"]})
        for row in rows:
            print(f"{split:6} {row['exit']!s:>6}" + "".join(f"  {row[name]:8.3f}" for name in names))
    print(f"\nin {out}: config.json, model.safetensors, README.md, results.json, log.jsonl, split.csv, train_state.pt")
    print(f"next: python evaluate.py {evaluate.quote(out)}")


# -- clips: from a folder of a known corpus, or from a manifest -------------------------------------------------------


# -- splits: no speaker is in two of them -----------------------------------------------------------------------------


# -- batches ----------------------------------------------------------------------------------------------------------
def load_data(args) -> tuple[list[str], list[evaluate.Clip]]:
    """Returns the labels, and the clips with their splits, of files that can be read; prints the counts."""
    splits = ("train", "test") if args.final else evaluate.SPLITS
    if args.resume:
        listed = os.path.join(args.out, "split.csv")
        clips = evaluate.look_at(evaluate.load_corpus(listed), listed)
    else:
        clips = evaluate.load_corpus(args.data)
        if args.labels:
            known = {clip.label for clip in clips}
            if len(set(args.labels)) < 2 or not set(args.labels) <= known:
                raise ValueError(f"--labels {' '.join(args.labels)}: give at least two of {', '.join(sorted(known))}")
            clips = [clip for clip in clips if clip.label in args.labels]
        clips = evaluate.split_clips(clips, args.fold, args.final)
        clips = evaluate.look_at(clips, skip_bad=args.skip_bad)
        evaluate.check_splits(clips, splits)  # bad clips may be left out
        clips = take_fraction(clips, args.label_fraction, args.seed)
    counts = Counter(clip.label for clip in clips)
    labels = sorted(counts)
    for kind, names in (("labels", labels), ("speakers", sorted({clip.speaker or "" for clip in clips}))):
        spellings = Counter(name.casefold() for name in names)
        same = [name for name in names if spellings[name.casefold()] > 1]
        if same:
            warnings.warn(f"{args.data}: some {kind} differ only in case: {', '.join(same)}", stacklevel=2)
    print(f"{args.data.removeprefix(evaluate.HERE)}: {', '.join(f'{label} {counts[label]}' for label in labels)}")
    for split in splits:
        part = [clip for clip in clips if clip.split == split]
        speakers = {clip.speaker for clip in part} - {None}
        print(f"{split}: {len(part)} clips of {len(speakers) or 'unknown'} speakers")
    return labels, clips


def take_fraction(clips: list[evaluate.Clip], share: float, seed: int) -> list[evaluate.Clip]:
    """Keeps all dev and test clips, and a share of each label's training clips; a larger share contains a smaller."""
    kept = {clip.path for clip in clips if clip.split != "train"}
    for label in {clip.label for clip in clips}:
        training = [clip.path for clip in clips if clip.split == "train" and clip.label == label]
        random.Random(seed).shuffle(training)
        kept.update(training[: max(1, round(share * len(training)))])
    return [clip for clip in clips if clip.path in kept]


def make_batches(clips: list[evaluate.Clip], args, rng: np.random.Generator) -> list[list[int]]:
    """Returns clip indices in batches of similar length: sorted within pools of 8 batches, random across."""
    size, order = args.batch_size, rng.permutation(len(clips))
    seconds = np.array([min(clip.seconds, args.seconds) for clip in clips])  # of the crop
    if args.window == "tile" or np.ptp(seconds) == 0:  # all are of one length: plain shuffling
        return [order[i : i + size].tolist() for i in range(0, len(order), size)]
    batches = []
    for i in range(0, len(order), 8 * size):
        pool = order[i : i + 8 * size]
        pool = pool[np.argsort(seconds[pool], kind="stable")]
        batches += [pool[k : k + size].tolist() for k in range(0, len(pool), size)]
    rng.shuffle(batches)
    return batches


# -- how a script ends ------------------------------------------------------------------------------------------------


def main(argv=None) -> None:
    args = parse_args(argv)
    resume = f"python train.py --resume --out {evaluate.quote(args.out)}"
    with evaluate.script(f"interrupted: {resume} continues after the last epoch printed, if any"):
        run(args)


if __name__ == "__main__":
    main()
