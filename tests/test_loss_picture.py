"""tools.loss_picture: an SVG of the losses in metrics.jsonl, also of a run that goes on."""

import json
import re
from xml.etree import ElementTree

import pytest


def write_metrics(folder, losses, more=""):
    folder.mkdir(parents=True)
    lines = [{"step": 10 * i, "heldout_loss": correct, "heldout_loss_different": different}
             for i, (correct, different) in enumerate(losses)]
    lines[1:1] = [{"step": 5, "loss": 2.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + more)


@pytest.fixture
def draw(script, tmp_path, capsys):
    """draw() returns (the SVG of tmp_path/run as a text, its curves as lists of points)."""
    def run():
        script("tools.loss_picture", "--run", tmp_path / "run")
        text = (tmp_path / "run" / "losses.svg").read_text()
        ElementTree.fromstring(text)
        return text, [[tuple(map(float, point.split(","))) for point in points.split()]
                      for points in re.findall(r'polyline points="([^"]*)"', text)]

    return run


def test_the_curves_have_the_points_of_the_losses(draw, tmp_path):
    write_metrics(tmp_path / "run" / "stage1", [(2.0, 2.0), (1.0, 2.0), (0.5, 4.0)])
    write_metrics(tmp_path / "run" / "stage2", [(1.0, 3.0), (0.25, 3.5)])
    text, curves = draw()
    assert [len(points) for points in curves] == [1, 3, 3, 1, 2, 2]
    training, correct, different = curves[:3]
    assert correct[0] == different[0]  # equal losses
    assert correct[0][1] < correct[1][1] < correct[2][1]  # y grows downwards, so the loss falls
    assert abs((correct[1][1] - correct[0][1]) - (different[1][1] - different[2][1]) / 2) < 0.2
    assert training[0][1] < correct[0][1] and correct[0][0] < training[0][0] < correct[1][0]
    for words in ("stage 1", "stage 2", "correct image: 0.500", "different image: 3.500", "step 20"):
        assert words in text


def test_an_unfinished_run_is_drawn_as_far_as_it_is(draw, tmp_path):
    write_metrics(tmp_path / "run" / "stage1", [(2.0, 2.0)], more='{"step": 10, "heldout_lo')  # being written
    (tmp_path / "run" / "stage2").mkdir()
    (tmp_path / "run" / "stage2" / "metrics.jsonl").touch()  # its first evaluation is not finished
    text, curves = draw()
    assert [len(points) for points in curves] == [1, 1, 1] and "stage 2" not in text


def test_a_loss_that_was_not_finite_is_left_out(draw, tmp_path):
    write_metrics(tmp_path / "run" / "stage1", [(None, 2.0), (1.0, None), (None, 3.0)])
    write_metrics(tmp_path / "run" / "stage2", [(None, None)])
    text, curves = draw()
    assert [len(points) for points in curves] == [1, 1, 2, 1] and "correct image: 1.000" in text


def test_what_cannot_be_drawn_or_written_is_refused_in_one_sentence(refusal, tmp_path):
    run = tmp_path / "run"
    assert "holds no losses yet" in refusal("tools.loss_picture", "--run", run)
    write_metrics(run / "stage1", [(2.0, 2.0)])
    for out in (run, tmp_path / "none" / "a.svg"):
        assert "cannot write" in refusal("tools.loss_picture", "--run", run, "--out", out)
    (run / "stage1" / "metrics.jsonl").write_text('{"step": 0, "heldout_loss": 1.0}\n{\n')
    assert "cannot read" in refusal("tools.loss_picture", "--run", run)
