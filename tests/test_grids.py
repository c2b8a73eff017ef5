"""The grids: the product of cosines, angles of every schedule, the search and its table."""
import math

import numpy as np
import pytest
import torch
from test_ddpm import alpha_sigma, every_schedule
from test_samplers import COARSE, gaussian_model
from torch.testing import assert_close

import grids
import samplers
from ddpm import SCHEDULES

F64 = torch.float64


@every_schedule
@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_ddim_on_standard_normal_data_shrinks_by_a_cosine_a_step_and_least_on_equal_angles(name, n):
    """theta = arctan(sigma / alpha): cos(step)^(n - 1) cos(step + theta_min), and no other grid does better."""
    schedule, t_min, std = SCHEDULES[name], 0.01, {}
    alpha, sigma = alpha_sigma(name, torch.tensor([1 - t_min, t_min], dtype=F64))
    first, last = torch.atan2(sigma, alpha).tolist()
    for grid in samplers.GRIDS:
        z = torch.randn(50, 1, generator=torch.Generator().manual_seed(1), dtype=F64)
        x = samplers.sample(gaussian_model(1.0, name), (50, 1), n, target="x", schedule=schedule, sampler="ddim",
                            grid=grid, t_min=t_min, generator=torch.Generator().manual_seed(1), dtype=F64)
        assert_close(x / z, (x / z)[:1].expand(50, 1), rtol=1e-6, atol=0)
        alpha, sigma = alpha_sigma(name, samplers.GRIDS[grid](n, schedule, t_min, dtype=F64))
        theta, std[grid] = torch.atan2(sigma, alpha), (x / z)[0].item()
        product = torch.cos(theta - torch.cat([theta[1:], torch.zeros(1, dtype=F64)])).prod().item()
        assert std[grid] == pytest.approx(product, rel=1e-6)
    step = (first - last) / n
    assert std["angle"] == pytest.approx(math.cos(step)**(n - 1) * math.cos(step + last), rel=1e-6)
    if last < 0.02:                   # the last step is theta_min longer than the others: nearly the best
        assert std["angle"] > max(std.values()) - 0.001


@every_schedule
def test_angle_divides_theta_equally(name):
    n, t_min = 6, 0.002
    ends = torch.tensor([1 - t_min, t_min], dtype=F64)
    alpha, sigma = alpha_sigma(name, torch.cat([ends, grids.angle(n, SCHEDULES[name], t_min, dtype=F64)]))
    first, last, *theta = torch.atan(sigma / alpha).tolist()
    assert theta == pytest.approx([last + (first - last) * i / n for i in range(n, 0, -1)], rel=1e-6)


def test_of_the_cosine_schedule_equal_t_are_equal_angles():
    for n in 1, 7, 512:
        assert_close(*(samplers.GRIDS[grid](n, SCHEDULES["cosine"], 1e-3, dtype=F64) for grid in ("t", "angle")))
        assert_close(*(samplers.GRIDS[grid](n, SCHEDULES["cosine"], 1e-3, dtype=torch.float32)
                       for grid in ("t", "angle")), rtol=0, atol=1e-6)


@every_schedule
def test_optimal_is_its_row_and_between_rows_interpolates_the_nearest(name):
    schedule, t_min, like = SCHEDULES[name], 0.002, dict(dtype=F64)
    ends = torch.tensor([1 - t_min, t_min], dtype=F64)
    theta = lambda t: (lambda a, s: torch.atan(s / a))(*alpha_sigma(name, t))
    (first, last), parts = theta(ends), {n: torch.tensor(row, **like) for n, row in grids.OPTIMAL.items()}
    for n, row in parts.items():
        assert len(row) == n and row[0] == 1 and (row.diff() < 0).all() and row[-1] > 0
        assert_close(theta(grids.optimal(n, schedule, t_min, **like)), last + (first - last) * row, rtol=1e-6, atol=0)
    for n, nearest in (1, 4), (7, 6), (9, 8), (32, 16):
        row = np.interp(np.arange(n, 0, -1) / n, np.arange(nearest + 1) / nearest, [0, *parts[nearest].flip(0)])
        expected = last + (first - last) * torch.tensor(row)
        assert_close(theta(grids.optimal(n, schedule, t_min, **like)), expected, rtol=1e-6, atol=0)


def test_the_search_finds_equal_angles_for_ddim_on_normal_data():
    """Where they are known to be best."""
    schedule = SCHEDULES["cosine"]
    denoise = samplers.denoiser(gaussian_model(1.0, "cosine"), "x", schedule)
    z = torch.randn(20, 1, generator=torch.Generator().manual_seed(1), dtype=F64)
    part, error = grids.search(samplers.ddim, 4, denoise, z, z, schedule)
    assert part == pytest.approx([1, 0.75, 0.5, 0.25], abs=0.003)
    left = z.square().mean().item() * (1 - math.cos(math.pi / 8)**4)**2
    assert error == pytest.approx(left, rel=0.01)


@pytest.mark.parametrize("data", ["clusters", "rings"])
def test_the_grids_of_the_table_are_better_than_equal_angles(data):
    """For unipc, 8 evaluations, on other points of the rings than they were found with, and on another dataset."""
    schedule = SCHEDULES["cosine"]
    denoise = samplers.denoiser(COARSE[data].optimal_model("x", schedule), "x", schedule)
    z = torch.randn(200, 2, generator=torch.Generator().manual_seed(9), dtype=F64)
    draw = lambda grid, n: samplers.SAMPLERS["unipc"](denoise, z, samplers.GRIDS[grid](n, schedule, 1e-3, dtype=F64),
                                                      schedule, None)
    end = draw("t", 256)
    error = {grid: (draw(grid, 8) - end).square().mean() for grid in ("angle", "optimal")}
    assert error["optimal"] < 0.8 * error["angle"]


def test_the_command(capsys):
    grids.main(["--steps", "4"])
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in out[1:-1]] == [*samplers.GRIDS] and out[-1] == "cos(pi / 8)^4: 0.7286"
    with pytest.raises(SystemExit) as stop:
        grids.main(["--sampler", "sde"])
    assert stop.value.code == 2
