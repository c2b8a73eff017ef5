r"""A control variate of the bound: the same loss of the denoiser of Gaussian data, whose mean is known.

Read `losses.py` first. With log-SNR lambda uniform the diffusion term is the mean of 1/2 |eps_hat - eps|^2 times the
range of lambda, over t and eps. For data N(mu, c^2), each dimension alone, the best eps_hat is in closed form:

    eps_G = sigma (z - alpha mu) / (alpha^2 c^2 + sigma^2),     sigma z for mu = 0, c = 1, alpha^2 + sigma^2 = 1

and so is what its loss is on average for any x, with d = x - mu and u = SNR c^2:

    eps_G - eps = (sqrt(SNR) d - u eps) / (1 + u)
    mean over eps of its square:  (SNR d^2 + u^2) / (1 + u)^2
    integral over log-SNR:        SNR d^2 / (1 + u) + log(1 + u) + 1 / (1 + u),     between both ends

Far from all structure of the data, in much noise and in little, every good network errs as this denoiser does. So the
loss of the network minus b times what that of eps_G, with the same t and eps, is above its own average has the same
mean and less variance, for any mu, c and network (control variates: Glasserman 2003, 4.1). It costs no evaluation.

Not here: the bound (`likelihood.py`).

    python control.py    # the variance that is left, exact denoiser of the four datasets
"""
import torch

from ddpm import expand


def gaussian_model(mean, var, schedule):
    """eps_G as a network: model(z, t) -> eps_hat, z (B, ...), t (B,), of data N(mean, var); both (...)."""
    def model(z, t):
        alpha, sigma = expand(schedule.alpha(t), z), expand(schedule.sigma(t), z)
        return sigma * (z - alpha * mean) / (alpha**2 * var + sigma**2)
    return model


def gaussian_diffusion(x, mean, var, schedule, t_min=1e-3):
    """The diffusion term of `gaussian_model`, Eq. (3.20), exactly: x (B, ...) -> (B,) in nats, for any x."""
    def integral(logsnr):
        snr = x.new_tensor(logsnr).exp()
        u = snr * var
        return (snr * (x - mean)**2 / (1 + u) + torch.log1p(u) + 1 / (1 + u)).flatten(1).sum(1)
    low, high = schedule.ends(t_min)
    return 0.5 * (integral(high) - integral(low))


def reduced(loss, of_gaussian, known):
    """loss - b (of_gaussian - known), a loss of the same mean: (K, B) of K draws, known (B,) -> (K, B).

    b of a draw is that of least squares in the other draws, all examples together: being independent of what it
    multiplies, it adds no bias. It is 0 where they do not tell it: fewer than 10 losses, or of_gaussian all but known.
    """
    others = lambda c: (c.sum() - c.sum(1)) / (c.numel() - c.shape[1])         # mean over the other draws, (K,)
    y, c = loss - known, of_gaussian - known
    y, c = y - y.mean(), c - c.mean()                                          # no covariance changes, digits stay
    var = others(c * c) - others(c)**2
    clear = var > 1e-6 * (others(c * c) + others(y * y))                       # not rounding errors alone
    b = torch.where(clear & (c.numel() - c.shape[1] >= 10), (others(y * c) - others(y) * others(c)) / var, 0)
    return loss - b[:, None] * (of_gaussian - known)


if __name__ == "__main__":
    import likelihood
    from datasets2d import DATASETS, FOUR
    from ddpm import SCHEDULES
    schedule = SCHEDULES["cosine"]
    print(f"{'':12s}{'variance of a draw':>20s}{'with control':>15s}{'ratio':>8s}{'diffusion term':>30s}")
    for name in FOUR:
        x = DATASETS[name].sample(500, torch.Generator().manual_seed(0), torch.float64)
        found = [likelihood.bound(DATASETS[name].optimal_model("v", schedule), x, target="v", schedule=schedule,
                                  draws=50, control=on, generator=torch.Generator().manual_seed(1))
                 for on in (False, True)]
        plain, less = (50 * terms["error"].square().mean().item() for terms in found)
        print(f"{name:12s}{plain:20.1f}{less:15.1f}{plain / less:8.2f}"
              + "".join(f"{terms['diffusion'].mean():15.3f}" for terms in found))
