import numpy as np
import pytest
import torch
from PIL import Image

from simmim.pictures import GREY, draw_panels, draw_position_bias, four_panels


def test_the_four_panels():
    original, reconstruction = torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4)
    mask = torch.tensor([[[True, False], [False, False]]])
    panels = four_panels(original, reconstruction, mask)[0]
    assert torch.equal(panels[0], original[0])
    assert torch.equal(panels[2], reconstruction[0])
    hidden = torch.zeros(4, 4, dtype=torch.bool)
    hidden[:2, :2] = True
    for panel, value in ((panels[1], GREY), (panels[3], 1.0)):
        assert (panel[:, hidden] == value).all()
        assert (panel[:, ~hidden] == 0).all()


def test_any_number_of_channels_is_drawn(tmp_path):
    for channels in (1, 2, 3, 14):
        path = tmp_path / "new folder" / f"{channels}.png"
        draw_panels(torch.rand(2, 4, channels, 8, 16), path, caption="a caption")
        assert Image.open(path).format == "PNG"


def test_the_panels_show_their_images(tmp_path):
    red = torch.zeros(1, 4, 3, 8, 8)
    red[:, :, 0] = 1
    draw_panels(red, tmp_path / "red.png")
    colours = Image.open(tmp_path / "red.png").convert("RGB").getcolors(100_000)
    shares = {colour: count for count, colour in colours}
    assert shares[(255, 0, 0)] > 0.5 * sum(shares.values())


def test_grey_stays_grey(tmp_path):
    """One channel is not stretched between its own darkest and lightest pixel."""
    draw_panels(torch.full((1, 4, 1, 8, 8), 0.5), tmp_path / "grey.png")
    colours = Image.open(tmp_path / "grey.png").convert("L").getcolors(100_000)
    shares = {colour: count for count, colour in colours}
    assert shares.get(127, 0) + shares.get(128, 0) > 0.5 * sum(shares.values())


def test_titles_and_caption_are_drawn(tmp_path):
    files = set()
    for words in ({}, {"titles": "abcd"}, {"caption": "a caption"}):
        draw_panels(torch.ones(1, 4, 3, 8, 8), tmp_path / "picture.png", **words)
        files.add((tmp_path / "picture.png").read_bytes())
    assert len(files) == 3


def test_biases_of_all_windows_share_one_scale_of_colours(tmp_path):
    """The highest bias of the larger window is as bright as can be, so the smaller one's, half as high, is not."""
    small, large = torch.zeros(1, 5, 5), torch.zeros(1, 9, 9)
    small[:, 2:], large[:, 4:] = 0.5, 1.0
    path = tmp_path / "bias.png"
    draw_position_bias([small, large], path, titles="ab", trained_window=(3, 3))
    pixels = pixels_of(path)
    lowest, middle, highest = (torch.tensor(colour) for colour in ((68, 1, 84), (32, 144, 140), (253, 231, 36)))
    counts = [int(((pixels - colour).abs().amax(dim=2) <= 2).sum()) for colour in (lowest, middle, highest)]
    assert min(counts) > 2000


def test_a_square_marks_the_offsets_of_the_trained_window(tmp_path):
    """Of the 9 offsets along each axis of a window of 5, those 5 that a window of 3 has."""
    table = torch.zeros(1, 9, 9)
    table[0, 0, -1] = 1
    draw_position_bias([table], tmp_path / "bias.png", titles="a", trained_window=(3, 3))
    picture = pixels_of(tmp_path / "bias.png")
    dark = (picture - torch.tensor((68, 1, 84))).abs().amax(dim=2) <= 2
    left = int(dark.any(dim=0).nonzero().min())
    edge = dark[:, left + 2].nonzero().flatten()  # a line down the panel, which is square
    top, bottom = int(edge.min()), int(edge.max())
    middle = picture[(top + bottom) // 2, left : left + bottom - top]  # a line across it
    lines = (middle.amin(dim=1) > 150).nonzero().flatten()
    assert int(lines.max() - lines.min()) / (bottom - top) == pytest.approx(5 / 9, abs=0.03)


def pixels_of(path):
    """Integers (H, W, 3)."""
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"), dtype=np.int64))
