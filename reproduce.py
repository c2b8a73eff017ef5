"""Make the tables and figures of a document from real runs: train what is missing, measure once, keep the numbers.

    python reproduce.py table4.1                  # 240 networks: about two hours on 2 CPU cores
    python reproduce.py table4.1 --quick          # 20 epochs, 1 seed, 2,500 samples: a preview in minutes
    python reproduce.py all                       # but table4.2
    python reproduce.py steps --recorded          # from the numbers in results/*/runs.jsonl, without a network
    python reproduce.py table4.2 --budget 60      # images, CIFAR-10: so many minutes of training on a GPU, then samples

Runs and their samples are kept under --runs and never made twice; an interrupted call goes on where it was. Results go
to <out>/<document>/ with their index, index.md, and the numbers of every run that they used, runs.jsonl. What they
show is written by hand, for the committed runs, in results/<document>/README.md.
"""
import argparse
import json
import time
from pathlib import Path

import torch

import reproduce_beyond
import reproduce_foundations
import reproduce_poster
import reproduce_slides
import reproduce_thesis
import reproduce_vdm
import run
import settings
import train
from recipes import FAST_EPOCHS
from study import Study

DOCUMENTS = {"thesis": reproduce_thesis, "beyond": reproduce_beyond, "foundations": reproduce_foundations,
             "slides": reproduce_slides, "vdm": reproduce_vdm, "poster": reproduce_poster}
RESULTS = {name: (document, *row) for document, module in DOCUMENTS.items() for name, row in module.RESULTS.items()}
DEFAULTS = {"seeds": 3, "epochs": 100, "num_samples": 10_000, "recipe": "thesis"}
OF_IMAGES = {"data": "cifar10", "budget": None, "seeds": 3, "num_samples": 10_000}         # None: always said
SET = "--target", "--loss", "--minutes", "--seed", "--seeds", "--resume", "--no-resume", "--overwrite"
SET_BY = {"table4.2": SET, "tableF5.1-images": (*SET, "--schedule", "--timesteps", "--variance", "--train-steps"),
          "schedules-images": (*SET, "--target", "--schedule", "--t-density", "--adaptive", "--train-steps"),
          **dict.fromkeys(("spaces-images", "spaces-images-samples", "few-images", "few-images-samples"), SET),
          **dict.fromkeys(reproduce_poster.reproduce_poster_images.RESULTS,
                          (*SET, "--labels", "--timesteps", "--variance", "--train-steps")),
          **dict.fromkeys(("latents", "latents-samples"),
                          (*SET, "--image-size", "--flip", "--no-flip", "--skip-corrupt", "--labels"))}


def is_table(name):
    return any(name in module.TABLES for module in DOCUMENTS.values())


def read_records(folder):
    """The lines of a folder's runs.jsonl."""
    path = Path(folder) / "runs.jsonl"
    try:
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    except ValueError:
        raise SystemExit(f"{path} is damaged - delete it, it is made again") from None


def merged(records, used):
    """Lines of runs.jsonl with those of runs that were used now, which keep what other results had of them."""
    lines = {record["run"]: record for record in records}
    for name, entry in used.items():
        before = lines.get(name, {})
        if before.get("config") != entry.get("config"):        # another run of that name
            before = {}
        lines[name] = before | {
            part: before[part] | value if part != "config" and isinstance(value, dict) and part in before else value
            for part, value in entry.items()}
    return [lines[name] for name in sorted(lines)]


def write_index(out):
    """index.md of a results folder from its index.json: file, what it is, command, time, machine."""
    index = json.loads((out / "index.json").read_text())
    text = ["Seconds are those of the call that made the file, when networks and most of what it measures of them were "
            "there already.", ""]
    for name, (_, _, title) in RESULTS.items():
        if name in index:
            file = f"{name}.{'md' if is_table(name) else 'png'}"
            text += ["- [{0}]({0}): {1}. `{command}`, {seconds:.0f} s on {where}.".format(file, title, **index[name])]
    run.write(out / "index.md", ("\n".join(text) + "\n").encode())


def make(name, args):
    """One table or figure, its line in the index and the lines of its runs."""
    document, function, _ = RESULTS[name]
    out, start = Path(args.out) / document, time.perf_counter()
    records = read_records(out)
    study = Study(args, records)
    where = run.device_name(study.device)
    command = f"python reproduce.py {name}" + "".join(
        f" --{key.replace('_', '-')} {getattr(args, key)}"
        for key, value in (OF_IMAGES if name in SET_BY else DEFAULTS).items() if getattr(args, key) != value)
    command = " ".join([command, *["--recorded"] * args.recorded, *args.more])
    if is_table(name):
        lines = function(study) + ["", f"`{command}`, torch {torch.__version__}, {where}."]
        print("\n" + "\n".join(lines) + "\n")
        run.write(out / f"{name}.md", ("\n".join(lines) + "\n").encode())
    else:
        function(study, out / f"{name}.png")
    if study.used:
        run.write(out / "runs.jsonl",
                  "".join(json.dumps(record) + "\n" for record in merged(records, study.used)).encode())
    index = json.loads((out / "index.json").read_text()) if (out / "index.json").exists() else {}
    index[name] = dict(command=command, seconds=time.perf_counter() - start, where=where)
    run.write(out / "index.json", json.dumps(index, indent=1).encode())
    write_index(out)
    print(f"wrote {out / name}.{'md' if is_table(name) else 'png'}")


def parse(argv):
    """The arguments; args.more are those that a table of images hands to train.py. Exit code 2 if they are wrong."""
    names = "\n".join(f"  {name:10s} {title}" for name, (_, _, title) in RESULTS.items())
    images = ", ".join(SET_BY)
    parser = argparse.ArgumentParser(description=f"{__doc__}\n{names}\n  all        all of these but {images}",
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage="python reproduce.py NAME [options], see --help", allow_abbrev=False)
    parser.add_argument("name", choices=[*RESULTS, "all"], metavar="NAME", help="one of the above")
    parser.add_argument("--seeds", type=settings.number(int, 1), default=3, help="runs with seeds 0, 1, ... (3)")
    parser.add_argument("--epochs", type=settings.number(int, 1), help=f"of each run (100, fast: {FAST_EPOCHS})")
    parser.add_argument("--recipe", choices=["thesis", "fast"], default="thesis",
                        help="fast: Muon, larger batches and products in bf16, fewer epochs (thesis)")
    parser.add_argument("--num-samples", type=settings.number(int, 2000), default=10_000, help="of each run (10000)")
    parser.add_argument("--quick", action="store_true", help="--seeds 1 --epochs 20 --num-samples 2500")
    parser.add_argument("--recorded", action="store_true",
                        help="tables and curves from the numbers in runs.jsonl alone: train and measure nothing")
    parser.add_argument("--runs", default="runs", help="folder of the runs (runs)")
    parser.add_argument("--out", help="folder of the results (results; with other seeds, epochs or samples "
                                      "<runs>/results)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="(auto: cuda or cpu)")
    group = parser.add_argument_group(f"{images} (further options are handed to train.py, say --channels 32)")
    group.add_argument("--data", default="cifar10", type=train.data_name, help="images (cifar10)")
    group.add_argument("--budget", type=settings.number(float, 0.01), default=60,
                       help="minutes of training, all runs together (60)")
    group.add_argument("--data-dir", default="data", help="where the named datasets are, or are downloaded to (data)")
    group.add_argument("--inception-weights", metavar="PATH", help="local file of pytorch-fid's weights")
    args, args.more = parser.parse_known_args(argv)
    if args.more and args.name not in SET_BY:
        parser.error(f"unrecognized arguments: {' '.join(args.more)}")
    for word in args.more:                 # train.py takes abbreviations
        if word.startswith("--") and any(option.startswith(word.split("=")[0]) for option in SET_BY[args.name]):
            parser.error(f"{word} is set by {args.name} itself - leave it out")
    args.epochs = args.epochs or (FAST_EPOCHS if args.recipe == "fast" else 100)
    if args.quick:
        args.seeds, args.epochs, args.num_samples = 1, 20, 2500
    full = (args.seeds, args.epochs, args.num_samples, args.recipe, args.data, args.more) == (
        3, 100, 10_000, "thesis", "cifar10", [])
    args.out = args.out or ("results" if full else f"{args.runs}/results")
    return args


def main(argv=None):
    args = parse(argv)
    for name in [name for name in RESULTS if name not in SET_BY] if args.name == "all" else [args.name]:
        make(name, args)


if __name__ == "__main__":
    run.script(main, "type the same command to go on")
