r"""A noise schedule that is learned beside the network (VDM A.2, 3.3, 4.3, 4.6; Kingma et al. 2021).

Read `ddpm.py` and `losses.py` first. log-SNR(t) = -gamma(t), with a monotone network n:

    gamma(t) = gamma_0 + (gamma_1 - gamma_0) (n(t) - n(0)) / (n(1) - n(0))
    n(t) = l1 t + sum of l3 sigmoid(l2 t - b),      l1, l2, l3 > 0 by softplus                   VDM A.1, A.2

0 and 1 stand for t_min and 1 - t_min, between which training and sampling stay. The bound does not depend on the shape
of gamma between its ends, but the variance of one draw of it does (VDM 4.3, 4.6). So two things are learned:

    shape   the least mean of the *squared* single-sample loss, as the mean itself does not move
    ends    the least bound: prior and reconstruction depend on them, and what the integral gains there

A draw of the loss is l = 1/2 gamma'(t) w(lambda) |eps_hat - eps|^2. The gradient of its square needs one backward pass,
2 l dl / d eta (`squared_gradient`, VDM's update), through the network, as z depends on gamma. The loops here draw a
whole epoch before its first step, so `Learner.update` takes the same objective after the network has been evaluated:
at a log-SNR lambda the squared error is what it is, whatever gamma, and another gamma would draw it with density
1 / gamma' and weigh it with gamma'. Of draws l_i at lambda_i with `before` the mean of squares with `new` is

    E_new[l^2] = E_before[l^2 gamma_new'(lambda) / gamma_before'(lambda)],      least where 1 / gamma' ~ w sqrt(E h^2)

h is the squared error. The network is given t of the cosine schedule at the same log-SNR, its clock: it means the same
while gamma moves. Every loss keeps the w(lambda) that it has with the cosine schedule, and so does what a run is tested
with; the learned schedule says which log-SNRs are drawn in training, where the ends are, and what t is in sampling.

Not here: a density of t from bins of log-SNR, which needs no network.

    python learned_schedule.py     # the exact denoiser: the variance of a draw before and after, and gamma
"""
import math

import torch
from torch.nn import functional as F

import ddpm
import losses
from adam import Adam
from decoders import gaussian, prior_at, reconstruction

HIDDEN = 16                # sigmoids in n
RATE, RATE_OF_ENDS = 0.02, 1.0
ENDS_EVERY = 100           # steps of the network on images: a step of the ends; on points an epoch has one
CLOCK = ddpm.SCHEDULES["cosine"]


def clock(logsnr):
    """The t of the cosine schedule at a log-SNR, any shape: tan(pi t / 2) = sigma / alpha."""
    return 2 / math.pi * torch.atan(torch.exp(-0.5 * logsnr))


class LearnedSchedule(torch.nn.Module, ddpm.Schedule):
    """gamma(t) with its weights: the methods of `ddpm.Schedule`, preserving, in the dtype of t.

    ends: log-SNR at 1 - t_min and t_min, as `Schedule.ends` has them, on both sides of 0, where they stay. It starts
    nearly uniform in log-SNR. Whatever the weights, log-SNR falls.
    """

    def __init__(self, ends, t_min=0.0, hidden=HIDDEN):
        super().__init__()
        inverse = lambda y: y + torch.log(-torch.expm1(-y))                    # of softplus
        low, high = ends
        self.t_min = t_min
        centre = torch.sigmoid(torch.linspace(-7, 7, hidden, dtype=torch.float64))          # more of them at the ends
        width = centre * (1 - centre) * 14 / hidden
        self.raw_ends = torch.nn.Parameter(inverse(torch.tensor([high, -low], dtype=torch.float64)))
        self.l1 = torch.nn.Parameter(inverse(torch.full((1,), 0.01, dtype=torch.float64)))
        self.l2 = torch.nn.Parameter(inverse(1.5 / width))
        self.l3 = torch.nn.Parameter(inverse(width))
        self.b = torch.nn.Parameter(1.5 / width * centre)

    def shape(self):
        """The weights of n."""
        return [self.l1, self.l2, self.l3, self.b]

    def n(self, t):
        """n(t) and n'(t) > 0: any shape -> two of it."""
        l1, l2, l3 = (F.softplus(c).to(t) for c in (self.l1, self.l2, self.l3))
        s = torch.sigmoid(l2 * t[..., None] - self.b.to(t))                           # (..., hidden)
        return l1 * t + (l3 * s).sum(-1), l1 + (l3 * l2 * s * (1 - s)).sum(-1)

    def gamma(self, t):
        """gamma(t), VDM A.1, and gamma'(t) > 0: any shape -> two of it."""
        (n, slope), (n_0, n_1) = self.n(t), self.n(t.new_tensor([self.t_min, 1 - self.t_min]))[0]
        high, low = F.softplus(self.raw_ends).to(t)
        gamma_0, gamma_1 = -high, low
        return (gamma_0 + (gamma_1 - gamma_0) * (n - n_0) / (n_1 - n_0),
                (gamma_1 - gamma_0) * slope / (n_1 - n_0))

    def logsnr(self, t):
        return -self.gamma(t)[0]

    def dlogsnr(self, t):
        return -self.gamma(t)[1]

    def slope_at(self, logsnr):
        """gamma' at the t of a log-SNR, (n,) -> (n,), with its gradient in the weights of n.

        t is the linear inverse of gamma on a grid, and one step of Newton from there, which is also what gives dt / d
        weights.
        """
        with torch.no_grad():
            grid = torch.linspace(self.t_min, 1 - self.t_min, 1001, dtype=logsnr.dtype)
            gamma = self.gamma(grid)[0]
            i = torch.searchsorted(gamma, -logsnr).clamp(1, len(grid) - 1)
            part = (-logsnr - gamma[i - 1]) / (gamma[i] - gamma[i - 1])
            t = grid[i - 1] + part.clamp(0, 1) * (grid[i] - grid[i - 1])
        gamma, slope = self.gamma(t)
        return self.gamma(t - (gamma + logsnr) / slope.detach())[1]


# The loss, its square, the ends

def single_loss(model, x, eps, gamma, slope, *, target, loss):
    """The loss of one draw for each example, at gamma (B,) with slope gamma' (B,): x, eps (B, ...) -> (B,).

    That of `losses.loss` on the clock times the importance of its t. A mean over dimensions; for `nelbo` it is
    1/2 gamma' |eps_hat - eps|^2 / D. model(z, t), t on the clock.
    """
    t = clock(-gamma)
    return slope / -CLOCK.dlogsnr(t) * losses.loss(model, x, t, eps, target=target, loss=loss, schedule=CLOCK)


def squared_gradient(model, x, t, eps, schedule, *, target, loss="nelbo"):
    """The update of VDM (Kingma et al. 2021, Appendix I.2): losses (B,), after one backward pass through the network.

    Leaves the gradient of the mean loss in the network's weights and that of the mean *squared* loss in the schedule's,
    2 l dl / d eta: the backward pass of the losses' sum ends at gamma and gamma' of each draw, and is multiplied by
    2 l before it goes on into the small network of gamma.
    """
    values = schedule.gamma(t)
    gamma, slope = (c.detach().requires_grad_() for c in values)
    each = single_loss(model, x, eps, gamma, slope, target=target, loss=loss)
    each.mean().backward()
    torch.autograd.backward(values, [2 * each.detach() * c.grad for c in (gamma, slope)])
    return each.detach()


def second_moment(schedule, logsnr, losses, before):
    """Mean square of a draw of the loss under a schedule, of draws of another, whose gamma' was `before`: all (n,)."""
    return (losses**2 * schedule.slope_at(logsnr) / before).mean()


@torch.enable_grad()
def end_gradient(schedule, x, eps, errors, decoder=gaussian):
    """Gradient of the bound in nats per dimension in the schedule's `raw_ends`: (2,), first of the high log-SNR.

    x, eps (n, ...); errors (2,): of eps_hat at the ends, means.
    """
    high, low = F.softplus(schedule.raw_ends) * torch.tensor([1.0, -1.0], dtype=torch.float64)
    at_ends = (prior_at(x, low) + reconstruction(x, eps, high, decoder)).mean().cpu().double() / x[0].numel()
    return torch.autograd.grad(at_ends + 0.5 * (errors[0] * high - errors[1] * low), schedule.raw_ends)[0]


class Learner:
    """A schedule while it learns, with its optimiser: of the config of a run, from the ends of the cosine schedule.

    state: of a checkpoint, what `state` gave.
    """

    def __init__(self, config, state=None):
        self.t_min = config["t_min"]
        self.schedule = LearnedSchedule(CLOCK.ends(self.t_min), self.t_min)
        self.adam = Adam(self.schedule.shape(), RATE)
        if state:
            self.schedule.load_state_dict(state["weights"])
            self.adam.load_state_dict({"state": state["optimizer"]})

    def state(self):
        return dict(weights=dict(self.schedule.state_dict()), optimizer=self.adam.state_dict()["state"])

    @torch.no_grad()
    def draw(self, shape, generator=None):
        """t on the clock, of t uniform on the schedule, and its importance to t uniform on the clock: `losses.draw_t`.

        The mean over these t of anything times importance is the integral over the clock's t between the ends, divided
        by 1 - 2 t_min.
        """
        u = losses.sample_t(shape, self.t_min, generator)
        gamma, slope = self.schedule.gamma(u.cpu().double())
        t = clock(-gamma)
        return t.to(u), (slope / -CLOCK.dlogsnr(t)).to(u)

    def update(self, t, losses):
        """A step of the shape for each batch: t on the clock and losses of what `draw` gave, (batches, B), in order."""
        logsnr, losses = CLOCK.logsnr(t.cpu().double()), losses.detach().cpu().double()
        with torch.no_grad():
            before = self.schedule.slope_at(logsnr.flatten()).view_as(logsnr)
        for batch in zip(logsnr, losses, before):
            gradient = torch.autograd.grad(second_moment(self.schedule, *batch), self.schedule.shape())
            for weight, of in zip(self.schedule.shape(), gradient):
                weight.grad = of
            self.adam.step()



@torch.no_grad()
def move_ends(learners, model, x, eps, targets, decoder=gaussian):
    """A step of gradient descent of the ends on the bound, by 1 at most: of every network of a stack, lists of M.

    x, eps: (n, ...) of each. model(z, t): the stack, of M blocks of 2 n rows, t on the clock. In nats per dimension;
    what the integral of 1/2 error over log-SNR gains at an end is the error of eps_hat there.
    """
    batches = []
    for learner, x_m, eps_m, target in zip(learners, x, eps, targets):
        t = clock(F.softplus(learner.schedule.raw_ends) * torch.tensor([1.0, -1.0])).to(x_m).repeat_interleave(len(x_m))
        batches.append((t, *losses.regression(torch.cat([x_m, x_m]), t, torch.cat([eps_m, eps_m]), target=target,
                                              loss="simple", schedule=CLOCK)))
    t, z, y, w = (torch.cat(c) for c in zip(*batches))
    errors = losses.weighted_error(model(z, t), y, w).cpu().double().unflatten(0, (len(x), 2, -1)).mean(2)     # (M, 2)
    for learner, *of_one in zip(learners, x, eps, errors):
        learner.schedule.raw_ends -= RATE_OF_ENDS * end_gradient(learner.schedule, *of_one, decoder).clamp(-1, 1)


# A run's own

class OnSchedule(torch.nn.Module):
    """A network of a run with a learned schedule: model(z, t), t on the schedule, of network(z, t) on the clock."""

    def __init__(self, network, schedule):
        super().__init__()
        self.network, self.schedule = network, schedule

    def forward(self, z, t, *label):
        return self.network(z, clock(self.schedule.logsnr(t)), *label)


def of_run(config, checkpoint):
    """The schedule of a run: of its t in sampling and in likelihoods, its own where it was learned."""
    if "schedule" not in checkpoint:
        return ddpm.fixed(config["schedule"])
    return Learner(config, checkpoint["schedule"]).schedule.requires_grad_(False)


if __name__ == "__main__":
    from datasets2d import DATASETS
    g, f64, limit, rounds = torch.Generator().manual_seed(0), dict(dtype=torch.float64), 9.0, 4
    data = DATASETS["clusters"]
    exact = data.optimal_model("eps", CLOCK)

    def error(logsnr):
        """|eps_hat - eps|^2 / D of the exact denoiser, of one draw at each log-SNR: (n,) -> (n,)."""
        x = data.sample(len(logsnr), g, torch.float64)
        eps, t = torch.randn(x.shape, generator=g, **f64), clock(logsnr)
        return (exact(ddpm.q_sample(x, t, eps, CLOCK), t) - eps).square().mean(1)

    middles = (torch.arange(180, **f64) + 0.5) * limit / 90 - limit            # of bins of log-SNR
    h = error(middles.repeat_interleave(1000)).unflatten(0, (180, 1000))
    mean, square = 0.5 * h.mean(1), 0.25 * h.square().mean(1)
    normed = lambda p: p / (p.sum() * limit / 90)

    def spread(p):
        """Standard deviation over mean of one draw of the loss, its log-SNR from a density."""
        return ((square / normed(p)).sum() * limit / 90 / (mean.sum() * limit / 90)**2 - 1).sqrt()
    best = square.sqrt()
    print(f"clusters, exact denoiser, log-SNR in +-{limit:g}: standard deviation over mean of one draw of the bound")
    for name, p in dict(cosine=1 / torch.cosh(middles / 2), uniform=torch.ones_like(middles), mean=mean,
                        best=best).items():
        title = {"uniform": "uniform in log-SNR", "mean": "p ~ E h, VDM 4.130", "best": "p ~ sqrt(E h^2), the least"}
        print(f"  {title.get(name, name):32s}{spread(p):7.3f}")
    learner = Learner(dict(t_min=clock(torch.tensor(limit)).item()))           # the cosine's ends there: +-9
    schedule, density = learner.schedule, lambda: 1 / learner.schedule.slope_at(middles).detach()
    for done in range(rounds + 1):
        print(f"  {f'learned, {100 * done} steps of 512 draws':32s}{spread(density()):7.3f}")
        if done < rounds:
            t, _ = learner.draw((100, 512), g)
            logsnr = CLOCK.logsnr(t.double())
            each = 0.5 * schedule.slope_at(logsnr.flatten()).detach() * error(logsnr.flatten())
            learner.update(t, each.view_as(t))
    print(f"\n{'log-SNR':>10s}{'p':>10s}{'least':>10s}")
    for i in range(0, 180, 20):
        print(f"{middles[i + 10]:10.2f}{normed(density())[i + 10]:10.4f}{normed(best)[i + 10]:10.4f}")
    t = torch.tensor([0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98], **f64)
    print(f"\n{'t':10s}{'gamma(t)':>10s}{'cosine':>10s}")
    for time, gamma in zip(t, schedule.gamma(t)[0]):
        print(f"{time:<10.2f}{gamma:10.2f}{-CLOCK.logsnr(time):10.2f}")
