"""Bytes arrive where and as they lie in the file, few ahead of who asks; errors arrive, too, and threads always end."""

import random
import signal
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from wanexp.errors import CheckpointError
from wanexp.wan import reading
from wanexp.wan.architecture import WanArchitecture
from wanexp.wan.part import Part
from wanexp.wan.reading import Reader, Wanted, read_tensor
from wanexp.wan.safetensors_format import ByteRows, StoredTensor, read_header
from wanexp.wan.transformer import WanTransformer
from wanexp.wan.weights import RandomWeights, load_weights, open_weights
from wanexp.wan.write_checkpoint import write_checkpoint

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float64)
SMALL = WanArchitecture(dim=128, ffn_dim=256, num_heads=2, num_layers=3, text_dim=32, freq_dim=16)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "checkpoint reader"]


def make_file(path: Path, *, seed: int = 0, count: int = 40) -> tuple[dict, dict[str, StoredTensor]]:
    """Tensors of odd sizes and all dtypes, and where they lie in the file."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    tensors = {"scalar": torch.tensor(1.5), "empty": torch.empty(3, 0), "wide": torch.randn(3, 70_001)}
    for index in range(count):
        shape = [draw.randint(1, 67) for _ in range(draw.randint(1, 3))]
        tensors[f"t{index}"] = torch.randn(shape, generator=generator).to(DTYPES[index % len(DTYPES)])
    save_file(tensors, path)
    return tensors, read_header(path).tensors


def some_part(shape: tuple[int, ...], draw: random.Random) -> Part | None:
    if not shape or not draw.randint(0, 3):
        return None
    dim = draw.randrange(len(shape))
    start, stop = sorted(draw.randint(0, shape[dim]) for _ in range(2))
    return Part(dim, start, stop)


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    views = [tensor.cpu().reshape(-1).view(torch.uint8) for tensor in (one.contiguous(), other.contiguous())]
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(*views)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])])
@pytest.mark.parametrize("threads", [1, 3, 32])
@pytest.mark.parametrize("piece, short_row", [(7, 0), (1000, 62), (100_000, 100_000), (16 * 2**20, 2**20)])
def test_any_part_of_any_tensor(tmp_path, monkeypatch, piece, short_row, threads, device):
    monkeypatch.setattr("wanexp.wan.reading.PIECE_BYTES", piece)
    monkeypatch.setattr("wanexp.wan.safetensors_format.SHORT_ROW_BYTES", short_row)
    monkeypatch.setattr("wanexp.wan.reading.NUM_THREADS", threads)
    monkeypatch.setattr("wanexp.wan.reading.AHEAD_BYTES", 20_000)
    tensors, stored = make_file(tmp_path / "a.safetensors")
    draw = random.Random(piece + threads)
    # Pieces of a few bytes are for small tensors: larger ones would take minutes.
    names = [name for name in stored if stored[name].num_bytes < piece * 1000]
    draw.shuffle(names)
    wanted = [
        Wanted(stored[name], torch.device(device), some_part(stored[name].shape, draw)) for name in names
    ]
    with Reader(wanted) as reader:
        for name, one in zip(names, wanted, strict=True):
            tensor = reader.take(one)
            expected = one.part.cut(tensors[name]) if one.part else tensors[name]
            assert same_bytes(tensor, expected), (name, one.part)
            assert tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    if piece > 7:
        assert same_bytes(read_tensor(stored["wide"], torch.device(device)), tensors["wide"])


def test_a_part_takes_no_byte_more_than_it_has(tmp_path):
    _, stored = make_file(tmp_path / "a.safetensors")
    draw = random.Random(1)
    for tensor in stored.values():
        for _ in range(20):
            part = some_part(tensor.shape, draw)
            rows = ByteRows.of(tensor, part)
            if not rows.num_bytes:
                continue
            assert rows.num_bytes % rows.width == 0
            last = rows.offset + (rows.num_bytes // rows.width - 1) * rows.stride + rows.width
            assert tensor.offset <= rows.offset < last <= tensor.offset + tensor.num_bytes


def test_rows_that_touch_are_one():
    stored = StoredTensor(Path("a"), "a", "BF16", (6, 4, 5), 100, 240)
    assert ByteRows.of(stored) == ByteRows(stored, 100, 240, 240, 240)
    assert ByteRows.of(stored, Part(1, 0, 4)) == ByteRows(stored, 100, 240, 240, 240)
    assert ByteRows.of(stored, Part(0, 2, 4)) == ByteRows(stored, 180, 80, 80, 240)
    assert ByteRows.of(stored, Part(1, 1, 3)) == ByteRows(stored, 110, 120, 20, 40)
    assert ByteRows.of(stored, Part(2, 1, 3)) == ByteRows(stored, 102, 96, 4, 10)


def test_reads_ahead_but_not_without_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("wanexp.wan.reading.AHEAD_BYTES", 40_000)
    save_file({f"t{i:02}": torch.full((2500,), float(i)) for i in range(30)}, tmp_path / "a.safetensors")
    stored = read_header(tmp_path / "a.safetensors").tensors
    was_read, read = [0], ByteRows.read
    lock = threading.Lock()

    def counted(rows, target, start):
        read(rows, target, start)
        with lock:
            was_read[0] += len(target)

    monkeypatch.setattr(ByteRows, "read", counted)
    wanted = [Wanted(stored[name], CPU) for name in sorted(stored)]
    with Reader(wanted) as reader:
        for index, one in enumerate(wanted):
            assert reader.take(one)[0] == index
            deadline = time.monotonic() + 5
            expected = min(index + 4, 30) * 10_000
            while was_read[0] < expected and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(0.002)
            assert was_read[0] == expected


def test_idle_threads_keep_no_tensor(tmp_path):
    _, stored = make_file(tmp_path / "a.safetensors")
    with Reader([Wanted(stored["wide"], CPU), Wanted(stored["t0"], CPU)]) as reader:
        tensor = reader.take(Wanted(stored["wide"], CPU))
        reader.take(Wanted(stored["t0"], CPU))
        kept = weakref.ref(tensor)
        del tensor
        deadline = time.monotonic() + 5
        while kept() is not None and time.monotonic() < deadline:
            time.sleep(0.001)
        assert kept() is None


def test_inference_mode_of_who_asks(tmp_path):
    tensors, stored = make_file(tmp_path / "a.safetensors")
    with torch.inference_mode():
        assert same_bytes(read_tensor(stored["t0"], CPU), tensors["t0"])


# What goes wrong


@pytest.mark.parametrize("part", [None, Part(0, 1, 3), Part(1, 1, 60_000), Part(1, 100, 200)])
def test_file_that_became_shorter(tmp_path, part):
    file = tmp_path / "a.safetensors"
    _, stored = make_file(file)
    place = stored["wide"]
    with file.open("r+b") as stream:
        stream.truncate(place.offset + place.num_bytes * 2 // 3 + 10)
    with pytest.raises(CheckpointError, match=r"a\.safetensors is truncated: it ends inside wide"):
        read_tensor(place, CPU, part)


def test_file_that_is_gone_or_unreadable(tmp_path):
    file = tmp_path / "a.safetensors"
    _, stored = make_file(file)
    file.unlink()
    for part in (None, Part(1, 100, 200)):
        with pytest.raises(CheckpointError, match=r"cannot read .*a\.safetensors: No such file"):
            read_tensor(stored["wide"], CPU, part)
    file.mkdir()
    with pytest.raises(CheckpointError, match=r"cannot read .*a\.safetensors: Is a directory"):
        read_tensor(stored["wide"], CPU)


def test_an_error_comes_with_its_tensor_and_ends_the_rest(tmp_path, monkeypatch):
    tensors, stored = make_file(tmp_path / "a.safetensors")
    read = ByteRows.read

    def fails_at_t5(rows, target, start):
        if rows.stored.name == "t5":
            raise CheckpointError("t5 cannot be read")
        read(rows, target, start)

    monkeypatch.setattr(ByteRows, "read", fails_at_t5)
    wanted = [Wanted(stored[f"t{index}"], CPU) for index in range(40)]
    with pytest.raises(CheckpointError, match="t5 cannot be read"), Reader(wanted) as reader:
        for index, one in enumerate(wanted):
            assert same_bytes(reader.take(one), tensors[f"t{index}"])
    assert index == 5


def test_what_is_no_error_of_files_is_raised_as_it_is(tmp_path, monkeypatch):
    _, stored = make_file(tmp_path / "a.safetensors")
    monkeypatch.setattr(ByteRows, "read", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        read_tensor(stored["t0"], CPU)


def test_loading_reports_a_file_cut_off_under_it_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("wanexp.wan.reading.AHEAD_BYTES", 10_000)
    (file,) = write_checkpoint(RandomWeights(SMALL), tmp_path / "a.safetensors")
    (source,) = open_weights(file, SMALL)
    with torch.device("meta"):
        model = WanTransformer(SMALL)
    seen: list[str] = []

    def cut_off(name, _num_bytes):
        seen.append(name)
        if len(seen) == 20:
            with file.open("r+b") as stream:
                stream.truncate(5000)

    with pytest.raises(CheckpointError, match="truncated") as caught:
        load_weights(model, source, device_of=lambda _: "cpu", on_tensor=cut_off)
    assert "\n" not in str(caught.value)
    assert len(seen) >= 20


def test_leaving_early_does_not_read_the_rest(tmp_path, monkeypatch):
    _, stored = make_file(tmp_path / "a.safetensors")
    calls, gate, read = [], threading.Event(), ByteRows.read

    def slow(rows, target, start):
        calls.append(rows.stored.name)
        gate.wait(10)
        read(rows, target, start)

    monkeypatch.setattr(ByteRows, "read", slow)
    monkeypatch.setattr("wanexp.wan.reading.NUM_THREADS", 2)
    wanted = [Wanted(stored[f"t{index}"], CPU) for index in range(40)]

    # As Ctrl-C does it: the main thread is interrupted while it waits.
    def interrupt():
        time.sleep(0.2)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        time.sleep(0.2)
        gate.set()

    # In the background of a script Ctrl-C is ignored, and Python leaves it so.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    interrupting = threading.Thread(target=interrupt)
    interrupting.start()
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt), Reader(wanted) as reader:
        reader.take(wanted[0])
        time.sleep(10)
    assert time.monotonic() - begin < 5
    interrupting.join()
    signal.signal(signal.SIGINT, before)
    assert len(calls) == 2


def test_left_without_having_been_asked(tmp_path):
    _, stored = make_file(tmp_path / "a.safetensors")
    with Reader([Wanted(stored["wide"], CPU)]):
        pass
    with Reader([]):
        pass


def test_another_order_than_announced_is_a_mistake_of_ours(tmp_path):
    _, stored = make_file(tmp_path / "a.safetensors")
    with (
        Reader([Wanted(stored["t0"], CPU), Wanted(stored["t1"], CPU)]) as reader,
        pytest.raises(AssertionError),
    ):
        reader.take(Wanted(stored["t1"], CPU))


# On GPUs


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("layout", ["native", "fp8", "fp8_scaled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_model_on_a_gpu_is_the_one_on_the_cpu(tmp_path, monkeypatch, layout, dtype):
    monkeypatch.setattr("wanexp.wan.reading.PIECE_BYTES", 10_000)
    monkeypatch.setattr("wanexp.wan.reading.AHEAD_BYTES", 100_000)
    write_checkpoint(RandomWeights(SMALL, 3), tmp_path, layout=layout, num_shards=2)
    last = torch.device("cuda", torch.cuda.device_count() - 1)
    models = []
    for device in ("cpu", last):
        with torch.device("meta"):
            models.append(WanTransformer(SMALL, dtype=dtype))
        (source,) = open_weights(tmp_path, SMALL)
        load_weights(models[-1], source, device_of=lambda _, device=device: device)
    for name, parameter in models[1].named_parameters():
        assert parameter.device == last
        assert torch.equal(parameter.cpu(), models[0].get_parameter(name)), name


@pytest.mark.gpu
@needs_gpu
def test_memory_that_is_still_computed_with_is_not_overwritten(tmp_path, monkeypatch):
    """The caching allocator gives freed memory out again at once, ordered on the stream of who freed it only."""
    monkeypatch.setattr("wanexp.wan.reading.AHEAD_BYTES", 8 * 2**20)
    save_file({f"t{i:02}": torch.full((2**20,), float(i)) for i in range(30)}, tmp_path / "a.safetensors")
    stored = read_header(tmp_path / "a.safetensors").tensors
    wanted = [Wanted(stored[name], torch.device("cuda")) for name in sorted(stored)]
    busy, sums = torch.randn(4096, 4096, device="cuda"), []
    with Reader(wanted) as reader:
        for one in wanted:
            tensor = reader.take(one)
            for _ in range(5):
                busy @ busy  # keeps the stream behind the host
            sums.append(tensor.double().sum())
            del tensor
    assert [float(total) for total in sums] == [i * 2**20 for i in range(30)]


@pytest.mark.gpu
@needs_gpu
def test_an_error_on_the_way_to_a_gpu(tmp_path):
    file = tmp_path / "a.safetensors"
    _, stored = make_file(file)
    with file.open("r+b") as stream:
        stream.truncate(stored["wide"].offset + 10)
    with pytest.raises(CheckpointError, match="truncated"):
        read_tensor(stored["wide"], torch.device("cuda"))


def test_staging_stays_small():
    assert reading.NUM_THREADS * 2 * reading.PIECE_BYTES <= 2**28
