"""How the networks of the study are trained: options of train.py, and which losses. `study.Study.trained` takes them.

Not here: the tables and figures of each (`reproduce.py`).
"""
import ddpm

MUON = ["--optimizer", "muon", "--precision", "bf16"]
FAST, FAST_EPOCHS = [*MUON, "--stable-targets", "--t-density", "loss_aware"], 15
# What `fast` was chosen from, each with the thesis's t and stabiliser: epochs, options
SWEEP = {
    "thesis":    (100, []),
    "adam":      (25, []),
    "adam-lr2":  (25, ["--lr", "2e-3"]),
    "adam-lr4":  (25, ["--lr", "4e-3"]),
    "adam-ema":  (25, ["--lr", "2e-3", "--ema", "0.999"]),
    "adam-256":  (25, ["--lr", "2e-3", "--batch-size", "256"]),
    "adam-bf16": (50, ["--lr", "2e-3", "--precision", "bf16"]),
    "muon":      (15, ["--optimizer", "muon"]),
    "muon-1024": (15, ["--optimizer", "muon", "--batch-size", "1024"]),
    "muon-ema":  (30, [*MUON, "--batch-size", "1024", "--ema", "0.999"]),
    "muon-bf16": (30, [*MUON, "--batch-size", "1024"]),
    "adam-stable":  (25, ["--lr", "2e-3", "--stable-targets"]),
    "muon-aware":   (15, [*MUON, "--t-density", "loss_aware"]),
    "muon-stable":  (15, [*MUON, "--stable-targets"]),
    "fast":         (FAST_EPOCHS, FAST),
}
THESIS = ["--t-min", "1e-6", "--stabiliser", "0.01"]
CHAIN, CHAINS = ["--schedule", "ddpm", "--timesteps", "1000"], [10, 30, 100, 1000]
# How networks are trained, and with which losses: the thesis's t and stabiliser (ERRATA.md entry 8), or exact weights.
RECIPES = {
    "stabilised": (THESIS, ["mse", "nelbo_stable"]),
    "exact":      ([], ["nelbo"]),
    "plain":      ([], ["mse"]),
    "logsnr":     (["--t-density", "logsnr"], ["nelbo"]),
    "adaptive":   (["--t-density", "adaptive"], ["nelbo"]),
    "loss-aware": (["--t-density", "loss_aware"], ["nelbo"]),
    "learned":    (["--schedule", "learned"], ["nelbo"]),
    **{f"schedule-{name}": (["--schedule", name], ["mse"]) for name in ddpm.SCHEDULES},
    # Foundations: Ho et al.'s chain; then Nichol and Dhariwal's in T steps
    **{f"chain-{name}": ([*CHAIN, "--variance", name], names) for name, names in {
        "small": ["mse", "vlb"], "direct": ["vlb"], "log": ["vlb", "hybrid"], "range": ["hybrid", "vlb"]}.items()},
    "chain-range-aware": ([*CHAIN, "--variance", "range", "--t-density", "loss_aware"], ["vlb"]),
    **{f"chain-range-{weight}": ([*CHAIN, "--variance", "range", "--vlb-weight", weight], ["hybrid"])
       for weight in ("1e-6", "1")},
    **{f"steps-{T}-{name}": (["--schedule", "iddpm", "--timesteps", str(T), "--variance", name], [loss])
       for T in CHAINS for name, loss in (("small", "mse"), ("log", "hybrid"), ("range", "hybrid"))},
    # Slides: scores without t, of many noise levels, and what energies are compared with
    "score-0": (["--sigma", "0"], ["exact", "sliced"]),
    "score-0.1": (["--sigma", "0.1", "--activation", "silu"], ["denoising"]),
    "multi-scale": (["--schedule", "ve", "--timesteps", "50", "--activation", "silu"], ["multi_scale"]),
    "silu": (["--activation", "silu"], ["mse"]),
    "energy": (["--energy"], ["mse"]),
    # VDM: any target in the loss space of any, and the weights of log-SNR, the same for all targets
    "spaces": ([], ["rescaled", "simple", "v_space", "u_space", "s_space"]),
    "embedded": (["--width", "256", "--stack", "3"], ["rescaled", "simple", "v_space"]),
    "weightings": ([], ["nelbo", "sigmoid", "min_snr", "p2", "edm", "edm_monotonic"]),
    "side-by-side": (THESIS, ["mse", "nelbo_stable"]),     # as stabilised, trained again for times under one load
    **{f"sweep-{name}": ([*THESIS, *options], ["mse", "nelbo_stable"]) for name, (_, options) in SWEEP.items()},
    # Poster: guidance
    "labels": (["--labels"], ["mse"]),
}


def fast(options):
    """Options of the fast recipe and, over them, a recipe's own; stable targets where `conflicts.py` allows them."""
    return (MUON if {"--timesteps", "--labels", "--sigma", "learned"} & {*options} else FAST) + options
