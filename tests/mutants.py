"""Does a test notice? Change one line of a formula at a time and run the tests: each of these mutants must die.

    python tests/mutants.py                # all, about half an hour on 2 cores
    python tests/mutants.py losses.py      # those of one file

Works on a copy of the project. Prints the survivors and exits with 1 if there are any, or if a line is not found once.
"""
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent

MUTANTS = [  # file, the code as it is (found exactly once), the mutant
    # The process
    ("ddpm.py", "sin(math.pi / 2 * (1 - t)).log() -", "sin(math.pi / 2 * (1 - t)).log() +"),
    ("ddpm.py", "return 2 * (torch.sin", "return (torch.sin"),
    ("ddpm.py", "return -math.pi / (torch.sin", "return -math.pi / 2 / (torch.sin"),
    ("ddpm.py", "torch.sigmoid(-self.logsnr(t)).sqrt()", "torch.sigmoid(-self.logsnr(t))"),
    ("ddpm.py", "torch.sigmoid(-self.logsnr(t)).sqrt()", "(1 - self.alpha(t)**2).sqrt()"),
    ("ddpm.py", "torch.exp(-0.5 * self.logsnr(t))", "torch.exp(-self.logsnr(t))"),
    ("ddpm.py", "self.snr(t) * self.dlogsnr(t)", "self.dlogsnr(t)"),
    ("ddpm.py", "(BETA_1 - BETA_0) * t**2 / 2).log()", "(BETA_1 - BETA_0) * t**2).log()"),
    ("ddpm.py", "BETA_0, BETA_1 = 0.1, 20.0", "BETA_0, BETA_1 = 0.1, 19.0"),
    ("ddpm.py", "beta / torch.expm1(-BETA_0", "-beta / torch.expm1(BETA_0"),
    ("ddpm.py", "torch.full_like(t, -2 * math.log", "torch.full_like(t, -math.log"),
    ("ddpm.py", "return alpha * x + sigma * eps", "return sigma * x + alpha * eps"),
    ("ddpm.py", "schedule.alpha(t) / schedule.alpha(s)", "schedule.alpha(s) / schedule.alpha(t)"),
    ("ddpm.py", "-torch.expm1(schedule.logsnr(t) - schedule.logsnr(s))",
                "-torch.expm1(schedule.logsnr(s) - schedule.logsnr(t))"),
    ("ddpm.py", "return schedule.sigma(t)**2 * one_minus", "return schedule.sigma(s)**2 * one_minus"),
    ("ddpm.py", "(schedule.sigma(s) / schedule.sigma(t))**2", "(schedule.sigma(s) / schedule.sigma(t))"),
    ("ddpm.py", "expand(schedule.alpha(s) * c, x) * x", "expand(schedule.alpha(t) * c, x) * x"),
    ("ddpm.py", "return mean, expand(schedule.sigma(s)**2 * c, z)", "return mean, expand(schedule.sigma(t)**2 * c, z)"),
    ("ddpm.py", "t_min + (1 - 2 * t_min) * torch.arange(steps + 1", "t_min + (1 - t_min) * torch.arange(steps + 1"),
    ("ddpm.py", "model(z, times[i].expand", "model(z, times[i - 1].expand"),
    ("ddpm.py", "to_x(name, y, z, alphas[i], sigmas[i]", "to_x(name, y, z, alphas[i - 1], sigmas[i - 1]"),
    ("ddpm.py", "    return x_hat\n", "    return x_hat + sigmas[0] * torch.randn_like(x_hat)\n"),   # noise at the last step
    ("ddpm.py", "    return x_hat\n", "    return mean\n"),
    ("ddpm.py", "posterior(z, x_hat, times[i - 1], times[i], schedule)",
                "posterior(z, x_hat, times[max(i - 2, 0)], times[i], schedule)"),
    ("ddpm.py", "mean + var.sqrt() *", "mean + var *"),
    ("ddpm.py", "(alphas[-1]**2 + sigmas[-1]**2).sqrt() * noise()", "sigmas[-1] * noise()"),
    ("ddpm.py", "    return x_hat\n", "    return z\n"),
    ("ddpm.py", "    if steps < 1:", "    if steps < 0:"),
    ("ddpm.py", "return -torch.expm1(schedule.logsnr(t) - schedule.logsnr(s))",
                "return 1 - torch.exp(schedule.logsnr(t) - schedule.logsnr(s))"),
    ("ddpm.py", "torch.sin(math.pi / 2 * (1 - t)) * torch", "torch.cos(math.pi / 2 * t) * torch"),
    # The targets
    ("targets.py", '"x":   lambda alpha, sigma, d: (1.0, 0.0)', '"x":   lambda alpha, sigma, d: (-1.0, 0.0)'),
    ("targets.py", '"eps": lambda alpha, sigma, d: (0.0, 1.0)', '"eps": lambda alpha, sigma, d: (0.0, -1.0)'),
    ("targets.py", "(-sigma, alpha)", "(sigma, -alpha)"),
    ("targets.py", "(-sigma, alpha)", "(sigma, alpha)"),
    ("targets.py", "(-sigma, alpha)", "(-alpha, sigma)"),
    ("targets.py", "(0.0, -sigma / (sigma**2 + d))", "(0.0, sigma / (sigma**2 + d))"),
    ("targets.py", "(0.0, -sigma / (sigma**2 + d))", "(0.0, -1 / (sigma**2 + d))"),
    ("targets.py", "(0.0, -sigma / (sigma**2 + d))", "(0.0, -sigma / (sigma + d)**2)"),
    ("targets.py", '"u":   lambda alpha, sigma, d: (-1.0, 1.0)', '"u":   lambda alpha, sigma, d: (1.0, -1.0)'),
    ("targets.py", "    return alpha * b - sigma * a\n", "    return alpha * b + sigma * a\n"),
    ("targets.py", "(b * z - sigma * y) /", "(b * z + sigma * y) /"),
    ("targets.py", "(alpha * y - a * z) /", "(a * z - alpha * y) /"),
    # The losses
    ("losses.py", "return torch.ones_like(det)", "return torch.ones_like(det) / 2"),
    ("losses.py", "return (sigma / det)**2", "return (det / sigma)**2"),
    ("losses.py", "return (sigma / det)**2", "return (sigma / det).abs()"),
    ("losses.py", "return -0.5 * dlogsnr * (alpha / det)**2", "return -dlogsnr * (alpha / det)**2"),
    ("losses.py", "return -0.5 * dlogsnr * (alpha / det)**2", "return -0.5 * dlogsnr * (sigma / det)**2"),
    ("losses.py", '"x": alpha / (sigma**3 + STABLE_D)', '"x": alpha / (sigma + STABLE_D)**3'),
    ("losses.py", '"eps": 1 / (alpha * sigma + STABLE_D)', '"eps": 1 / (alpha * sigma)'),
    ("losses.py", '"v": alpha / (sigma + STABLE_D)', '"v": sigma / (alpha + STABLE_D)'),
    ("losses.py", '"s": sigma / (alpha + STABLE_D)', '"s": sigma**2 / (alpha + STABLE_D)'),
    ("losses.py", "STABLE_D = 0.01", "STABLE_D = 0.001"),
    ("losses.py", "a * x + b * eps, weight(", "a * eps + b * x, weight("),
    ("losses.py", "return w * (y_hat - y).square().flatten(1).mean(1)",
                  "return w.mean() * (y_hat - y).square().flatten(1).mean(1)"),
    ("losses.py", "return w * (y_hat - y).square().flatten(1).mean(1)",
                  "return w * (y_hat - y).square().flatten(1).sum(1)"),
    ("losses.py", "(y_hat - y).square()", "(y_hat - y).abs()"),
    ("losses.py", "(i.to(x) - 1) / steps", "(i.to(x) - 0.5) / steps"),
    ("losses.py", "torch.expm1(schedule.logsnr(s) - schedule.logsnr(t))",
                  "torch.exp(schedule.logsnr(s) - schedule.logsnr(t))"),
    ("losses.py", "steps / 2 * snr_ratio_minus_1", "steps * snr_ratio_minus_1"),
    ("losses.py", "dtype=dtype) / shape[-1]) % 1", "dtype=dtype) / shape[-1] / 2) % 1"),
    ("losses.py", "return t_min + (1 - 2 * t_min) * u", "return t_min + (1 - t_min) * u"),
    ("losses.py", "torch.rand((*shape[:-1], 1)", "torch.rand((1,)"),
    ("losses.py", "det = targets.determinant(target, alpha, sigma, stabiliser)",
                  "det = targets.determinant(target, alpha, sigma)"),
    ("losses.py", "torch.expm1(schedule.logsnr(s) - schedule.logsnr(t))",
                  "torch.exp(schedule.logsnr(s) - schedule.logsnr(t)) - 1"),
    ("losses.py", "s = t_min + (1 - 2 * t_min)", "s = 1e-3 + (1 - 2e-3)"),
    ("losses.py", "model(z, t), z, alpha, sigma, stabiliser)", "model(z, t), z, alpha, sigma)"),
    # The data
    ("datasets2d.py", "var = alpha**2 * data_var + sigma**2", "var = data_var + sigma**2"),
    ("datasets2d.py", "-0.5 * (d0 * d0 + d1 * d1)", "-1.0 * (d0 * d0 + d1 * d1)"),
    ("datasets2d.py", "- math.log(len(self.centres))", "+ math.log(len(self.centres))"),
    ("datasets2d.py", "score.append((alpha * centre - z) / var)", "score.append((z - alpha * centre) / var)"),
    ("datasets2d.py", "centre + alpha * data_var / var * (z - alpha * centre)", "centre"),
    ("datasets2d.py", "- (b * sigma)[..., None] * score", "+ (b * sigma)[..., None] * score"),
    ("datasets2d.py", "(centres.var(0, correction=0) + std**2).sqrt()", "centres.var(0, correction=0).sqrt()"),
    ("datasets2d.py", "(centres - mean) / scale, std / scale", "(centres - mean) / scale, std * torch.ones(2)"),
    ("datasets2d.py", "+ self.std.to(noise) * noise", "+ self.std.to(noise)**2 * noise"),
    ("datasets2d.py", "dtype=torch.float64), 0.2", "dtype=torch.float64), 0.25"),
    ("datasets2d.py", "torch.tensor([0.5, 0.0]", "torch.tensor([0.4, 0.0]"),
    ("datasets2d.py", "line(1.5 * math.pi, 4.5 * math.pi, n)", "line(1.5 * math.pi, 4 * math.pi, n)"),
    ("datasets2d.py", "torch.stack([u, u.sin() - 1], 1)", "torch.stack([u, u.cos() - 1], 1)"),
    ("datasets2d.py", "noise = torch.randn(n, 2,", "noise = torch.randn(n, 1,"),
    ("datasets2d.py", "size = max(1, 2**20 // len(centres))", "size = len(z)"),
    # The pictures
    ("images.py", "x.float() / 127.5 - 1", "x.float() / 128 - 1"),
    ("images.py", "x.float() / 127.5 - 1", "x.float() / 255"),
    ("images.py", "127.5).round()", "127.5)"),
    ("images.py", ".clamp(0, 255)", ""),
    ("images.py", "x.flip(3), x)", "x.flip(2), x)"),
    ("images.py", ".to(x.device) < 0.5", ".to(x.device) < 0.6"),
    ("images.py", "torch.rand(len(x), generator", "torch.rand(1, generator"),
    ("images.py", "names = sorted(", "names = list("),
    ("images.py", "name.lower().endswith", "name.endswith"),
    ("images.py", '"I;16", "I;16L"', '"I;16L"'),
    ("images.py", ">> 8)", ">> 0)"),
    ("images.py", "        ImageOps.exif_transpose(picture, in_place=True)\n", ""),
    ("images.py", "left, top = (W - side) // 2, (H - side) // 2", "left, top = 0, (H - side) // 2"),
    ("images.py", "left, top = (W - side) // 2, (H - side) // 2", "left, top = (W - side) // 2, 0"),
    ("images.py", "side = min(H, W)", "side = max(H, W)"),
    ("images.py", "Image.Resampling.BICUBIC", "Image.Resampling.NEAREST"),
    ("images.py", ".transpose(2, 0, 1)", ".transpose(2, 1, 0)"),
    ("images.py", ".transpose(2, 0, 1)", ".transpose(2, 0, 1)[::-1]"),
    ("images.py", "map(is_grey, whole)", "map(is_grey, paths)"),
    ("images.py", "next(readable(whole, *how)", "next(readable(paths, *how)"),
    ("images.py", "torch.from_numpy(x[:n])", "torch.from_numpy(x)"),
    ("images.py", "x.permute(0, 3, 1, 2)", "x.permute(0, 3, 2, 1)"),
    ("images.py", 'train=split == "train"', "train=True"),
    ("images.py", ", antialias=True)", ")"),
    ("images.py", "n = max(1, len(whole) // 10)", "n = len(whole) // 10"),
    ("images.py", "else order[n:])", "else order)"),
    ("images.py", 'run.generator("cpu", "split")', "None"),
    ("images.py", "in sorted(order[:n]", "in (order[:n]"),
    ("images.py", "permute(2, 0, 3, 1, 4)", "permute(2, 1, 3, 0, 4)"),
    ("images.py", "rows = -(-len(x) // columns)", "rows = len(x) // columns"),
    ("images.py", "columns = min(columns, len(x))", "columns = columns"),
    ("images.py", ".permute(1, 2, 0).squeeze", ".permute(2, 1, 0).squeeze"),
    ("images.py", "to_float(x[:, c])", "to_float(x[:, 0])"),
    # The metrics
    ("metrics.py", "(len(x) - 1)", "len(x)"),
    ("metrics.py", "centred = x - x.mean(0)", "centred = x"),
    ("metrics.py", "(covariance(x) - covariance(y)).norm()", "(covariance(x) - covariance(y)).trace().abs()"),
    ("metrics.py", "(x.mean(0) - y.mean(0)).norm()", "(x.mean(0) - y.mean(0)).abs().sum()"),
    ("metrics.py", "dataset.sample(m, generator)) for", "dataset.sample(n, generator)) for"),
    # FID
    ("metrics.py", "kept = var > len(cov) * torch.finfo(cov.dtype).eps * var[-1]", "kept = var > 0"),
    ("metrics.py", "axes[:, kept] * var[kept].sqrt()", "axes[:, kept] * var[kept]"),
    ("metrics.py", "torch.linalg.svdvals(root(cov_x).T @ root(cov_y)).sum()",
                   "(root(cov_x).T @ root(cov_y)).diagonal().sum()"),
    ("metrics.py", "torch.linalg.svdvals(root(cov_x).T @ root(cov_y)).sum()", "(root(cov_x).T @ root(cov_y)).norm()"),
    ("metrics.py", "torch.linalg.svdvals(root(cov_x).T @ root(cov_y)).sum()",
                   "torch.linalg.eigvals(cov_x @ cov_y).real.clamp(min=0).sqrt().sum()"),
    ("metrics.py", "(mu_x - mu_y).square().sum() + cov_x", "(mu_x - mu_y).norm() + cov_x"),
    ("metrics.py", "cov_y.trace() - 2 * trace_root", "cov_y.trace() - trace_root"),
    ("metrics.py", "cov_x.trace() + cov_y.trace()", "2 * cov_x.trace()"),
    ("metrics.py", ".float() / 255", ".float() / 256"),
    ("metrics.py", ".float() / 255", ".float() / 127.5 - 1"),
    ("metrics.py", "model(batch)[0].mean((2, 3))", "model(batch)[0].amax((2, 3))"),
    ("metrics.py", "BLOCK_INDEX_BY_DIM[dims]]).eval()", "BLOCK_INDEX_BY_DIM[dims]])"),
    ("metrics.py", "features = features.cpu().double()", "features = features.cpu()"),
    ("metrics.py", "if n < dims:", "if n <= dims:"),
    ("metrics.py", "if n < dims:", "if n < dims - 1:"),
    ("metrics.py", "enough_pictures(len(pictures), model.dims)", "enough_pictures(len(pictures), 2)"),
    ("metrics.py", "sigma=cov.numpy(), n=n", "sigma=cov.numpy().T / n, n=n"),
    ("metrics.py", "sigma=cov.numpy(), n=n", "sigma=cov.numpy(), n=model.dims"),
    ("metrics.py", "if not Path(path).exists():", "if True:"),
    ("metrics.py", "check_hash=True", "check_hash=False"),
    ("metrics.py", "check_hash=True, weights_only=True", "check_hash=True, weights_only=False"),
    ("metrics.py", 'torch.load(weights, map_location="cpu", weights_only=True)',
                   'torch.load(weights, map_location="cpu", weights_only=False)'),
    # The network, training, sampling
    ("mlp.py", "if i < len(self.weights) - 1:", "if i < len(self.weights) - 2:"),
    ("mlp.py", "[layer.bias.detach()[None]", "[0 * layer.bias.detach()[None]"),
    # Stacks
    ("stack.py", "torch.stack([c[:batches * batch_size].unflatten(0, (batches, batch_size)) for c in members], 1).flatten(1, 2)",
                 "torch.stack([c[:batches * batch_size].unflatten(0, (batches, batch_size)) for c in members], 2).flatten(1, 2)"),
    ("stack.py", "return state[i:i + 1].detach().to(\"cpu\", copy=True) if", "return state[i:i + 1].detach() if"),
    ("stack.py", "else state.detach().to(\"cpu\", copy=True)", "else state.detach()"),
    ("stack.py", "zip(z.split(size, 1), t.split(size, 1))]", "zip(z.split(size, 1), t.roll(1, 1).split(size, 1))]"),
    ("stack.py", "return torch.cat(parts, 1).flatten(0, 1)", "return torch.cat(parts, 0).flatten(0, 1)"),
    ("stack.py", "    model.load_state_dict(weights)\n", ""),
    ("stack.py", "value.copy_(state[i][name]) if state else value.zero_()", "value.zero_()"),
    ("stack.py", "value.copy_(state[i][name]) if state else value.zero_()", "state and value.copy_(state[i][name])"),
    ("stack.py", "            c.copy_(value)\n", "            pass\n"),
    ("losses.py", "k = ((t - t_min) / (1 - 2 * t_min) * bins)", "k = (t * bins)"),
    ("losses.py", "/ zeros.scatter_add(-1, k, torch.ones_like(errors))", "* bins / errors.shape[-1]"),
    ("ddpm.py", ".rsqrt(), z)", ".sqrt(), z)"),
    ("train_points.py", "math.cos(math.pi * progress)", "math.cos(2 * math.pi * progress)"),
    ("train_points.py", "progress = (epoch * steps + i)", "progress = i"),
    ("train_points.py", 'seed, "noise", epoch)', 'seed, "noise")'),
    ("train_points.py", 'seed, "order", epoch)', 'seed, "order")'),
    ("train_points.py", "        optimizer.zero_grad()\n", ""),
    ("train_points.py", "    if states[0]:\n", "    if False:\n"),
    ("train_points.py", '        torch.manual_seed(config["seed"])\n', ""),
    ("train_points.py", "(~finite.all(0)).nonzero()", "(~finite.all(0)).nonzero()[:0]"),
    ("train_points.py", "if len(diverged) == members:", "if diverged:"),
    ("train_points.py", "                if m in diverged:\n                    continue\n", ""),
    ("train_points.py", "errors = losses.weighted_error(model(z, t), y, w)\n",
                 "errors = losses.weighted_error(model(z, t), y, w * 0 + 1) * w.mean()\n"),
    ("train_points.py", "(members, -1)).mean(1).sum().backward()", "(members, -1)).mean(1).mean().backward()"),
    ("train_points.py", "return (weights * errors[..., None]).mean(1)", "return weights.mean(1) * errors[..., None].mean(1)"),
    ("train_points.py", "transpose(0, 1).flatten(1)                 # (M, n)", "flatten(0, 1).reshape(len(weights), -1)"),
    ("train_points.py", 'x, t, eps = draws[config["seed"], config["data"]]', "x, t, eps = list(draws.values())[0]"),
    ("train_points.py", "return errors.mean(2).T,", "return errors.mean(2).flip(0).T,"),
    ("train_points.py", "inside / inside.mean() * losses", "inside * losses"),
    ("train_points.py", "t_min = max(config[\"t_min\"], JUDGED_T_MIN)", "t_min = config[\"t_min\"]"),
    ("train.py", "itertools.groupby(unfinished, key=finished)", "[(0, unfinished)]"),
    ("train.py", "if finished(run) < args.epochs)", "if True)"),
    ("losses.py", 'loss=config["loss"], schedule', 'loss="mse", schedule'),
    ("losses.py", 'stabiliser=config["stabiliser"])', "stabiliser=0.0)"),
    ("train.py", "a, b = targets.coefficients(target, alpha, sigma, stabiliser)", "a, b = targets.coefficients(target, alpha, sigma)"),
    ("train_points.py", "a * x_hat + b * eps_hat, y, torch", "a * x_hat - b * eps_hat, y, torch"),
    ("stack.py", "inputs = [c.clone() for c in inputs]", "inputs = list(inputs)"),
    ("train_points.py", 'sample_t((steps, batch_size), config["t_min"], g)', "sample_t((steps, batch_size), 1e-3, g)"),
    ("train_points.py", "sample_t((POINTS,), config[\"t_min\"], g)", "sample_t((POINTS,), 1e-3, g)"),
    ("train_points.py", 'run.generator("cpu", seed, "train")', 'run.generator("cpu", 0, "train")'),
    ("train_points.py", "train_losses.mean(0).tolist()", "train_losses[-1].tolist()"),
    ("train_points.py", 'history[-1]["seconds"] if history else 0.0', "0.0"),
    ("train.py", "                (folder / file).unlink(missing_ok=True)\n", "                pass\n"),
    ("sample.py", "metrics.floor(DATASETS[data], n, len(real)", "metrics.floor(DATASETS[data], 10_000, len(real)"),
    ("sample.py", 'last = state["history"][-1]', 'last = state["history"][0]'),
    ("sample.py", "names = [state[\"config\"][\"target\"] for state in states]", "names = [states[0][\"config\"][\"target\"] for state in states]"),
    ("sample.py", '("schedule", "t_min", "stabiliser", "width")', '("schedule", "stabiliser", "width")'),
    ("run.py", ", key=lambda path: path.stat().st_mtime", ""),
    ("run.py", "digest[:8]", "digest[:1]"),
    ("reproduce.py", "made.exists() and made.stat().st_mtime >= (", "made.exists() or made.stat().st_mtime >= ("),
    ("reproduce.py", "made.exists() and made.stat().st_mtime >= (", "False and ("),
    ("reproduce.py", "state and len(state[\"history\"]) == args.epochs for", "state for"),
    ("reproduce.py", 'return factor * (eps_hat - eps).square().mean(1)', 'return factor * (eps_hat - eps).square().sum(1)'),
    ("reproduce.py", "(0.5 * (high - low) / (1 - 2 * t_min))", "(0.5 * (high - low))"),
    ("reproduce.py", "torch.exp(-logsnr / 2)", "torch.exp(-logsnr)"),
    ("reproduce.py", "losses.over_t(e**2, t, 1e-6) - losses.over_t(e, t, 1e-6)**2", "losses.over_t(e**2, t, 1e-6)"),
    ("reproduce.py", "2 * losses.weight(\"nelbo\"", "losses.weight(\"nelbo\""),
    ("reproduce.py", 'result["log_density"] - result["log_density_data"]', 'result["log_density_data"] - result["log_density"]'),
    ("sample.py", 'stabiliser=config["stabiliser"])', "stabiliser=0.0)"),
    ("sample.py", 'max(config["t_min"], 1e-3)', "1e-3"),
    ("sample.py", 'max(config["t_min"], 1e-3)', 'config["t_min"]'),
    ("sample.py", 'ddpm.SCHEDULES[config["schedule"]]', 'ddpm.SCHEDULES["cosine"]'),
    ("run.py", "weights_only=True", "weights_only=False"),
    ("run.py", "        temporary.write_bytes(data)\n        os.replace(temporary, path)\n",
               "        path.write_bytes(data)\n"),
]


def outcome(file, old, new):
    """'killed' if a test fails on the mutant, 'SURVIVED' if all pass, 'NOT FOUND' if `old` does not stand there once."""
    text = (ROOT / file).read_text()
    if text.count(old) != 1:
        return "NOT FOUND"
    with tempfile.TemporaryDirectory() as copy:
        for source in [*ROOT.glob("*.py"), ROOT / "pytest.ini"]:
            shutil.copy(source, copy)
        shutil.copytree(ROOT / "tests", Path(copy) / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        (Path(copy) / file).write_text(text.replace(old, new))
        own = Path("tests") / f"test_{file}"                              # first: it is the likeliest to notice
        files = [own, "tests"] if (ROOT / own).exists() else ["tests"]
        result = subprocess.run([sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *files], cwd=copy,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode == 0:
        return "SURVIVED"
    first = next((line for line in result.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))), "at import")
    return "killed by " + first.split(" - ")[0].removeprefix("FAILED ").removeprefix("ERROR ")


if __name__ == "__main__":
    chosen = [m for m in MUTANTS if not sys.argv[1:] or m[0] in sys.argv[1:]]
    bad = 0
    for number, (file, old, new) in enumerate(chosen, 1):
        verdict = outcome(file, old, new)
        bad += not verdict.startswith("killed")
        print(f"{number:3d}/{len(chosen)} {file}: {old.strip()!r} -> {new.strip()!r}: {verdict}", flush=True)
    print(f"{len(chosen) - bad} of {len(chosen)} mutants killed")
    sys.exit(bad > 0)
