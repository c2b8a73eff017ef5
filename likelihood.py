r"""Likelihood: the variational bound in its three terms, and the exact log-likelihood of the probability flow ODE.

Read `losses.py` and `samplers.py` first. Thesis 3.1.2, Eq. (3.6); VDM 3.6-3.10; Foundations 3.2; Song et al. 2021, D.2.

    -log p(x) <= prior          KL of q(z_1 | x) from p(z_1), what sampling starts with
               + reconstruction E[-log p(x | z_0)]
               + diffusion      sum of T terms E[1/2 (SNR(s) - SNR(t)) |x_hat - x|^2], or its limit, D times `nelbo`

z_0 and z_1 are z at t_min and 1 - t_min. All are sums over dimensions, in nats, a number for each example. Images have
256 grey levels, their likelihood is a probability; that of points is a density. The ODE gives the density of the data
without a bound: `flow.py`; levels have one with noise: `dequantise.py`. The diffusion term has less noise by the known
loss of another denoiser: `control.py`.

The bound's model draws z_0 and then x given z_0; the sampler `ancestral` returns the x_hat of one step above t_min.
They are two models, with one network, as bound and ODE are. The likelihood of the model of the bound is that of its
chain, without a bound: --chains, `importance.py`.

Not here: the exact log-density of the 2D data, `datasets2d.log_prob`, with which everything is compared.

    python likelihood.py                          # the newest run
    python likelihood.py --ckpt runs/rings-* --steps 64            # the bound of 64 discrete steps
    python likelihood.py --ckpt runs/rings-* --steps 64 --variance large     # beta in place of the thesis's sigma_Q^2
    python likelihood.py --ckpt runs/fashion_mnist-v-mse-s0 --num 500 --dequantisation truncated-normal
"""
import argparse
import json
import math
import time

import torch

import importance as chains
import invariance
import losses
import progress as clock
import run
import settings
import tables
import threads
import variance as variances
from control import gaussian_diffusion, gaussian_model, reduced
from ddpm import SCHEDULES
from decoders import discretised, gaussian, prior, reconstruction
from dequantise import DEQUANTISATIONS
from flow import log_likelihood


@torch.no_grad()
def bound(model, x, *, target, schedule, decoder=gaussian, steps=None, variance="small", data=None, uniform="logsnr",
          draws=16, t_min=1e-3, stabiliser=0.0, generator=None, control=True):
    """The bound on -log p(x) for each example, Eq. (3.6), VDM 3.60: x (B, ...) -> dict of (B,) in nats.

    "prior", "reconstruction", "diffusion" sum to the bound; "error" is the standard error of the last over draws of t
    and noise. steps: T of the discrete bound, Eq. (3.18), with a variance of `variance.VARIANCES` (`best` needs data);
    None: continuous time, Eq. (3.20), t from `losses.draw_t`, and with the control variate of `control.py`, of data of
    x's own mean and variance in each dimension: the mean is the same, the error smaller.
    """
    objective, dimensions = dict(target=target, schedule=schedule, stabiliser=stabiliser), x[0].numel()
    if steps is None:
        t, importance = (c.to(x.device) for c in losses.draw_t(          # drawn on the CPU without a generator
            (draws, len(x)), schedule, t_min, "uniform" if uniform == "t" else uniform, generator, x.dtype))
        mean, var = x.mean(0), x.var(0, correction=0)
        of_gaussian, known = gaussian_model(mean, var, schedule), gaussian_diffusion(x, mean, var, schedule, t_min)
    else:
        u = losses.sample_t((draws, len(x)), 0.0, generator, x.dtype)        # discrete_loss moves it
        i = (u * steps).long().clamp(max=steps - 1) + 1
    noise = lambda: torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    diffusion, variate, decoded = [], [], []
    for k in range(draws):
        eps = noise()
        if steps is None:
            integral = dimensions * (1 - 2 * t_min) * importance[k]
            diffusion.append(integral * losses.loss(model, x, t[k], eps, loss="nelbo", **objective))
            variate.append(integral * losses.loss(of_gaussian, x, t[k], eps, target="eps", loss="nelbo",
                                                  schedule=schedule))
        else:
            diffusion.append(dimensions * losses.discrete_loss(
                model, x, i[k], eps, steps=steps, t_min=t_min, variance=variance, data=data, **objective))
        decoded.append(reconstruction(x, noise(), schedule.ends(t_min)[1], decoder))
    diffusion = torch.stack(diffusion)
    if control and steps is None:
        diffusion = reduced(diffusion, torch.stack(variate), known)
    return {"prior": prior(x, schedule, t_min), "reconstruction": torch.stack(decoded).mean(0),
            "diffusion": diffusion.mean(0), "error": diffusion.std(0) / draws**0.5}


def variance_of(config, variance, steps):
    """The variance of the bound of a run. ValueError if it cannot have the one that is asked for."""
    if variance and not (steps or config.get("timesteps")):
        raise ValueError("its bound is of continuous time, which has no variance of a step - say of how many, --steps")
    return variances.chosen(config, variance, steps=steps)


def evaluate(model, x, config, draws=16, steps=None, variance=None, uniform="logsnr", num_ode=None, ode_steps=64,
             tolerance=None, probes=None, t_min=None, batch_size=5000, generator=None, progress=lambda done: None,
             under=None, own=None, dequantisation="uniform", t_max=None):
    """All terms of data x for the network of a run -> dict of (n,) in nats, and the evaluations of the network (ODE).

    x: points (n, D), or images as float levels in [-1, 1], (n, C, H, W). "exact" is -log p(x) of the ODE, for the first
    num_ode of them (all); draws, steps are those of `bound`, ode_steps, tolerance, probes of `log_likelihood`. Images
    have a density only with noise in their bins, of `dequantise.DEQUANTISATIONS`: "exact" is then log q(u | x) more, on
    average not below -log P(x). t_min: `run.smallest_t`. Of a run on a chain the bound is of its own steps and
    variance, or those asked for, all terms; model: with `out`. under, own, t_max: of `invariance.of_run`.
    """
    levels, variance, data = x.ndim > 2 and "latents" not in config, variance_of(config, variance, steps), None
    target, t_min = variances.predicted(config["target"]), run.smallest_t(config, t_min, "flow")
    model, schedule, t_min = invariance.of_run(model, target, config, t_min, under, own, t_max)
    if variance == "best":
        data = run.kind_module(settings.kind(config)).dataset(config)
    shared = dict(target=target, schedule=schedule, stabiliser=config["stabiliser"], generator=generator)
    how = dict(decoder=discretised if levels else gaussian, draws=draws, variance=variance, data=data)
    alone, parts = lambda z, t: variances.split(model(z, t), z)[0], []
    num_ode = len(x) if num_ode is None else num_ode
    for i, rows in zip(range(0, len(x), batch_size), x.split(batch_size)):
        if config.get("timesteps"):
            part = variances.vlb(model, rows, steps=steps or config["timesteps"], t_min=config["t_min"], **how,
                                 **shared)
        else:
            part = bound(model, rows, steps=steps, uniform=uniform, t_min=t_min, **how, **shared)
        rows = rows[:max(0, num_ode - i)]
        if len(rows):
            log_q = 0.0
            if levels:
                std = math.exp(-0.5 * shared["schedule"].ends(t_min)[1])               # sigma / alpha
                rows, log_q = DEQUANTISATIONS[dequantisation](rows, std, generator)
            log_p, part["evaluations"] = log_likelihood(alone, rows, steps=ode_steps, tolerance=tolerance,
                                                        probes=probes, t_min=t_min, **shared)
            part["exact"] = log_q - log_p
        parts.append(part)
        progress(min(i + batch_size, len(x)))
    evaluations = max(part.pop("evaluations", 0) for part in parts)
    terms = {key: torch.cat([part[key] for part in parts if key in part]).cpu() for key in parts[0]}
    terms["bound"] = terms["prior"] + terms["reconstruction"] + terms["diffusion"]
    if not all(values.isfinite().all() for values in terms.values()):
        raise ValueError("its likelihoods are not finite - train it longer, or with another --loss")
    return terms, evaluations


SETTINGS = ("num", "t_min", "seed", "batch_size", "draws", "steps", "variance", "uniform", "num_ode", "ode_steps",
            "tolerance", "probes", "dequantisation", "chains", "under", "t_max")      # that a result depends on


def complete(args, one):
    """The arguments for a Run, with the defaults of its kind of data; of a chain all terms are drawn, each twice."""
    defaults = args.defaults | one.kind.LIKELIHOOD | ({"draws": 2} if one.config["timesteps"] else {}) | (
        {"dequantisation": None} if "latents" in one.config else {})
    given = {key: default if getattr(args, key) is None else getattr(args, key) for key, default in defaults.items()}
    return argparse.Namespace(**vars(args) | given | {"defaults": defaults})


def parse(argv):
    """The arguments. Exit code 2 if they are wrong."""
    parser = settings.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                             usage="python likelihood.py [options], see --help")
    parser.add_argument("--ckpt", nargs="+", help="folders of runs, or their ckpt.pt (the newest run in runs/)")
    parser.add_argument("--num", type=settings.number(int, 2, 10**9), help="test examples (points: 10000, images: 500)")
    parser.add_argument("--t-min", type=settings.number(float, 1e-6, 0.49),
                        help="where z_0 and z_1 are, of a chain in the flow alone (that of training, at least 0.001)")
    parser.add_argument("--schedule", dest="under", choices=SCHEDULES,
                        help="another than that of training, with the same end log-SNRs, see invariance.py (its own)")
    parser.add_argument("--t-max", type=settings.number(float, 0.5, 1 - 1e-6),
                        help="where z_1 is and noise is N(0, I), see sample.py (1 - t_min)")
    parser.add_argument("--seed", type=settings.number(int, 0, 2**62), default=0, help="of t and noise (0)")
    parser.add_argument("--batch-size", type=settings.number(int, 1, 10**9),
                        help="examples at once (points: 5000, images: 50)")
    parser.add_argument("--data-dir", type=settings.folder, help="where named datasets of images are or go (data)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="(auto: cuda or cpu)")
    group = parser.add_argument_group("bound")
    group.add_argument("--draws", type=settings.number(int, 2, 10**6),
                       help="of t and noise for each example (points: 100, images: 16)")
    group.add_argument("--steps", type=settings.number(int, 1, 10**6),
                       help="T of the discrete bound (continuous time; of a run on a chain its own)")
    group.add_argument("--variance", choices=variances.VARIANCES,
                       help="of its steps, see variance.py (the run's own, small unless it was trained on a chain)")
    group.add_argument("--uniform", choices=["logsnr", "t"], default="logsnr",
                       help="what is drawn uniformly in continuous time (logsnr)")
    group.add_argument("--chains", type=settings.number(int, 2, 10**6),
                       help="for each example, of the discrete steps: their likelihood without a bound (none)")
    group = parser.add_argument_group("probability flow ODE")
    group.add_argument("--num-ode", type=settings.number(int, 0, 10**9),
                       help="examples, 0 is none (points: all, images: 16)")
    group.add_argument("--ode-steps", type=settings.number(int, 1, 10**6), default=64, help="of 4 evaluations (64)")
    group.add_argument("--tolerance", type=settings.number(float, 1e-12, 1), help="adaptive steps instead")
    group.add_argument("--probes", type=settings.number(int, 1, 10**6),
                       help="of Hutchinson's divergence (points: exact, images: 1)")
    group.add_argument("--dequantisation", choices=DEQUANTISATIONS, help="noise in the bins of images (uniform)")
    parser.add_argument("--out", type=settings.folder,
                        help="folder for the result (the run's folder), with one in it for each of several runs")
    parser.add_argument("--csv", type=settings.file, metavar="PATH",
                        help="write the results as a table, a row for each run")
    args = parser.parse_args(argv)
    args.defaults = {name: parser.get_default(name) for name in SETTINGS}
    if args.chains and (args.under or args.t_max):
        parser.error("--chains are of the schedule of training - leave out --schedule and --t-max")
    if args.num_ode == 1:
        parser.error("--num-ode must be 0 or at least 2: one example has no error")
    return args


def main(argv=None):
    asked = parse(argv)
    device, chosen = run.device(asked.device), run.chosen(asked.ckpt, asked.out)
    run.of_images(asked, dict(data_dir="data", dequantisation=None), chosen[0][0].config)
    for one, _ in chosen:                                  # before hours of work, not after
        try:
            variance_of(one.config, asked.variance, asked.steps)
            invariance.check(one.config, asked.under, asked.t_max)
            if asked.dequantisation and "latents" in one.config:
                raise ValueError("latents are no grey levels - leave out --dequantisation")
            if asked.chains:
                chains.steps_of(one.config, asked.steps)
        except ValueError as error:
            raise SystemExit(f"{one.folder}: {error}") from None
    lines, show = [], print if len(chosen) == 1 else lambda line: None
    for one, out in chosen:
        args = complete(asked, one)
        x, start = one.kind.test_examples(one.config, args.num, device, args.data_dir), time.perf_counter()
        if len(x) < 2:
            raise SystemExit(f"{one.config['data']} has one test image, and a mean with its error needs two - add some")

        def progress(done):
            seconds = time.perf_counter() - start                                   # noqa: B023 - called in this turn
            print(f"{done:,} of {len(x):,} examples, "                              # noqa: B023
                  f"{seconds / done * (len(x) - done):.0f} s left", flush=True)     # noqa: B023
        network = threads.shared(one.model(device, out=True).to(x.dtype), device)
        examples = 0 if args.tolerance else len(x) if args.num_ode is None else min(args.num_ode, len(x))
        of_flow = clock.counter("flow", 4 * args.ode_steps * examples, "evaluations, one an example")
        T = (args.steps or one.config["timesteps"]) if one.config["timesteps"] else 1
        of_bound = clock.counter("bound", args.draws * T * len(x), "evaluations, one an example")

        def model(z, t):
            prediction = network(z, t)                                                  # noqa: B023
            (of_flow if torch.is_grad_enabled() else of_bound)(len(z))                  # noqa: B023
            return prediction
        try:
            with run.enough_memory("a smaller --batch-size"):
                terms, evaluations = evaluate(
                    model, x, one.config, args.draws, args.steps, args.variance, args.uniform, args.num_ode,
                    args.ode_steps, args.tolerance, args.probes, args.t_min, args.batch_size,
                    run.generator(device, args.seed, "likelihood"), progress, args.under, one.schedule,
                    args.dequantisation, args.t_max)
                if args.chains:
                    terms |= chains.terms(chains.of_run(
                        one, x, args.chains, args.steps, args.variance, args.t_min, args.batch_size,
                        run.generator(device, args.seed, "chains")))
        except ValueError as error:
            raise SystemExit(f"{one.folder}: {error}") from None
        result = tables.likelihood(one, terms, args, show, draws=args.draws, probes=args.probes,
                                   under=args.under, t_max=args.t_max, evaluations=evaluations, device=str(device),
                                   seconds=time.perf_counter() - start)
        file = tables.file_name(args)
        run.write(out / file, json.dumps(result, indent=2).encode())
        print(f"wrote {out / file}; {clock.seconds():.1f} s in all")
        lines.append({column: value for name, found in result.items() for column, value in (
            zip((name, f"{name} error"), found) if isinstance(found, tuple) else [(name, found)])})
    tables.show(lines, asked.csv, tables.OF_LIKELIHOOD + tables.OF_CHAINS * bool(asked.chains))


if __name__ == "__main__":
    run.script(main, "nothing was written")
