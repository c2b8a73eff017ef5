"""Which settings of a run do not go together, and what to do about it, in one sentence.

Read `losses.py` first. `train.py` asks before it starts, `settings.fault` of a config that was read from a file.
"""
import torch

import ddpm
import discrete
import energy
import losses
import score_matching
import variance
from datasets2d import DATASETS

LEVELS = 50                # of noise, of the loss multi_scale where --timesteps does not say it
WITHOUT_T = dict(timesteps=None, schedule="cosine", t_density="uniform", variance="small",
                 stabiliser=0.0, t_min=1e-3)           # the settings of a score without t that it does not use


def of_images(config):
    """Is it a config, or are these arguments, of images?"""
    return config.get("kind") == "images" or "shape" in config


def score_conflict(config):
    """`conflict` of a score without t."""
    loss, sigma = config["loss"], config.get("sigma")
    if of_images(config):
        return (f"--loss {loss} is for points: of an image of D numbers exact takes D backward passes - "
                "take --loss multi_scale")
    used = [f"--{name.replace('_', '-')}" for name, of in WITHOUT_T.items() if config[name] != of]
    if config["target"] != "s":
        return f"--loss {loss} trains a score - take --target s"
    if used:
        return f"--loss {loss} has no t and does not use {', '.join(used)} - leave it out"
    if sigma is None or loss == "denoising" and not sigma:
        return f"--loss {loss} needs a noise level above 0 - take --sigma 0.1"
    return None


def mixed(args):
    """What the losses of the arguments of `train.py` do not allow in one call, in words; None if nothing."""
    scores = [loss for loss in args.loss if loss in score_matching.OBJECTIVES]
    if scores and len(scores) < len(args.loss):
        return f"--loss {scores[0]} has no t and the others have: give them a call each"
    if "multi_scale" in args.loss and set(args.loss) != {"multi_scale"} and not (args.timesteps and args.schedule):
        return (f"--loss multi_scale brings --schedule ve --timesteps {LEVELS}: give it its own call, "
                "or say these for all")
    if args.vlb_weight is not None and "hybrid" not in args.loss:
        return "--vlb-weight is of --loss hybrid alone - leave it out"
    return None


def completed(args):
    """Give the arguments of `train.py` what follows from others of them where it was not given: changes args."""
    if "multi_scale" in args.loss:
        args.timesteps, args.schedule = args.timesteps or LEVELS, args.schedule or "ve"
    if args.timesteps and args.t_min is None:              # z_0 = x where that can be
        args.t_min = discrete.smallest_t(ddpm.fixed(args.schedule or "cosine"))
    if args.kind == "images":
        return
    args.precision = "fp32" if args.precision == "auto" else args.precision
    if args.sigma is None and set(args.loss) & set(score_matching.OBJECTIVES):
        args.sigma = 0.1 if "denoising" in args.loss else 0.0
    if args.activation is None and (args.energy or set(args.loss) & set(score_matching.DERIVATIVE)):
        args.activation = "silu"


def conflict(config):
    """What in a run's settings does not go together, and what to do, in words; None if nothing.

    Of the config of a run, or of the arguments of `train.py` with one data, target and loss.
    """
    name, loss, learned = config["variance"], config["loss"], config["variance"] in variance.LEARNED
    if config.get("labels"):
        data = config["data"] if isinstance(config["data"], list) else [config["data"]]
        without = [each for each in data if each not in DATASETS or not DATASETS[each].classes]
        if without and not of_images(config):              # of images `images.labels` says it
            return f"--labels: {without[0]} has none - leave it out"
        if config["timesteps"] or config.get("energy") or config.get("sigma") is not None:
            return "--labels is for networks of continuous time, not for chains, energies or scores without t"
    if config.get("stable_targets") and (config["timesteps"] or config["schedule"] == "learned" or config.get("labels")
                                         or config.get("sigma") is not None):
        return ("--stable-targets is for networks of continuous time without labels or a learned schedule - leave it "
                "out")
    if config.get("energy") and (config["target"] not in energy.TARGETS or learned):
        return ("--energy has a gradient alone: it is for --target "
                f"{' or '.join(energy.TARGETS)}, and no learned variance - take --target s")
    if config.get("energy") and config["target"] == "s" and config["stabiliser"]:
        return "--energy is -log p of the score itself, which --stabiliser changes - leave one out"
    if config.get("precision") == "bf16" and (config.get("energy") or config.get("sigma") is not None):
        return ("--precision bf16 is too rough for derivatives of the network, which energies and scores without t "
                "have - leave it out")
    if config.get("activation") == "relu" and (config["energy"] or loss in score_matching.DERIVATIVE):
        return ("ReLU has no second derivative, and the gradient of the loss would be wrong - "
                "take --activation silu")
    if loss in score_matching.OBJECTIVES:
        return score_conflict(config)
    if config.get("sigma") is not None:
        return (f"--sigma is for --loss {', '.join(score_matching.OBJECTIVES)}, "
                f"{loss} has many noise levels - leave it out")
    if config["schedule"] == "learned" and config["timesteps"]:
        return "--schedule learned is of continuous time - leave it or --timesteps out"
    if config["schedule"] == "learned" and config["t_density"] != "uniform":
        return f"--schedule learned is a density of its own - leave it or --t-density {config['t_density']} out"
    if config["timesteps"]:
        if config["t_min"] < 1e-6 and discrete.smallest_t(ddpm.fixed(config["schedule"])) > 0:
            return (f"--t-min {config['t_min']:g} is for a schedule whose log-SNR is finite at "
                    f"t = 1, {config['schedule']}'s is not - leave it out")
        if config["t_density"] in ("logsnr", "adaptive"):
            return (f"--t-density {config['t_density']} is of continuous time - leave it or --timesteps out, "
                    "or take loss_aware")
    elif config["t_min"] < 1e-6:
        return f"--t-min must be in [1e-06, 0.49] without --timesteps, got {config['t_min']:g}"
    elif name != "small":
        return f"--variance {name} is of a discrete chain: say of how many steps, --timesteps 1000"
    if learned and loss not in losses.OF_A_CHAIN:
        return f"--variance {name} is learned, which --loss {loss} does not do - take vlb or hybrid"
    if loss == "hybrid" and not learned:
        return f"--loss hybrid learns a variance, and {name} is fixed - add --variance range"
    chain = losses.chain_of(config)
    t = chain.times[-1:] if chain else torch.tensor([config["t_min"], 0.5, 1 - config["t_min"]])
    try:
        found = losses.weight(loss, config["target"], t, ddpm.fixed(config["schedule"]), config["stabiliser"], chain)
    except ValueError as error:            # no weight for this target or schedule
        return str(error)
    if not found.isfinite().all():
        return (f"--loss {loss} has no finite weight for target {config['target']} with schedule "
                f"{config['schedule']} - take mse, or a larger --t-min")
    return None
