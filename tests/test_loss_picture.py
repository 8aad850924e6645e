"""tools.loss_picture: an SVG of the held-out losses in metrics.jsonl."""

import json
import re
from xml.etree import ElementTree


def write_metrics(folder, losses):
    folder.mkdir(parents=True)
    lines = [{"step": 10 * i, "heldout_loss": correct, "heldout_loss_different": different}
             for i, (correct, different) in enumerate(losses)]
    (folder / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in [{"step": 5, "loss": 9}, *lines]))


def test_the_curves_have_the_points_of_the_evaluations(script, refusal, tmp_path):
    write_metrics(tmp_path / "run" / "stage1", [(2.0, 2.0), (1.0, 2.0), (0.5, 4.0)])
    write_metrics(tmp_path / "run" / "stage2", [(1.0, 3.0), (0.25, 3.5)])
    script("tools.loss_picture", "--run", tmp_path / "run", "--out", tmp_path / "losses.svg")
    text = (tmp_path / "losses.svg").read_text()
    ElementTree.fromstring(text)
    curves = [[tuple(map(float, point.split(","))) for point in points.split()]
              for points in re.findall(r'polyline points="([^"]*)"', text)]
    assert [len(points) for points in curves] == [3, 3, 2, 2]
    correct, different = curves[:2]
    assert correct[0] == different[0]  # equal losses
    assert correct[0][1] < correct[1][1] < correct[2][1]  # y grows downwards, so the loss falls
    assert abs((correct[1][1] - correct[0][1]) - (different[1][1] - different[2][1]) / 2) < 0.2
    for words in ("stage 1", "stage 2", "correct image 0.50", "different image 3.50", "step 20", "step 10"):
        assert words in text
    assert "holds no run with evaluations" in refusal("tools.loss_picture", "--run", tmp_path, "--out", "a.svg")
