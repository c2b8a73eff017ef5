"""What was measured of runs, for people: the likelihoods of one; several as one table, a row a run, also as CSV.

Not here: tables of a study, with means over seeds and in Markdown (`study.py`).
"""
import csv
import io
import math

import run
import settings

OF_LIKELIHOOD = "run", "bound", "bound error", "exact", "exact error", "entropy", "bound - entropy", "exact - entropy"
OF_CHAINS = "chain", "chain error", "chain - entropy"


def text(value):
    """A cell of the screen: four decimals."""
    return f"{value:.4f}" if isinstance(value, float) else "" if value is None else str(value)


def show(rows, path=None, columns=None):
    """Print rows, dicts, if there is more than one, and write them as CSV, with all digits, where path is given.

    columns: those of the screen, of which each row may have any; the file has every column of every row.
    """
    every = list(dict.fromkeys(name for row in rows for name in row))
    cells = [list(columns or every), *([text(row.get(name)) for name in columns or every] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for line in cells if len(rows) > 1 else []:
        print("  ".join([line[0].ljust(widths[0]), *(c.rjust(width) for c, width in zip(line[1:], widths[1:]))]))
    if path:
        buffer = io.StringIO()
        table = csv.DictWriter(buffer, every, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
        run.write(path, buffer.getvalue().encode())
        print(f"wrote {path}")


def mean_and_error(c):
    """Mean over examples and its standard error: (n,) -> two numbers."""
    return c.double().mean().item(), c.double().std().item() / len(c)**0.5


def file_name(args):
    """likelihood.json, or with what was asked for besides the defaults in its name: no result replaces another."""
    asked = [f"-{name.replace('_', '-')}-{getattr(args, name)}" for name, default in args.defaults.items()
             if getattr(args, name) != default]
    return f"likelihood{''.join(asked)}.json"


def likelihood(one, terms, args, show=print, **facts):
    """Print the terms of a Run, of `likelihood.evaluate`, beside the entropy -> what is in likelihood.json."""
    n, dimensions, config = len(terms["bound"]), one.kind.dimension(one.config), one.config
    steps = args.steps or config["timesteps"]
    result = dict(run=str(one.folder), n=n, n_exact=len(terms.get("exact", [])), dimensions=dimensions,
                  steps=steps, variance=(args.variance or config["variance"]) if steps else None, uniform=args.uniform,
                  ode_steps=args.ode_steps, tolerance=args.tolerance, dequantisation=args.dequantisation,
                  t_min=run.smallest_t(config, args.t_min, "flow"), seed=args.seed, **facts)
    standardised = " (standardised: in the file's units add {:.4f} nats)".format(
        sum(map(math.log, config["points"]["scale"]))) if "points" in config else (
        " (a density of latents, standardised)" if "latents" in config else "")
    show(f"{one.folder}: {n:,} {settings.kind(config)} of {config['data']}{standardised}, "
         f"{facts['seconds']:.1f} s on {facts['device']}\n{'':20s} {'nats':>10s}   error   {'bits/dim':>10s}   error")

    def line(name, values, note=""):
        mean, error = result[name] = mean_and_error(values)
        bits = 1 / (dimensions * math.log(2))
        show(f"{name:20s} {mean:10.4f} {error:9.4f} {bits * mean:10.4f} {bits * error:9.4f}   {note}")
    line("prior", terms["prior"])
    line("reconstruction", terms["reconstruction"])
    line("diffusion", terms["diffusion"],
         f"at most {(terms['error'].square().sum().sqrt() / n).item():.4f} nats from t and noise")
    line("bound", terms["bound"], f"the sum, T = {steps}, variance {result['variance']}" if steps else "the sum")
    if "chain" in terms:
        size, error = terms["effective size"], terms["chain error"].square()
        result |= dict(chains=args.chains, effective_size=size.mean().item(), smallest_effective_size=size.min().item(),
                       error_of_chains=error.sum().sqrt().item() / n, bias_of_chains=error.mean().item() / 2)
        note = ("error {error_of_chains:.4f} and bias {bias_of_chains:.4f} from them" if result["bias_of_chains"] < 0.05
                else "too few: an upper bound alone")        # the delta method is right of small numbers
        line("chain", terms["chain"], f"{{chains}} chains, effective size {{effective_size:.1f}}, {note}"
             .format(**result))
    if "exact" in terms:
        line("exact", terms["exact"], f"flow, {facts['evaluations']} function evaluations, "
                                      f"{result['n_exact']:,} {settings.kind(config)}"
                                      + (f", {args.dequantisation} noise" if args.dequantisation else ""))
    surprise = one.kind.surprise(config)
    if surprise is not None:
        line("entropy", surprise, f"of the data, {len(surprise):,} {settings.kind(config)}")
        for name in "bound", "chain", "exact":
            if name in terms:
                gap = terms[name] - surprise[:len(terms[name])]
                line(f"{name} - entropy", gap, f"of the same {settings.kind(config)}; median {gap.median().item():.4f}")
    return result
