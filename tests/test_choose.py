"""The choice of a dense kernel by what was measured: by kernels and a clock of the tests' own, and on a GPU."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from diffaccel import Accel, Run, kernel
from diffaccel.kernel import choose, pick
from diffaccel.kernel.choose import MOST_OPERATIONS, Choice, Size, Table, size_of

ROOT = Path(__file__).resolve().parent.parent
SIZE = Size(torch.bfloat16, 4096, 32768, 12, 128)
KERNELS = [SimpleNamespace(name=name) for name in ("fa3", "sdpa", "fa4")]


def clock(asked=(), **times):
    """Milliseconds by name; what is asked for is noted."""

    def timer(kernel, size):
        asked.append((kernel.name, size))
        return times[kernel.name]

    return timer


def never(kernel, size):
    raise AssertionError(f"{kernel.name} was measured")


def test_the_fastest_is_chosen_and_the_report_says_why(tmp_path):
    found = Table(tmp_path / "k.json", "H100").choose(KERNELS, SIZE, clock([], fa3=1.822, sdpa=1.51, fa4=2.0))
    assert found == Choice("sdpa", "sdpa: 1.51 ms, fa3 1.82 ms, fa4 2 ms at 4096 x 32768 x 12 x 128 in bfloat16")


@pytest.mark.parametrize(("sdpa", "best"), [(1.51, "fa3"), (1.48, "fa3"), (1.44, "sdpa")])
def test_the_preferred_kernel_gives_way_to_more_than_noise(tmp_path, sdpa, best):
    found = Table(tmp_path / "k.json", "H100").choose(KERNELS[:2], SIZE, clock([], fa3=1.5, sdpa=sdpa))
    assert found.kernel == best


def test_a_kernel_that_fails_is_never_chosen(tmp_path):
    table = Table(tmp_path / "k.json", "H100")
    found = table.choose(KERNELS[:2], SIZE, clock([], fa3=float("inf"), sdpa=9.0))
    assert found == Choice("sdpa", "sdpa: 9 ms, fa3 failed at 4096 x 32768 x 12 x 128 in bfloat16")
    assert Table(tmp_path / "k.json", "H100").choose(KERNELS[:2], SIZE, never) == found


def test_what_is_on_disk_is_not_measured_again(tmp_path):
    path, asked = tmp_path / "new" / "folder" / "k.json", []
    first = Table(path, "H100").choose(KERNELS[:2], SIZE, clock(asked, fa3=1.0, sdpa=0.5))
    assert asked == [("fa3", SIZE), ("sdpa", SIZE)]
    again = Table(path, "H100")
    assert again.choose(KERNELS[:2], SIZE, never) == first
    assert again.choose(KERNELS[:1], SIZE, never).kernel == "fa3"  # of those that are usable now
    assert list(path.parent.iterdir()) == [path]
    # another size, one more kernel, other versions: measured, all of them beside each other
    other = SIZE._replace(keys=1024)
    for table, kernels, size in (
        (again, KERNELS[:2], other),
        (again, KERNELS, SIZE),
        (Table(path, "new"), KERNELS[:2], SIZE),
    ):
        asked.clear()
        table.choose(kernels, size, clock(asked, fa3=3.0, sdpa=1.0, fa4=2.0))
        assert asked == [(one.name, size) for one in kernels]
    content = json.loads(path.read_text())
    assert set(content) == {"H100", "new"}
    assert content["H100"][str(SIZE)] == {"fa3": 3.0, "sdpa": 1.0, "fa4": 2.0}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"H100": 3}', '{"H100": {"x": {"fa3": "fast"}}}', "\0"])
def test_a_corrupt_file_is_measured_again(tmp_path, text):
    path = tmp_path / "k.json"
    path.write_text(text)
    with pytest.warns(UserWarning, match="k.json' could not be read .*: kernels are measured again"):
        table = Table(path, "H100")
    with pytest.warns(UserWarning, match="could not be read"):
        assert table.choose(KERNELS[:2], SIZE, clock([], fa3=2.0, sdpa=1.0)).kernel == "sdpa"
    assert Table(path, "H100").choose(KERNELS[:2], SIZE, never).kernel == "sdpa"


def test_a_folder_that_cannot_be_written_costs_only_time(tmp_path):
    (tmp_path / "file").write_text("")
    table = Table(tmp_path / "file" / "k.json", "H100")
    with pytest.warns(UserWarning, match="set DIFFACCEL_CACHE to a folder that can be written"):
        table.choose(KERNELS[:2], SIZE, clock([], fa3=2.0, sdpa=1.0))
    assert table.choose(KERNELS[:2], SIZE, never).kernel == "sdpa"


def test_processes_that_write_at_once_leave_a_whole_file(tmp_path):
    path = tmp_path / "k.json"
    code = (
        "import sys, torch; from pathlib import Path; from diffaccel.kernel.choose import Size, Table\n"
        "table = Table(Path(sys.argv[1]), sys.argv[2])\n"
        "for n in range(60): table.keep(Size(torch.half, n, 1, 1, 8), {'sdpa': n})\n"
    )
    writers = [
        subprocess.Popen([sys.executable, "-W", "error", "-c", code, str(path), name], cwd=ROOT, stderr=subprocess.PIPE)
        for name in ("one", "two")
    ]
    said = [writer.communicate()[1] for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0], said
    content = json.loads(path.read_text())
    assert set(content) <= {"one", "two"}
    assert max(map(len, content.values())) == 60


def test_old_environments_are_forgotten(tmp_path):
    path = tmp_path / "k.json"
    for number in range(20):
        Table(path, f"GPU {number}").keep(SIZE, {"sdpa": 1.0})
    assert list(json.loads(path.read_text())) == [f"GPU {number}" for number in range(4, 20)]


def test_there_are_few_sizes_and_none_is_much_work():
    sizes = set()
    for queries in (1, 3, 100, 1170, 4680, 32760, 131040):
        for keys in (0, 7, 512, 4680, 32760, 131040, 10**6):
            for heads in (1, 12, 40, 200):
                size = size_of(torch.empty(2, queries, heads, 128, device="meta"), keys)
                assert 4 * size.queries * size.keys * size.lanes * size.head_dim <= MOST_OPERATIONS
                sizes.add(size)
    assert len({size._replace(lanes=0) for size in sizes}) < 40
    assert size_of(torch.empty(1, 4321, 12, 128, dtype=torch.bfloat16, device="meta"), 32760) == SIZE
    assert str(SIZE) == "4096 x 32768 x 12 x 128 in bfloat16"


def test_where_the_file_lies(monkeypatch, tmp_path):
    monkeypatch.delenv("DIFFACCEL_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert choose.cache_folder() == Path.home() / ".cache" / "diffaccel"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert choose.cache_folder() == tmp_path / "diffaccel"
    monkeypatch.setenv("DIFFACCEL_CACHE", str(tmp_path / "own"))
    assert choose.cache_folder() == tmp_path / "own"


def test_nothing_is_measured_on_a_cpu(monkeypatch):
    monkeypatch.setattr(choose, "milliseconds", never)
    assert pick("auto", torch.device("cpu"), torch.float32, 128, SIZE) == Choice("sdpa", "")
    assert pick("reference", torch.device("cpu"), torch.float32, 128, SIZE) == Choice("reference", "")
    assert pick("auto", torch.device("meta"), torch.float32, 128, SIZE) == Choice("reference", "")


@pytest.fixture
def a_gpu(monkeypatch, tmp_path):
    """As if there were one with FA3 and cuDNN, where cuDNN is the faster."""
    cuda = torch.device("cuda")
    monkeypatch.setenv("DIFFACCEL_CACHE", str(tmp_path))
    monkeypatch.setattr(kernel.fa3, "unusable", lambda *_: None)
    monkeypatch.setattr(kernel.fa4, "unusable", lambda *_: "none")
    monkeypatch.setattr(kernel.xformers, "unusable", lambda *_: "none")
    monkeypatch.setattr(choose, "_environment", lambda _: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(choose, "milliseconds", lambda kernel, size, device: {"fa3": 2.0, "sdpa": 1.0}[kernel.name])
    choose._table.cache_clear()
    yield cuda
    choose._table.cache_clear()


def test_auto_is_what_was_measured(a_gpu, tmp_path):
    assert pick("auto", a_gpu, torch.bfloat16, 128) == Choice("fa3", "")  # of no size that is known
    assert pick("auto", a_gpu, torch.bfloat16, 128, SIZE).kernel == "sdpa"
    assert json.loads((tmp_path / "kernels.json").read_text()) == {"a GPU": {str(SIZE): {"fa3": 2.0, "sdpa": 1.0}}}
    assert kernel.resolve("auto", a_gpu, torch.bfloat16, 128, SIZE) is kernel.sdpa


def test_a_run_chooses_by_size_and_reports_why(monkeypatch):
    asked = []

    def found(wanted, device, dtype, head_dim, size):
        asked.append((wanted, size.queries, size.keys))
        name = "sdpa" if size.keys > 100 else "reference"
        return Choice(name, f"{name}: 1 ms at {size}")

    monkeypatch.setattr(kernel, "pick", found)
    run, q = Run(Accel(), causal=False), torch.randn(1, 64, 2, 8)
    assert run.kernel_for(q, 500) is run.kernel_for(q[:, 1:], 520) is kernel.sdpa
    assert run.kernel_for(q, 16) is kernel.reference
    assert asked == [("auto", 64, 512), ("auto", 64, 16)]
    large, small = "sdpa: 1 ms at 64 x 512 x 2 x 8 in float32", "reference: 1 ms at 64 x 16 x 2 x 8 in float32"
    assert run.report().kernel == f"reference, sdpa; {large}"
    assert run.report().choices == [small, large]


def test_small_calls_are_not_worth_a_measurement(a_gpu, monkeypatch):
    monkeypatch.setattr(choose, "milliseconds", never)
    size = Size(torch.bfloat16, 192, 2048, 4, 64)
    assert size.operations < choose.LEAST_OPERATIONS < SIZE.operations
    assert pick("auto", a_gpu, torch.bfloat16, 64, size) == Choice("fa3", "")


@pytest.mark.parametrize("where", ["captured", "traced", "full"])
def test_where_nothing_can_be_measured_the_preferred_one_runs(a_gpu, monkeypatch, where):
    def full(*_):
        raise torch.cuda.OutOfMemoryError

    if where == "captured":
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    elif where == "traced":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(choose, "milliseconds", full if where == "full" else never)
    found = pick("auto", a_gpu, torch.bfloat16, 128, SIZE)
    assert found.kernel == "fa3"
    assert found.why.startswith("fa3: not measured at 4096 x 32768 x 12 x 128")


@pytest.mark.gpu
def test_a_gpu_measures_quickly_and_once(monkeypatch, tmp_path):
    cuda = torch.device("cuda")
    monkeypatch.setenv("DIFFACCEL_CACHE", str(tmp_path))
    usable = [one for one in kernel.EXACT if one.unusable(cuda, torch.bfloat16, 128) is None]
    if len(usable) < 2:
        pytest.skip("only one exact kernel can run here")
    first = pick("auto", cuda, torch.bfloat16, 128, SIZE)
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    for one in usable:  # compiled by now
        choose.milliseconds(one, SIZE, cuda)
    ended.record()
    ended.synchronize()
    assert began.elapsed_time(ended) < 50
    monkeypatch.setattr(choose, "milliseconds", never)
    assert pick("auto", cuda, torch.bfloat16, 128, SIZE) == first
    assert first.why.startswith(f"{first.kernel}: ")


@pytest.mark.gpu
def test_a_kernel_that_raises_is_said_to(monkeypatch):
    def partial(*_, **__):
        raise RuntimeError("no such instruction")

    with pytest.warns(UserWarning, match="kernel fa9 fails at .* and is not chosen: no such instruction"):
        found = choose.milliseconds(SimpleNamespace(name="fa9", partial=partial), SIZE, torch.device("cuda"))
    assert found == float("inf")
