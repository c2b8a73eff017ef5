"""Films of sampling: what a network is given, from noise to data, as a GIF.

Read `samplers.py` first. A sampler shows its state z to the network at every evaluation; so a network that notes what
it is given, `Film.watch`, films any sampler, grid, target and schedule. z is shown divided by sqrt(alpha^2 + sigma^2),
which keeps it in sight where the noise of a schedule is up to 50.

Points are drawn as soft dots, by adding up their weights on the pixels: sixty frames of matplotlib would take longer
than the samples.

    python movie.py       # the exact denoiser of the rings: movie.gif
"""
import io

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont

import ddpm
import run

FRAMES, POINTS, LIMIT = 60, 2000, 2_000_000    # at most: frames, points of a run that are kept, bytes of a file
SECONDS, PAUSE = 3.0, 1.5                      # of the motion, and of its end
SIZE, SHADES = 300, 16                         # pixels of a panel of points, from -3 to 3; shades of its colour


def scale(schedule, t):
    """The standard deviation of z for standardised data, by which it is shown: t (...) -> (...)."""
    return (schedule.alpha(t)**2 + schedule.sigma(t)**2).sqrt()


class Film:
    """Frames of sampling in `steps` evaluations: [(t, keep(z))], on the CPU; keep says which part of z is kept."""

    def __init__(self, schedule, steps, keep=lambda z: z, frames=FRAMES - 1):
        self.schedule, self.keep, self.frames, self.calls = schedule, keep, [], 0
        self.due = {i * steps // min(steps, frames) for i in range(min(steps, frames))}

    def watch(self, model):
        """model(z, t) as a network that is filmed."""
        def watched(z, t):
            if self.calls in self.due:
                z_shown = self.keep(ddpm.standardise(z, t, self.schedule))
                self.frames.append((t[0].item(), z_shown.detach().float().cpu().clone()))
            self.calls += 1
            return model(z, t)
        return watched


def dots(x, size=SIZE):
    """Ink on the pixels of a panel, in [0, 1): points (n, D), the first two axes or one against 0 -> (size, size)."""
    x = torch.nn.functional.pad(x, (0, 1))[:, :2].double().numpy()
    place = (x * [1, -1] + 3) / 6 * size - 0.5                                     # column and row, of pixels' centres
    place = place[(np.isfinite(place) & (place > 1) & (place < size - 2)).all(1)]
    corner, ink = np.floor(place).astype(int), np.zeros((size, size))
    for column in range(-1, 3):
        for row in range(-1, 3):
            off = corner + [column, row] - place
            np.add.at(ink, (corner[:, 1] + row, corner[:, 0] + column), np.exp(-(off**2).sum(1) / 0.8))
    return 1 - np.exp(-0.9 * ink)


def canvas(panels):
    """Panels side by side, [(title, colour, points, note below)], white behind -> (H, W) of a palette, and it.

    The palette is three bytes for each of 256 numbers: SHADES from white to each panel's colour, then black.
    """
    from matplotlib import font_manager  # here: images need no font
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), 13)
    palette, picture = [], Image.new("L", (len(panels) * (SIZE + 8) + 8, SIZE + 52), 0)
    draw, black = ImageDraw.Draw(picture), SHADES * len(panels)
    draw.fontmode = "1"
    for i, (title, colour, x, note) in enumerate(panels):
        left, levels = 8 + i * (SIZE + 8), np.round(dots(x) * (SHADES - 1)).astype(np.uint8)
        picture.paste(Image.fromarray(np.where(levels > 0, levels + i * SHADES, 0).astype(np.uint8)), (left, 26))
        draw.rectangle((left - 1, 25, left + SIZE, 26 + SIZE), outline=black)
        draw.text((left + SIZE // 2, 13), title, fill=black, font=font, anchor="mm")
        draw.text((left + SIZE // 2, SIZE + 39), note, fill=black, font=font, anchor="mm")
        mix = np.linspace(0, 1, SHADES)[:, None]
        palette += np.round((1 - mix) * 255 + mix * ImageColor.getrgb(colour)).astype(int).flatten().tolist()
    return np.asarray(picture), palette + [0] * (768 - len(palette))


def gif(frames, path):
    """Write frames, images of PIL, as a GIF that loops, whole or not at all.

    Where it would be larger than LIMIT every second frame goes; the last one stays, and pauses.
    """
    while True:
        buffer, each = io.BytesIO(), min(250, max(20, round(1000 * SECONDS / len(frames))))         # ms
        frames[0].save(buffer, "gif", save_all=True, append_images=frames[1:], loop=0, optimize=False,
                       duration=[each] * (len(frames) - 1) + [round(1000 * PAUSE)])
        if buffer.tell() <= LIMIT or len(frames) <= 2:
            return run.write(path, buffer.getbuffer())
        frames = frames[::-2][::-1]


def points(frames, data, titles, colour, path, data_colour="#0072B2"):
    """The film of points, [(t, (n, D))] standardised, beside the data (n, D). titles: of the data, of the samples."""
    images = []
    for t, x in frames:
        indices, palette = canvas([(titles[0], data_colour, data[:POINTS], ""),
                                   (titles[1], colour, x, f"t = {t:.3f}")])
        images.append(Image.fromarray(indices))
        images[-1].putpalette(palette)
    gif(images, path)


def images(frames, path):
    """The film of a grid of images, [(t, (C, H, W) uint8)]; 32 colours, as noise cannot be compressed."""
    pictures = [Image.fromarray(x.permute(1, 2, 0).squeeze(2).numpy()) for _, x in frames]
    colours = pictures[-1].convert("RGB").quantize(32)           # of the end: the noise before takes the nearest
    gif([picture.convert("RGB").quantize(palette=colours, dither=Image.Dither.NONE) for picture in pictures], path)


if __name__ == "__main__":
    import samplers
    from datasets2d import DATASETS
    data, schedule = DATASETS["rings"], ddpm.SCHEDULES["cosine"]
    film = Film(schedule, 128)
    x = samplers.sample(film.watch(data.optimal_model("v", schedule)), (POINTS, 2), 128, target="v", schedule=schedule)
    points([*film.frames, (0.0, x)], data.sample(POINTS), ("rings, data", "the exact denoiser, 128 steps"), "#009E73",
           "movie.gif")
    print(f"wrote movie.gif, {len(film.frames) + 1} frames")
