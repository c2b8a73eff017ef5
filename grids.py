r"""Grids: the times at which a sampler evaluates the network, so many of them.

Read `samplers.py` first. A grid is a decreasing list of times from 1 - t_min on. `t` and `angle`
divide what is to be done in n steps, of which the last goes to sigma = 0; the others end at t_min.

    t          equal steps of t, the thesis's
    logsnr     equal steps of log-SNR
    karras     equal steps of (sigma / alpha)^(1 / 7)
    angle      equal steps of theta = arctan(sigma / alpha); of the cosine schedule it is t
    optimal    found here for `unipc`: the end of the flow of the rings with least squared error

Why t is good on the cosine schedule: data of N(0, 1) have x_hat = z cos theta / sqrt(alpha^2 +
sigma^2), so a step of `ddim` multiplies z / sqrt(alpha^2 + sigma^2) by the cosine of its part of
theta. It should stay as it is. Of n cosines whose angles have a given sum the product is largest
where the angles are equal: cos(theta / n)^n.

    python grids.py                                    # the grids of 8 steps, and that product
    python grids.py --sampler dpmpp --steps 8          # the best times of another sampler
"""
import argparse
import math

import numpy as np
import torch


def uniform_t(n, schedule, t_min, **like):
    """t_i = t_min + (1 - 2 t_min) i / n, the thesis's i / T squeezed into [t_min, 1 - t_min].

    i = n, ..., 1. The last time is one step above t_min, from where x_hat is the sample. Of a chain
    it skips steps (Nichol and Dhariwal 2021, Eq. 19).
    """
    return t_min + (1 - 2 * t_min) * torch.arange(n, 0, -1, **like) / n


def uniform_logsnr(n, schedule, t_min, **like):
    """Equal steps of log-SNR from that of 1 - t_min to that of t_min."""
    return schedule.t(torch.linspace(*schedule.ends(t_min), n, **like))


def karras(n, schedule, t_min, rho=7, **like):
    """Equal steps of (sigma / alpha)^(1 / rho), the same ends (Karras et al. 2022, Eq. 5)."""
    first, last = (math.exp(-0.5 * logsnr / rho) for logsnr in schedule.ends(t_min))
    return schedule.t(-2 * rho * torch.linspace(first, last, n, **like).log())


def at_angles(part, schedule, t_min):
    """Times where theta is `part` of the way from that of t_min, 0, to that of 1 - t_min, 1."""
    first, last = (math.atan(math.exp(-0.5 * logsnr)) for logsnr in schedule.ends(t_min))
    return schedule.t(-2 * torch.tan(last + (first - last) * part).log())


def angle(n, schedule, t_min, **like):
    """Equal steps of theta: part i / n, i = n, ..., 1."""
    return at_angles(torch.arange(n, 0, -1, **like) / n, schedule, t_min)


OPTIMAL = {                              # parts of theta, of the rings and `unipc`, by `search`
    4: [1, 0.697, 0.438, 0.112],
    5: [1, 0.806, 0.590, 0.283, 0.100],
    6: [1, 0.827, 0.586, 0.330, 0.145, 0.091],
    8: [1, 0.887, 0.753, 0.577, 0.343, 0.195, 0.134, 0.094],
    10: [1, 0.912, 0.803, 0.655, 0.465, 0.272, 0.177, 0.128, 0.098, 0.053],
    12: [1, 0.932, 0.857, 0.743, 0.586, 0.371, 0.221, 0.157, 0.127, 0.092, 0.061, 0.037],
    16: [1, 0.945, 0.867, 0.784, 0.698, 0.611, 0.522, 0.431, 0.341, 0.261, 0.198, 0.141, 0.090, 0.053, 0.033,
         0.010],
}


def optimal(n, schedule, t_min, **like):
    """The row of OPTIMAL for the number nearest to n, interpolated where it is not n."""
    m = min(OPTIMAL, key=lambda m: abs(m - n))
    part = np.interp(np.arange(n, 0, -1) / n, np.arange(m + 1) / m, [0, *OPTIMAL[m][::-1]])
    return at_angles(torch.tensor(part.tolist(), **like), schedule, t_min)


GRIDS = {"t": uniform_t, "logsnr": uniform_logsnr, "karras": karras, "angle": angle,
         "optimal": optimal}


def search(sampler, steps, denoise, z, end, schedule, t_min=1e-3):
    """Parts of theta for `steps` times, and the mean squared distance to `end` that is left.

    `end` is where the flow goes from the first z (B, D). The steps are a softmax, all positive.
    """
    import scipy.optimize

    def parts(logits):
        shares = np.exp([*logits, 0.0])
        return np.cumsum(shares / shares.sum())[::-1].copy()

    def error(logits):
        times = at_angles(torch.tensor(parts(logits), dtype=z.dtype), schedule, t_min)
        return (sampler(denoise, z, times, schedule, None) - end).square().mean().item()
    found = scipy.optimize.minimize(error, np.zeros(steps - 1), options=dict(eps=1e-4, ftol=1e-5),
                                    method="L-BFGS-B")
    return parts(found.x), found.fun


def main(argv=None):
    import ddpm
    import samplers
    from arguments import Parser, number
    from datasets2d import DATASETS, FOUR, GaussianMixture
    flows = "ddim", "euler", "heun", "dpmpp", "dpmpp3m", "unipc", "unipc3", "ipndm"
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    usage="python grids.py [options], see --help")
    parser.add_argument("--sampler", choices=flows, help="of which the best times are searched")
    parser.add_argument("--steps", type=number(int, 2, 64), default=8, help="(8)")
    parser.add_argument("--data", choices=FOUR, default="rings", help="to search with (rings)")
    args = parser.parse_args(argv)
    schedule, n, like = ddpm.SCHEDULES["cosine"], args.steps, dict(dtype=torch.float64)

    if not args.sampler:
        ones = samplers.denoiser(lambda z, t: schedule.alpha(t)[:, None] * z, "x", schedule)
        print(f"{n} steps, cosine schedule; standard deviation of N(0, 1) drawn with ddim")
        for name, grid in GRIDS.items():
            times = grid(n, schedule, 1e-3, **like)
            std = samplers.ddim(ones, torch.ones(1, 1, **like), times, schedule, None).item()
            print(f"{name:8s} {std:.4f}   t = " + " ".join(f"{t:.3f}" for t in times))
        print(f"cos(pi / {2 * n})^{n}: {math.cos(math.pi / 2 / n)**n:.4f}")
        return
    flow, ends = samplers.SAMPLERS[args.sampler], {}
    for name in FOUR:
        centres, std = DATASETS[name].centres, DATASETS[name].std
        data = GaussianMixture(centres[::max(1, len(centres) // 200)], std)             # enough, and fast
        denoise = samplers.denoiser(data.optimal_model("x", schedule), "x", schedule)
        z = torch.randn(200, 2, generator=torch.Generator().manual_seed(0), **like)
        end = samplers.SAMPLERS["dpmpp"](denoise, z, uniform_t(512, schedule, 1e-3, **like),
                                         schedule, None)
        ends[name] = denoise, z, end
    part, _ = search(flow, n, *ends[args.data], schedule)
    print(f"parts of theta: {', '.join(f'{p:.3f}' for p in part)}\n"
          f"root mean squared distance to the end of the flow\n{'':8s}" + " ".join(f"{d:>10s}" for d in ends))
    for name, times in {"angle": angle(n, schedule, 1e-3, **like), "optimal": optimal(n, schedule, 1e-3, **like),
                        "found": at_angles(torch.tensor(part), schedule, 1e-3)}.items():
        print(f"{name:8s}" + " ".join(
            f"{(flow(denoise, z, times, schedule, None) - end).square().sum(1).mean().sqrt():10.4f}"
            for denoise, z, end in ends.values()))


if __name__ == "__main__":
    main()
