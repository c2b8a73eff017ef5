"""The poster's table on images, and its guidance in two dimensions, where it is known what it samples from.

Functions of a `study.Study` return the lines of a table, functions of a Study and a path draw a figure: see RESULTS.

Not here: what the results show, which is written in results/poster/README.md for the committed runs.
"""
import reproduce_guidance
import reproduce_poster_images

RESULTS = {
    "guided": (reproduce_guidance.guided, "guided samples beside the density that they are said to have, by w and t"),
    "guided-plane": (reproduce_guidance.fig_plane, "the same in the plane: the density as shades, samples as points"),
    "guided-trained": (reproduce_guidance.trained, "guided samples of networks trained with labels beside exact ones"),
    **reproduce_poster_images.RESULTS,
}
TABLES = "guided", "guided-trained", *reproduce_poster_images.TABLES
