import sys
sys.path.insert(0,'/work/main/tests')
from processes import SMALL, start
import time
def test_x(tmp_path):
    for w in ("1","2"):
        for ga, lim in (("256","256"),):
            arguments = ["--run", str(tmp_path/w), *SMALL, "--limit", "512", "--epochs", "1", "--batch-size", "1", "--grad-accum", ga, "--workers", w]
            t=time.time()
            process = start("stage1_align", arguments, tmp_path / "log", max_open_files=256)
            process.join(120)
            print(w, process.exitcode, time.time()-t, (tmp_path / "log").read_text()[-1500:])
    assert 0
