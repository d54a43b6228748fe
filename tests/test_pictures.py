import torch
from PIL import Image

from simmim.pictures import GREY, draw_panels, four_panels


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
