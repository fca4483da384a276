"""Pictures: they show what they are given, and disturb nothing."""

import base64
from io import BytesIO

import matplotlib
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from cmbook import MLP, Gaussian, NoiseRange, distance_to_truth, normal, plotting, seeded
from cmbook.networks import NCSNpp, UNet
from cmbook.networks.blocks import Attention

POINTS = torch.tensor([[0.0, 1.0], [2.0, -1.0], [0.5, 0.5]])


def found():
    world = Gaussian.isotropic([0.0, 0.0], 0.5)
    return distance_to_truth(
        world.denoiser, world, NoiseRange(), levels=5, n=50, generator=seeded(0)
    )


@pytest.fixture
def ax():
    return Figure().subplots()


@pytest.mark.parametrize(
    "draw",
    [
        lambda ax: plotting.scatter(ax, POINTS),
        lambda ax: plotting.paths(ax, POINTS.expand(4, 3, 2)),
        lambda ax: plotting.field(ax, POINTS, POINTS),
        lambda ax: plotting.distance(ax, found()),
        lambda ax: plotting.loss_curve(ax, [1, 2], [0.5, 0.25]),
        lambda ax: plotting.images(ax, torch.zeros(3, 1, 2, 2)),
    ],
    ids=["scatter", "paths", "field", "distance", "loss curve", "images"],
)
def test_a_plot_returns_the_axis_it_was_given(ax, draw):
    assert draw(ax) is ax


def test_a_scatter_puts_every_point_in_its_place(ax):
    plotting.scatter(ax, POINTS)
    assert ax.collections[0].get_offsets().tolist() == POINTS.tolist()


def test_every_path_is_one_line_through_its_points(ax):
    walked = normal(torch.empty(5, 3, 2), seeded(0)).double()
    plotting.paths(ax, walked)
    drawn = torch.stack([torch.tensor(line.get_xydata()) for line in ax.lines], 1)
    assert torch.equal(drawn, walked)


def test_arrows_keep_their_directions_and_the_long_ones_are_shortened(ax):
    plotting.field(ax, POINTS, torch.tensor([[4.0, 0.0], [0.0, -1.0], [0.0, 0.0]]))
    quiver = ax.collections[0]
    assert quiver.get_offsets().tolist() == POINTS.tolist()
    assert quiver.U.tolist() == pytest.approx([1, 0, 0])
    assert quiver.V.tolist() == pytest.approx([0, -0.5, 0])


@pytest.mark.parametrize("quantity", ["median", "rms", "off"])
def test_a_distance_is_drawn_in_percent_at_every_level_with_its_interval(ax, quantity):
    truth = found()
    plotting.distance(ax, truth, quantity)
    drawn = {line.get_label(): line.get_xydata() for line in ax.lines}
    for name in ("discretization", "network", "total"):
        interval = getattr(getattr(truth, name), quantity)
        assert drawn[name][:, 0].tolist() == truth.sigmas.tolist()
        assert drawn[name][:, 1].tolist() == pytest.approx((100 * interval.value).tolist())
    total = ax.collections[2].get_paths()[0].vertices[:, 1]  # the band of the last curve
    _, low, high = (100 * values for values in getattr(truth.total, quantity))
    assert (total.min(), total.max()) == pytest.approx((float(low.min()), float(high.max())))


def test_a_film_shows_every_frame_and_holds_the_last():
    points = POINTS * torch.linspace(1, 0, 5)[:, None, None]
    film = plotting.film(points, ["σ"] * 5, data=POINTS, seconds=1.0)
    with Image.open(BytesIO(film.gif)) as gif:
        assert gif.n_frames == 5
        durations = []
        for i in range(5):
            gif.seek(i)
            durations.append(gif.info["duration"])
    assert durations == [200, 200, 200, 200, 1000]
    shown = film._repr_mimebundle_()
    assert base64.b64decode(shown["image/gif"]) == film.gif
    assert len(shown["text/plain"]) < 100


def test_a_film_is_saved_whole(tmp_path):
    film = plotting.film(POINTS[None], ["one"])
    film.save(tmp_path / "new" / "a.gif")
    assert (tmp_path / "new" / "a.gif").read_bytes() == film.gif
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.gif"]


def test_a_strip_has_a_panel_for_each_caption():
    figure = plotting.strip(POINTS.expand(3, 3, 2), ["a", "b", "c"], data=POINTS)
    assert [ax.get_title(loc="left") or ax.get_title() for ax in figure.axes] == ["a", "b", "c"]
    assert all(len(ax.collections) == 2 for ax in figure.axes)


@pytest.mark.parametrize("draw", [plotting.film, plotting.strip])
def test_frames_without_captions_are_refused(draw):
    with pytest.raises(ValueError, match="a caption for each; got 3 and 1"):
        draw(POINTS.expand(3, 3, 2), ["a"])


def test_a_loss_curve_is_logarithmic(ax):
    plotting.loss_curve(ax, [1, 2, 3], [1.0, 0.1, 0.01])
    assert (ax.get_yscale(), ax.lines[0].get_xydata()[:, 1].tolist()) == ("log", [1.0, 0.1, 0.01])


def test_gray_images_are_ink_on_paper_one_pixel_apart(ax):
    digits = torch.tensor([1.0, 0.0, -1.0])[:, None, None, None].expand(3, 1, 1, 2)
    plotting.images(ax, digits, columns=2)
    black, gray, white = 0.0, 0.5, 1.0
    expected = [
        [black, black, white, gray, gray],
        [white, white, white, white, white],
        [white, white, white, white, white],
    ]
    assert ax.images[0].get_array().tolist() == expected


def test_color_images_keep_their_colors(ax):
    red = torch.tensor([1.0, -1.0, -1.0])[None, :, None, None].expand(1, 3, 2, 2)
    plotting.images(ax, red, columns=1)
    assert ax.images[0].get_array().tolist() == [[[1.0, 0.0, 0.0]] * 2] * 2


def test_images_beyond_the_range_are_clipped(ax):
    plotting.images(ax, torch.tensor([3.0, -3.0])[:, None, None, None], columns=2)
    assert ax.images[0].get_array().tolist() == [[0.0, 1.0, 1.0]]


def test_points_are_no_images(ax):
    with pytest.raises(ValueError, match=r"expected images .* got shape \(3, 2\)"):
        plotting.images(ax, POINTS)


def test_rows_of_images_carry_their_names():
    figure = plotting.image_rows({"a": torch.zeros(2, 1, 2, 2), "b": torch.zeros(3, 1, 2, 2)}, "t")
    assert [ax.texts[0].get_text() for ax in figure.axes] == ["a", "b"]


def test_a_sheet_of_images_shows_them_all():
    figure = plotting.sheet(torch.zeros(23, 1, 8, 8))
    assert figure.axes[0].images[0].get_array().shape == (3 * 9 - 1, 10 * 9 - 1)


def test_a_sheet_of_points_shows_them_all():
    assert len(plotting.sheet(POINTS).axes[0].collections[0].get_offsets()) == 3


def test_the_style_ends_with_its_block():
    before = dict(matplotlib.rcParams)
    with plotting.book_style():
        assert matplotlib.rcParams["axes.spines.top"] is False
    assert dict(matplotlib.rcParams) == before


def test_plots_draw_no_random_numbers(ax):
    before = torch.get_rng_state()
    plotting.scatter(ax, POINTS)
    plotting.sheet(torch.zeros(3, 1, 2, 2))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_picture_is_saved_into_a_new_folder(tmp_path):
    plotting.save(Figure(), tmp_path / "ü" / "new" / "a.png")
    assert (tmp_path / "ü" / "new" / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_failed_save_leaves_the_older_picture(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"older")

    def full(figure, file, **keywords):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(OSError, match="No space left"):
        plotting.save(Figure(), path)
    assert path.read_bytes() == b"older"


@pytest.mark.parametrize("draw", [plotting.film, plotting.strip])
def test_an_animation_of_nothing_is_refused(draw):
    with pytest.raises(ValueError, match="at least 1 frame"):
        draw(torch.zeros(0, 3, 2), [])


# ── the anatomy of a U-Net ──

NETWORKS = {
    "small": (UNet(channels=16), (1, 16, 16), None),
    "patches": (UNet(channels=16, patch=2, two_times=True, label_dropout=0.1), (3, 32, 32), 4),
    "imagenet64": (
        UNet(
            channels=192, multipliers=(1, 2, 3, 4), blocks=3, attention=(32, 16, 8),
            head_channels=64, middle=True, resample="block", time_scale=1000.0, groups="all",
        ), (3, 64, 64), 1000,
    ),
    "convolutions": (UNet(multipliers=(1, 1, 2), resample="conv"), (3, 32, 32), None),
    "ncsnpp": (NCSNpp(), (3, 32, 32), None),
    "ddpmpp": (NCSNpp(embedding="positional", taps=(1, 1), pyramid=False), (3, 32, 32), None),
}  # fmt: skip


def boxes(ax, *colors):
    return [p for p in ax.patches if p.get_facecolor() in map(matplotlib.colors.to_rgba, colors)]


@pytest.fixture(params=NETWORKS)
def drawn(request, ax):
    network, shape, classes = NETWORKS[request.param]
    with torch.device("meta"):
        net = network.build(shape, classes)
    return net, plotting.anatomy(ax, net)


def test_an_anatomy_has_a_box_for_each_layer_and_a_strip_for_each_attention(drawn):
    net, ax = drawn
    layers = [net.inlet, *net.down, *net.middle, *net.up, net.outlet]
    assert len(boxes(ax, plotting.ENDS, plotting.BLOCK, plotting.RESAMPLE)) == len(layers)
    attends = sum(isinstance(module, Attention) for module in net.modules())
    assert len(boxes(ax, plotting.ATTENTION)) == attends > 0


def test_an_anatomy_shows_channels_as_heights_and_resolutions_as_rows(drawn):
    net, ax = drawn
    blocks = [layer for layer in [*net.down, *net.middle, *net.up] if hasattr(layer, "after")]
    tall = [box for box in boxes(ax, plotting.BLOCK, plotting.RESAMPLE) if box.get_height() == 1]
    assert len(tall) >= sum(
        layer.after[-1].out_channels == max(b.after[-1].out_channels for b in blocks)
        for layer in blocks
    )
    rows = {round(box.get_y() + box.get_height() / 2, 6) for box in boxes(ax, plotting.BLOCK)}
    halvings = sum(not joins for joins in net.joins)
    assert len(rows) == halvings + 1


def test_every_bridge_of_an_anatomy_joins_two_layers_of_one_resolution(drawn):
    net, ax = drawn
    arcs = [line.get_xydata() for line in ax.lines if line.get_gid() == "bridge"]
    assert len(arcs) == sum(net.joins) == 1 + len(net.down)
    starts, ends = {arc[0, 0] for arc in arcs}, {arc[-1, 0] for arc in arcs}
    assert starts == set(range(1 + len(net.down)))
    assert ends == {1 + len(net.down) + 2 + i for i, joins in enumerate(net.joins) if joins}
    assert all(arc[0, 1] == arc[-1, 1] < arc[1, 1] for arc in arcs)


def test_the_image_is_shown_to_each_smaller_resolution_of_ncsnpp_alone(drawn):
    net, ax = drawn
    shown = sum(line.get_gid() == "shown" for line in ax.lines)
    assert shown == len(getattr(net, "pyramid", []))


def test_an_anatomy_leaves_the_network_as_it_was(ax):
    net = UNet(channels=16).build((1, 16, 16))
    before = {name: w.clone() for name, w in net.state_dict().items()}
    plotting.anatomy(ax, net)
    assert not any(module._forward_hooks for module in net.modules())
    assert all(torch.equal(w, before[name]) for name, w in net.state_dict().items())


def test_only_a_u_net_has_an_anatomy(ax):
    with pytest.raises(ValueError, match="only a U-Net can be drawn so; got MLPModule"):
        plotting.anatomy(ax, MLP().build((2,)))
