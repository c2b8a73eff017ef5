"""Draw samples from trained networks and measure them against the data.

    python sample.py                                       # the newest run, 512 steps
    python sample.py --ckpt runs/rings-*-s0 --steps 16     # many at once, as a stack, with the same noise
    python sample.py --sampler dpmpp --steps 16            # nearly as good with few evaluations
    python sample.py --schedule ve                         # another than that of training, see invariance.py
    python sample.py --movie                               # and samples.gif: from noise to data
    python sample.py --label 3 --guidance 1                # of a run with labels, see guidance.py
    python sample.py --ckpt runs/cifar10-v-mse-s0 --steps 500 --num-samples 50000 --fid
    python sample.py --num-samples 10000 --metrics         # distances that need no download, see classifier.py

Points: writes samples.npy, samples.png (data and samples side by side) and metrics.json, and prints the mean,
covariance and sliced Wasserstein distance to 50,000 fresh points (of a file: to its tenth that is not trained on,
standardised) beside their floor: what two samples of the data itself, of the same sizes, give. Images: writes
samples/00000.png ... of the averaged weights (EMA), samples.png (a grid of the first) and metrics.json. A call that was
killed goes on with the first image that is missing; a larger --num-samples adds to those that are there. Several runs
end with one table, which --csv writes too.

What is drawn and measured is in `kind_points.py` and `kind_images.py`, the samplers in `samplers.py`.
"""
import argparse

import discrete
import draw_images
import invariance
import langevin
import run
import samplers
import settings
import variance
from ddpm import SCHEDULES
from variance import VARIANCES

IMAGES = dict(batch_size=None, clip=True, overwrite=False, fid=False, fid_split="train", inception_weights=None,
              metrics=False, classifier=None, data_dir="data")         # the options of images alone, and their defaults


def parse(argv):
    """The arguments; args.how is what `samplers.sample` takes of them. Exit code 2 if they are wrong."""
    parser = settings.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                             usage="python sample.py [options], see --help")
    parser.add_argument("--ckpt", nargs="+", help="folders of runs, or their ckpt.pt (the newest run in runs/)")
    parser.add_argument("--steps", type=settings.number(int, 1, 10**6), default=512, help="function evaluations (512)")
    parser.add_argument("--sampler", choices=[*samplers.SAMPLERS, "langevin"], default="ancestral",
                        help="langevin is for runs of --loss exact, sliced or denoising (ancestral)")
    parser.add_argument("--grid", choices=[*samplers.GRIDS, "rescaled"],
                        help="what the steps are equal in: t, log-SNR, Karras's, angle; optimal, for unipc in 4 to 16; "
                        "betas of ddpm, rescaled (t, of annealed logsnr)")
    parser.add_argument("--schedule", dest="under", choices=SCHEDULES,
                        help="another than that of training, with the same end log-SNRs (its own)")
    parser.add_argument("--step-size", type=settings.number(float, 1e-12, 1e6),
                        help="of --sampler langevin (0.001), of annealed times sigma^2 (0.1)")
    parser.add_argument("--steps-per-level", type=settings.number(int, 1, 10**6), help="of --sampler annealed (10)")
    parser.add_argument("--metropolis", action="store_true", default=None,
                        help="accept or reject the steps of --sampler langevin, of a run with --energy")
    parser.add_argument("--eta", type=settings.number(float, 0, 1),
                        help="noise of --sampler ddim, 1 is that of ancestral (0), and sde, 0 is euler (1)")
    parser.add_argument("--churn", type=settings.number(float, 0, 10**6),
                        help="noise of --sampler heun in all its steps together, S_churn of Karras et al. (0)")
    parser.add_argument("--variance", choices=[*VARIANCES, "none"],
                        help="of --sampler ancestral (the run's own, small unless it was trained on a chain)")
    parser.add_argument("--t-min", type=settings.number(float, 1e-6, 0.49),
                        help="the steps divide [t_min, 1 - t_min] (that of training, at least 0.001)")
    parser.add_argument("--t-max", type=settings.number(float, 0.5, 1 - 1e-6),
                        help="where noise is N(0, I), for flows of eps and s: 0.8 (1 - t_min)")
    parser.add_argument("--label", type=settings.number(int, 0, 10**6), nargs="+",
                        help="of a run with --labels: samples of each of these, of several in folders label-<label>, "
                        "and of images one grid of them, a row each")
    parser.add_argument("--guidance", type=settings.number(float, 0, 1000),
                        help="w of (1 + w) times the prediction with the label - w that without (0)")
    parser.add_argument("--guidance-interval", type=settings.number(float, 0, 1), nargs=2, metavar=("LOW", "HIGH"),
                        help="guide for t in (LOW, HIGH] alone (0 1)")
    parser.add_argument("--num-samples", type=settings.number(int, 2, 10**7), help="(points: 10000, images: 64)")
    parser.add_argument("--seed", type=settings.number(int, 0, 2**62), default=0, help="of the sampling noise (0)")
    parser.add_argument("--out", type=settings.folder,
                        help="folder for the results (the run's folder), with one in it for each of several runs")
    parser.add_argument("--movie", action=argparse.BooleanOptionalAction, default=False,
                        help="write samples.gif, the samples in motion from noise to data")
    parser.add_argument("--csv", type=settings.file, metavar="PATH",
                        help="write what was measured as a table, a row for each run, of several also the floor's")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="(auto: cuda or cpu)")
    group = parser.add_argument_group("images")
    group.add_argument("--batch-size", type=settings.number(int, 1, 10**6), help="drawn at once (64, on a GPU 250)")
    group.add_argument("--clip", action=argparse.BooleanOptionalAction,
                       help="keep x_hat in [-1, 1] at every step (yes)")
    group.add_argument("--overwrite", action=argparse.BooleanOptionalAction,
                       help="delete images drawn with other settings")
    group.add_argument("--fid", action=argparse.BooleanOptionalAction, help="FID to the data, Eq. (4.6)")
    group.add_argument("--fid-split", choices=["train", "test"], help="of the data, for FID (train)")
    group.add_argument("--inception-weights", metavar="PATH",
                       help="local file of pytorch-fid's weights (downloaded once)")
    group.add_argument("--metrics", action=argparse.BooleanOptionalAction,
                       help="distances in the features of a small classifier, which classifier.py trains")
    group.add_argument("--classifier", metavar="PATH", help="its file (runs/classifier-<data>.pt)")
    group.add_argument("--data-dir", type=settings.folder, help="of --fid and --metrics: the data, statistics (data)")
    args = parser.parse_args(argv)
    if (args.variance or "none") != "none" and args.sampler != "ancestral":
        parser.error(f"--variance is for --sampler ancestral, {args.sampler} has none")
    if args.variance == "none" and args.sampler == "ancestral":
        parser.error("--sampler ancestral has a variance: choose " + ", ".join(VARIANCES))
    if args.grid == "rescaled" and args.sampler in ("sde", "euler", "heun", "annealed"):
        parser.error(f"--grid rescaled is known at its own steps alone, and --sampler {args.sampler} needs its slope")
    if args.grid == "rescaled" and (args.under or args.t_max):
        parser.error("--grid rescaled is a chain of its own - leave out --schedule and --t-max")
    for name, of in dict(**dict.fromkeys(("grid", "t_min", "t_max", "under"), [*samplers.SAMPLERS]),
                         step_size=["langevin", "annealed"], metropolis=["langevin"], steps_per_level=["annealed"],
                         eta=["ddim", "sde"], churn=["heun"]).items():
        if getattr(args, name) is not None and args.sampler not in of:
            name = "schedule" if name == "under" else name.replace("_", "-")
            parser.error(f"--{name} is for --sampler {' or '.join(of)}, {args.sampler} has none")
    if args.movie and args.sampler == "langevin":
        parser.error("--movie shows samples from noise to data over t, and --sampler langevin has no t")
    if args.guidance is not None and args.label is None:
        parser.error("--guidance is towards a label of a run trained with --labels: say which, --label 0")
    if args.guidance_interval and not args.guidance:
        parser.error("--guidance-interval is where guidance acts: say how much, --guidance 1")
    if args.guidance_interval and args.guidance_interval[0] >= args.guidance_interval[1]:
        parser.error("--guidance-interval is from a lower to a higher t: LOW must be below HIGH")
    if args.csv and len(args.label or ()) > 1:
        parser.error("--csv is the table of one label - give each its own call")
    if args.sampler != "langevin":
        args.grid = args.grid or ("logsnr" if args.sampler == "annealed" else "t")
    args.how = {name: getattr(args, name) for name in (
        "sampler", "grid", "under", "t_max", "eta", "churn", "variance", "step_size", "steps_per_level", "metropolis")
        if getattr(args, name) is not None}
    args.in_words = ", ".join(f"{key} {value}" for key, value in args.how.items())
    return args


def of_label(one, label, w, interval=None):
    """A Run whose samples are guided towards a label. ValueError: it was trained without labels, or not with this."""
    if not one.config.get("labels"):
        raise ValueError("trained without labels - leave out --label"
                         + ", or train with --labels" * ("latents" not in one.config))           # latents have none
    if label >= (classes := one.kind.classes(one.config)):
        raise ValueError(f"no label {label}: choose from 0 to {classes - 1}")
    config = one.config | {"label": label, "guidance": w or 0.0} | ({"guidance_interval": interval} if interval else {})
    return run.Run(one.folder, one.checkpoint | {"config": config})


def main(argv=None):
    args = parse(argv)
    chosen = run.chosen(args.ckpt, args.out)
    run.of_images(args, IMAGES, chosen[0][0].config)
    labels = [[] for _ in args.label or ()]                # the same runs, of each label
    for one, folder in chosen:
        try:
            for label, runs in zip(args.label or (), labels):
                runs.append((of_label(one, label, args.guidance, args.guidance_interval),
                             folder / f"label-{label}" if len(labels) > 1 else folder))
            variance.chosen(one.config, args.variance, args.sampler, args.steps, args.grid, args.t_min)
            invariance.check(one.config, args.under, args.t_max)
            if args.grid == "rescaled":
                discrete.rescaled(one.schedule, args.steps)
            if args.metropolis and not one.config["energy"]:
                raise ValueError("--metropolis needs a density, and this run has only a score - train with --energy")
        except ValueError as error:
            raise SystemExit(f"{one.folder}: {error}") from None
    try:
        for runs in labels or [chosen]:
            runs[0][0].kind.sample(runs, args, run.device(args.device))
    except langevin.Diverged as error:
        raise SystemExit(f"{error}") from None
    if len(labels) > 1 and settings.kind(chosen[0][0].config) == "images":
        for _, folder in chosen:
            draw_images.rows(folder, args.label)


if __name__ == "__main__":
    run.script(main, "type the same command to draw again, or, of images, to go on")
