"""Labels and guidance against Bayes' rule, autograd, quadrature and rejection; then the table of a small study."""
import functools
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

import ddpm
import guidance
import metrics
import plots
import plots_guidance
import reproduce_guidance
import samplers
import targets
from datasets2d import DATASETS, GaussianMixture, rings, standardised

F64, NULL = torch.float64, guidance.NULL
every_set = pytest.mark.parametrize("name", DATASETS)
THIN = {"clusters": DATASETS["clusters"], "rings": standardised(*rings(40))}


def points(n, seed=0):
    return 1.2 * torch.randn(n, 2, generator=torch.Generator().manual_seed(seed), dtype=F64)


def log_p(data, z, alpha=1.0, sigma=0.0, label=None):
    """log p(z), or log p(z | label), in torch.distributions."""
    d, centres = torch.distributions, data.centres if label is None else data.centres[data.labels == label]
    scale = (alpha**2 * data.std**2 + sigma**2).sqrt().expand(len(centres), 2)
    return d.MixtureSameFamily(d.Categorical(torch.ones(len(centres), dtype=F64)),
                               d.Independent(d.Normal(alpha * centres, scale), 1)).log_prob(z)


def gradient(function, z):
    z = z.clone().requires_grad_()
    return torch.autograd.grad(function(z).sum(), z)[0]


# Labels of the datasets

def test_the_labels_are_what_the_datasets_say():
    centres = {name: [data.centres[data.labels == label] for label in range(data.classes)]
               for name, data in DATASETS.items()}
    assert {name: [len(c) for c in each] for name, each in centres.items()} == {
        "clusters": 4 * [1], "rings": [1000, 1000], "waves": [1000, 1000], "swiss_roll": [1000, 1000],
        "unequal": [1, 4]}
    assert [c[0].sign().tolist() for c in centres["clusters"]] == [[-1, -1], [-1, 1], [1, -1], [1, 1]]
    for c, side in zip(centres["rings"], (-1, 1)):                        # all at one distance from the ring's middle
        raw = c * torch.tensor([0.75 + 0.05**2, 0.5 + 0.05**2], dtype=F64).sqrt() - torch.tensor([side / 2, 0])
        assert_close(raw.norm(dim=1), torch.ones(1000, dtype=F64))
    below, above = centres["waves"]
    assert (below[:, 1] < above[:, 1]).all() and torch.equal(below[:, 0], above[:, 0])
    inner, outer = centres["swiss_roll"]
    assert inner.std(0).max() < 0.7 * outer.std(0).min()
    assert DATASETS["unequal"].centres[0, 0] < 0 < DATASETS["unequal"].centres[1, 0]


@every_set
def test_each_class_is_a_mixture_and_together_they_are_the_data(name):
    data, z, alpha, sigma = DATASETS[name], points(60), 0.8, 0.3
    shares = [(data.labels == label).double().mean() for label in range(data.classes)]
    together = torch.stack([share.log() + data.given(label).log_prob(z, alpha, sigma)
                            for label, share in enumerate(shares)]).logsumexp(0)
    assert_close(together, data.log_prob(z, alpha, sigma))
    for label in range(data.classes):
        of = lambda z: log_p(data, z, alpha, sigma, label)                                       # noqa: B023
        assert_close(data.given(label).log_prob(z, alpha, sigma), of(z))
        assert_close(data.given(label).score(z, alpha, sigma), gradient(of, z))


def test_a_label_that_does_not_exist_is_refused():
    for label in 4, -1:
        with pytest.raises(ValueError, match=f"no label {label}: choose from 0 to 3"):
            DATASETS["clusters"].given(label)
    plain = GaussianMixture(DATASETS["clusters"].centres, DATASETS["clusters"].std)
    with pytest.raises(ValueError, match="no label 0: these have none"):
        plain.given(0)
    assert plain.classes == 0 and plain.sample_pairs(3)[1] is None


@every_set
def test_points_with_labels_are_the_points_without(name):
    data, g = DATASETS[name], lambda: torch.Generator().manual_seed(3)
    x, labels = data.sample_pairs(20_000, g(), F64)
    k = torch.randint(len(data.centres), (20_000,), generator=g())
    assert torch.equal(x, data.sample(20_000, g(), F64)) and torch.equal(labels, data.labels[k])
    for label in range(data.classes):
        mean, std = data.given(label).centres.mean(0), x[labels == label].std(0)
        error = std / (labels == label).sum()**0.5
        assert ((x[labels == label].mean(0) - mean).abs() < 4.5 * error).all()


@every_set
def test_the_posterior_of_labels_is_bayes_rule(name):
    data, z, alpha, sigma = DATASETS[name], points(50), 0.6, 0.8
    joint = torch.stack([log_p(data, z, alpha, sigma, label).exp() * (data.labels == label).sum() / len(data.labels)
                         for label in range(data.classes)], 1)
    assert_close(guidance.posterior(data, z, alpha, sigma), joint / log_p(data, z, alpha, sigma).exp()[:, None])


# Guidance

@pytest.mark.parametrize("data, schedule", [("clusters", "ve"), ("rings", "cosine"), ("rings", "flow")])
@pytest.mark.parametrize("target", ["x", "eps", "v", "s", "u", "F"])
def test_guidance_of_any_prediction_is_that_of_the_score(data, target, schedule):
    """Rows of two labels, each with its own t: the score by autograd of log-densities."""
    data, schedule, w, z = THIN[data], ddpm.SCHEDULES[schedule], 1.7, points(40)
    label, t = torch.tensor([0, 1]).repeat(20), torch.linspace(0.05, 0.95, 40, dtype=F64)
    y = guidance.guided(guidance.exact(data, target, schedule), w)(z, t, label)
    for i in range(0, 40, 5):
        alpha, sigma, row = schedule.alpha(t[i]), schedule.sigma(t[i]), z[i:i + 1]
        score = gradient(lambda z: (1 + w) * log_p(data, z, alpha, sigma, label[i])              # noqa: B023
                         - w * log_p(data, z, alpha, sigma), row)                                # noqa: B023
        a, b = targets.coefficients(target, alpha, sigma)
        assert_close(y[i:i + 1], a * (row + sigma**2 * score) / alpha - b * sigma * score, rtol=1e-5, atol=1e-6)


def network(z, t, label):
    """Two outputs beside the prediction, as of a learned variance."""
    return torch.cat([label[:, None] * z, 10.0 + label[:, None] + z], 1)


def test_a_learned_variance_is_the_conditional_one():
    z, t, label = points(5), torch.full((5,), 0.5), torch.tensor([0, 1, 2, 3, 3])
    y = guidance.guided(network, 2)(z, t, label)
    assert_close(y[:, :2], 3 * label[:, None] * z - 2 * NULL * z)
    assert_close(y[:, 2:], 10 + label[:, None] + z)


def test_guidance_acts_in_its_interval_alone():
    """It is open below and closed above; elsewhere the model is the conditional one, evaluated once."""
    calls = []
    model = lambda z, t, label: calls.append(label) or label[:, None] * z
    t, label, z = torch.tensor([0.2, 0.3, 0.5, 0.7, 0.8]), torch.full((5,), 2), points(5)
    y = guidance.guided(model, 3, (0.3, 0.7))(z, t, label)
    assert_close(y, torch.tensor([2, 2, 4 * 2 + 3, 4 * 2 + 3, 2])[:, None] * z)
    assert len(calls) == 2 and calls[1].tolist() == 5 * [NULL]
    for w, interval in (3, (0.9, 1.0)), (0, (0.0, 1.0)):
        calls.clear()
        assert_close(guidance.guided(model, w, interval)(z, t, label), 2 * z)
        assert len(calls) == 1


def test_one_label_is_that_of_every_row():
    z, t = points(4), torch.full((4,), 0.5)
    for label in 2, torch.tensor(2), torch.tensor([2, 2, 2, 2]):
        assert_close(guidance.of_label(network, label)(z, t), network(z, t, torch.full((4,), 2)))


SPECS = {0: (0.979, 0.19), 1: (1.10, 0.14), 2: (1.18, 0.12), 5: (1.34, 0.10), 10: (1.52, 0.09)}     # computed before


@pytest.mark.parametrize("w", SPECS)
def test_the_flow_of_one_cluster_moves_off_the_data_and_narrows(w):
    """Mean and standard deviation of an axis; the clusters are two independent axes, so both are of one law."""
    data, g, COSINE = DATASETS["clusters"], torch.Generator().manual_seed(0), ddpm.SCHEDULES["cosine"]
    model = guidance.of_label(guidance.guided(guidance.exact(data, "eps", COSINE), w), 3)
    x = samplers.sample(model, (4000, 2), 64, target="eps", schedule=COSINE, sampler="dpmpp", grid="logsnr",
                        generator=g).flatten()
    mean, std = SPECS[w]
    assert abs(x.mean() - mean) < 0.006 + 4 * std / 8000**0.5 and abs(x.std() - std) < 0.009


# The density that guidance is said to sample

@pytest.mark.parametrize("name, label", [("clusters", 3), ("rings", 0)])
def test_the_tilted_density_is_the_class_thinned_by_its_posterior(name, label):
    """p(x | label) p(label | x)^w: a point of the class is kept with probability p(label | x)^w."""
    data, w, g = THIN[name], 2.0, torch.Generator().manual_seed(0)
    x = data.given(label).sample(20_000, g, F64)
    chance = guidance.posterior(data, x)[:, label]**w
    kept = x[torch.rand(len(x), generator=g, dtype=F64) < chance]
    law, share = guidance.Tilted(data, label, w, cells=200, limit=2.6), 1 / data.classes
    mean, std = law.moments()
    assert_close(law.log_mass.exp() * share**w, chance.mean(), rtol=0.01, atol=0)
    assert ((kept.mean(0) - mean).abs() < 4.5 * std / len(kept)**0.5).all()
    assert_close(kept.std(0), std, rtol=0.03, atol=0)
    drawn = law.sample(20_000, torch.Generator().manual_seed(1))
    assert drawn.dtype == torch.float32 and len(drawn.unique()) > 35_000              # not the cells' centres
    low, _ = metrics.floor(data.given(label), len(kept), 20_000, 3)["sliced_wasserstein"]
    assert metrics.sliced_wasserstein(kept.float(), drawn) < 2.5 * low


def test_without_guidance_it_is_the_class():
    data, z = THIN["rings"], points(30)
    law = guidance.Tilted(data, 1, 0.0, cells=250, limit=2.5)
    assert_close(law.log_mass.exp(), torch.tensor(1.0, dtype=F64))
    assert_close(law.score(z, 0.9, 0.4), data.given(1).score(z, 0.9, 0.4), rtol=1e-4, atol=1e-4)


def test_the_score_of_the_diffused_density_and_how_guidance_differs():
    """score(z | label) + grad log E[p(label | x)^w | z, label], by autograd of sums over another grid."""
    data, w, label, alpha, sigma, z = THIN["rings"], 3.0, 0, 0.8, 0.6, points(20)
    axis = torch.linspace(-2.4, 2.4, 151, dtype=F64)
    x = torch.cartesian_prod(axis, axis)
    given = log_p(data, x, label=label)
    power = w * (given - log_p(data, x) + torch.tensor(0.5, dtype=F64).log())
    kernel = lambda z: -(z[:, None] - alpha * x).square().sum(2) / (2 * sigma**2) + given
    log_mean = lambda z: (kernel(z) + power).logsumexp(1) - kernel(z).logsumexp(1)
    truth = data.given(label).score(z, alpha, sigma) + gradient(log_mean, z)
    law = guidance.Tilted(data, label, w, cells=140, limit=2.5)
    assert_close(law.score(z, alpha, sigma), truth, rtol=1e-4, atol=1e-4)
    posterior = lambda z: log_p(data, z, alpha, sigma, label) - log_p(data, z, alpha, sigma)
    guided = data.given(label).score(z, alpha, sigma) + w * gradient(posterior, z)
    assert (guided - truth).norm() > 0.3 * truth.norm()


# The table

@pytest.fixture
def small(monkeypatch):
    caches = reproduce_guidance.tilted, reproduce_guidance.samples
    clear = lambda: [cache.cache_clear() for cache in caches]
    clear()
    monkeypatch.setattr(reproduce_guidance, "SETS", {"clusters": (THIN["clusters"], 3), "rings": (THIN["rings"], 0)})
    monkeypatch.setattr(reproduce_guidance, "SAMPLERS", {"flow": ("dpmpp", 6), "SDE": ("ancestral", 8)})
    monkeypatch.setattr(reproduce_guidance, "REAL", 4000)
    monkeypatch.setattr(reproduce_guidance, "WEIGHTS", (0, 2))
    monkeypatch.setattr(reproduce_guidance, "TIMES", (0.3,))
    monkeypatch.setattr(guidance, "Tilted", functools.partial(guidance.Tilted, cells=120, limit=2.4))
    yield SimpleNamespace(args=SimpleNamespace(num_samples=2000))
    clear()


def test_the_cells_of_the_table(small):
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in reproduce_guidance.guided(small)]
    by = {tuple(line[:3]): line[3:] for line in lines}
    for name, (data, label) in reproduce_guidance.SETS.items():
        law, real = reproduce_guidance.tilted(name, 2)
        x = reproduce_guidance.samples(name, 2, "SDE", 1000)
        found = [f"{metrics.sliced_wasserstein(x, real):.3f}",
                 f"{(guidance.posterior(data, x)[:, label] > 0.5).double().mean():.3f}",
                 f"{((x[:, 0].var() + x[:, 1].var()) / 2).sqrt():.3f}", f"{log_p(data, x, label=label).mean():.3f}"]
        assert by[name, "2", "SDE"] == found
        assert by[name, "2", "the density"][1:] == [
            f"{(guidance.posterior(data, real)[:, label] > 0.5).double().mean():.3f}",
            f"{((real[:, 0].var() + real[:, 1].var()) / 2).sqrt():.3f}", f"{log_p(data, real, label=label).mean():.3f}"]
        assert by[name, "5", "flow"][-1] == "{:.3f}".format(metrics.sliced_wasserstein(
            reproduce_guidance.samples(name, 5, "flow", 1000), reproduce_guidance.tilted(name, 5)[1]))
        assert by[name, "5", "flow"][0] == "{:.3f}".format(metrics.sliced_wasserstein(
            reproduce_guidance.samples(name, 0, "flow", 1000), reproduce_guidance.tilted(name, 5)[1]))
        assert by[name, "5", "flow"][0] != by[name, "5", "flow"][1] != by[name, "5", "flow"][2]


def test_the_error_of_the_guided_score(small):
    assert reproduce_guidance.relative_error("clusters", 0, 0.3) < 1e-3
    assert abs(reproduce_guidance.relative_error("clusters", 1, 0.3) - 0.60) < 0.06            # computed before
    assert abs(reproduce_guidance.relative_error("clusters", 5, 0.3) - 2.8) < 0.3


def test_the_figure(small, tmp_path, monkeypatch):
    drawn, original, shades, contourf = {}, plots_guidance.planes, [], plots_guidance.plt.Axes.contourf
    monkeypatch.setattr(plots, "DPI", 30)
    monkeypatch.setattr(plots_guidance.plt.Axes, "contourf", lambda ax, x, y, values, **options: (
        shades.append((x, y, values)), contourf(ax, x, y, values, **options)))
    monkeypatch.setattr(plots_guidance, "planes", lambda panels, path: drawn.update(panels) or original(panels, path))
    reproduce_guidance.fig_plane(small, tmp_path / "plane.png")
    assert (tmp_path / "plane.png").stat().st_size > 5000 and len(drawn) == 8
    data, law, x = drawn["rings, SDE", "w = 2"]
    assert data is THIN["rings"] and torch.equal(x, reproduce_guidance.samples("rings", 2, "SDE", 1000))
    assert_close(law.probabilities, guidance.Tilted(data, 0, 2).probabilities)
    axis, _, log_p = shades[-1]                            # rows are the second axis: the left ring, of which the
    mass = (log_p - log_p.max()).exp()                     # left half is kept most, is no ring below
    assert mass.sum(0) @ axis < -0.3 * mass.sum() and abs(mass.sum(1) @ axis) < 0.1 * mass.sum()
