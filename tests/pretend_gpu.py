"""GPUs that are not there: tensors that compute on the CPU, and are on cuda:0 or cuda:1 for all that Python sees.

    with pretend_gpus() as gpus:
        train(config)          # --device cuda:1
    gpus.waits                 # Counter of "what module.py:function", wherever the host would have waited for a GPU

As on a GPU, an operation on tensors of different devices is an error, and so are NumPy's views of a GPU's memory and a
generator of another device. A copy to the host that nobody waits for (`non_blocking`, into pinned memory) happens only
when `torch.cuda.synchronize` is called for the tensor's own device; until then the memory holds NaN. A tensor that one
stream has written may be used on another one after an event, and after `record_stream`, which keeps its memory.

Not simulated: NCCL, kernels, memory, CUDA graphs, and what autocast does on a GPU but not on a CPU.
"""

import collections
import contextlib
import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NUM_GPUS = 2
READS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero")  # their result is needed


class GPUTensor(torch.Tensor):
    """A tensor whose content is in `held`, on the CPU."""

    held: Tensor
    index: int
    written: "tuple[Stream, int]"  # by which of a stream's operations
    known_to: "set[Stream]"  # the streams that keep its memory until they have used it

    @staticmethod
    def __new__(cls, real: Tensor, index: int) -> "GPUTensor":
        self = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, real.size(), strides=real.stride(), storage_offset=real.storage_offset(), dtype=real.dtype
        )
        self.held, self.index = real, index
        self.written = (STATE.stream(), STATE.stream().num_operations)
        self.known_to = {self.written[0]}
        return self

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", self.index)

    is_cuda = True  # type: ignore[assignment]
    is_cpu = False  # type: ignore[assignment]

    def __repr__(self) -> str:  # type: ignore[override]
        return f"GPUTensor({self.held!r}, device=cuda:{self.index})"

    def cpu(self, *_: Any, **__: Any) -> Tensor:
        return self.to("cpu")

    def cuda(self, *_: Any, **__: Any) -> Tensor:
        return self

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        """C++ takes this for a tensor of the CPU: a copy to the CPU must not be left to it."""
        if args and isinstance(args[0], GPUTensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if device is None or device.type == "cuda":
            index = self.index if device is None or device.index is None else device.index
            assert index == self.index, "copies between GPUs are not simulated"
            words = {key: value for key, value in kwargs.items() if key != "device"}
            rest = tuple(word for word in args if not isinstance(word, str | torch.device))
            return super().to(*rest, **words) if rest or words else self
        if device.type == "meta":
            return torch.empty_like(self.held, device="meta", dtype=dtype)
        STATE.wait("copy to the host")  # into memory that is not pinned
        return self.detach().held.to(dtype or self.dtype, copy=True)

    def record_stream(self, stream: "Stream") -> None:  # type: ignore[override]
        self.known_to.add(stream)

    def tolist(self) -> Any:
        STATE.wait("tolist")
        return self.detach().held.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"can't convert cuda:{self.index} device type tensor to numpy")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


class Stream:
    """Operations in order, and which of the other streams' operations came before the next."""

    def __init__(self, device: Any = None):
        self.session = STATE.session
        self.num_operations = 0
        self.done_before: dict[Stream, int] = {}

    def __deepcopy__(self, memo: Any) -> "Stream":  # a copied tensor is on the same stream
        return self

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: "Event") -> None:
        for stream, number in event.done.items():
            self.done_before[stream] = max(number, self.done_before.get(stream, 0))

    def wait_stream(self, other: "Stream") -> None:
        self.wait_event(other.record_event())

    def use(self, tensor: GPUTensor) -> None:
        stream, number = tensor.written
        if stream is self or stream.session is not STATE.session:  # of an earlier one is what functions keep
            return
        if number > max(self.done_before.get(stream, 0), STATE.finished.get(stream, 0)):
            raise RuntimeError("a tensor is used on a stream that has not waited for the one that writes it")
        if self not in tensor.known_to and stream is not STATE.default:
            raise RuntimeError("a tensor is used on a stream that its memory is not kept for: call record_stream")


class Event:
    done: dict[Stream, int]

    def __init__(self, enable_timing: bool = False):
        self.done = {}

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or STATE.stream()
        self.done = {**stream.done_before, stream: stream.num_operations}

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: "Event") -> float:
        return 0.0


class State:
    """What has happened, and what is still to happen, on all GPUs."""

    def __init__(self) -> None:
        self.waits: collections.Counter[str] = collections.Counter()
        self.copies: list[tuple[int, Tensor, Tensor]] = []  # to the host, that have not happened yet: GPU, to, from
        self.default: Stream
        self.current = threading.local()  # as CUDA's current device and stream: of each thread
        self.session = object()
        self.finished: dict[Stream, int] = {}  # how many of a stream's operations the host has waited for

    def stream(self, device: Any = None) -> Stream:
        return getattr(self.current, "stream", None) or self.default

    def start(self) -> None:
        self.__init__()  # type: ignore[misc]
        self.default = Stream()

    @contextlib.contextmanager
    def on_stream(self, stream: Stream) -> Iterator[None]:
        before, self.current.stream = self.stream(), stream
        yield
        self.current.stream = before

    def wait(self, what: str) -> None:
        """The host waits for the current stream."""
        stream = self.stream()
        self.finished |= {**stream.done_before, stream: stream.num_operations}
        frame: Any = sys._getframe(1)
        while frame and (module := frame.f_globals.get("__name__", "")).split(".")[0] != "uvit":
            frame = frame.f_back
        self.waits[f"{what} in {module}.{frame.f_code.co_name}" if frame else what] += 1

    def synchronize(self, device: Any = None) -> None:
        index = torch.device(device).index if device is not None else None
        index = getattr(self.current, "index", 0) if index is None else index
        for gpu, to, source in self.copies:
            if gpu == index:
                to.copy_(source)
        self.copies = [copy for copy in self.copies if copy[0] != index]

    def set_device(self, device: Any) -> None:
        self.current.index = torch.device(device).index or 0


STATE = State()


def index_of(device: Any) -> int | None:
    """Of a GPU; None: of the CPU."""
    device = torch.device(device) if isinstance(device, str) else device
    if device.type != "cuda":
        return None
    return getattr(STATE.current, "index", 0) if device.index is None else device.index


def compute(func: Any, args: Any, kwargs: Any) -> Any:
    """Check the devices of an operation, and compute it on the CPU."""
    if torch.is_inference_mode_enabled():  # a tensor that is made in it cannot become a view of one that is not
        with torch.inference_mode(False):
            return compute(func, args, kwargs)
    name = func._schema.name.split("::")[1]
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    on_gpu = [tensor for tensor in tensors if isinstance(tensor, GPUTensor)]
    on_cpu = [tensor for tensor in tensors if not isinstance(tensor, GPUTensor)]
    if not on_gpu and (kwargs.get("device") is None or index_of(kwargs["device"]) is None):
        return func(*args, **kwargs)
    index = on_gpu[0].index if on_gpu else index_of(kwargs["device"])
    check_devices(name, args, on_gpu, on_cpu)
    stream = STATE.stream()
    stream.num_operations += 1
    for tensor in on_gpu:
        stream.use(tensor)
        if name.endswith("_"):  # it may be the one that is written
            tensor.written = (stream, stream.num_operations)
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type == "cpu":
        raise RuntimeError(f"{name}: expected a 'cuda' device type for generator but found 'cpu'")
    if name in READS:
        STATE.wait(name.strip("_"))
    if name == "copy_" and on_cpu:
        return copy(args[0], args[1], non_blocking=len(args) > 2 and args[2])
    if name == "_to_copy" and not on_gpu and not is_fast(args[0], kwargs.get("non_blocking")):
        STATE.wait("copy to the GPU")
    known = {id(tensor.held): tensor for tensor in on_gpu}
    words = {key: "cpu" if key == "device" and value is not None else value for key, value in kwargs.items()}
    words.pop("pin_memory", None)
    result = func(*tree_map(held_of, args), **tree_map(held_of, words))

    def wrap(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return known.get(id(leaf)) if id(leaf) in known else GPUTensor(leaf, index)  # type: ignore[arg-type]

    return tree_map(wrap, result)


def held_of(leaf: Any) -> Any:
    return leaf.held if isinstance(leaf, GPUTensor) else leaf


def check_devices(name: str, args: Any, on_gpu: list[GPUTensor], on_cpu: list[Tensor]) -> None:
    """Numbers may be on the CPU, but not be changed there; indices too, for which a GPU waits."""
    several = len({tensor.index for tensor in on_gpu}) > 1
    strangers = [tensor for tensor in on_cpu if tensor.ndim]
    changes_cpu = (
        name.endswith("_") and bool(on_gpu) and isinstance(args[0], Tensor) and not isinstance(args[0], GPUTensor)
    )
    if name == "copy_" or not on_gpu:
        return
    if name in ("index", "index_put_", "_index_put_impl_") and isinstance(args[0], GPUTensor) and not several:
        if strangers:
            STATE.wait("copy of an index")
        return
    if several or strangers or changes_cpu:
        found = sorted({str(tensor.device) for tensor in (*on_gpu, *on_cpu)})
        shapes = [tuple(tensor.shape) for tensor in (*on_gpu, *on_cpu)]
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found {found}: {shapes}")


def is_fast(source: Tensor, non_blocking: Any) -> bool:
    """Whether the host need not wait for a copy of this tensor to a GPU."""
    return bool(non_blocking) and getattr(source, "is_pinned_here", False)


def copy(to: Tensor, source: Tensor, non_blocking: bool) -> Tensor:
    """Between the CPU and a GPU, whichever way."""
    if isinstance(to, GPUTensor):
        if not is_fast(source, non_blocking):
            STATE.wait("copy to the GPU")
        to.held.copy_(source)
    elif not non_blocking or not getattr(to, "is_pinned_here", False):
        STATE.wait("copy to the host")
        to.copy_(held_of(source))
    else:
        assert isinstance(source, GPUTensor)
        to.fill_(torch.nan if to.is_floating_point() else -1)
        STATE.copies.append((source.index, to, source.held.clone()))
    return to


class Mode(TorchDispatchMode):
    """For operations without a tensor on a GPU that make one there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


class Autocast(torch.autocast):
    """A CPU's, because the tensors are there."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any):
        super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)


def pinned(tensor: Tensor) -> Tensor:
    tensor.is_pinned_here = True  # type: ignore[attr-defined]
    return tensor


@contextlib.contextmanager
def pretend_gpus() -> Iterator[State]:
    """Two H100s, in this thread and in those that it starts."""
    STATE.start()
    torch.utils._device._device_constructors()  # remembers torch.empty, as it is before it is replaced here
    run, empty, to = threading.Thread.run, torch.empty, torch.Tensor.to

    def run_with_gpus(thread: threading.Thread) -> None:
        with Mode():
            run(thread)

    def empty_pinned(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        return pinned(empty(*args, **kwargs)) if pin_memory else empty(*args, **kwargs)

    def to_like(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`tensor.to(other)`, of which C++ would not see that the other is on a GPU."""
        if args and isinstance(args[0], GPUTensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        return to(tensor, *args, **kwargs)

    properties = SimpleNamespace(total_memory=80 * 2**30, uuid="GPU-0", multi_processor_count=132, major=9, minor=0)
    replaced: list[tuple[Any, str, Any]] = [
        (torch.cuda, "_lazy_init", lambda: None),
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "is_bf16_supported", lambda *_, **__: True),
        (torch.cuda, "device_count", lambda: NUM_GPUS),
        (torch.cuda, "current_device", lambda: getattr(STATE.current, "index", 0)),
        (torch.cuda, "set_device", STATE.set_device),
        (torch.cuda, "synchronize", STATE.synchronize),
        (torch.cuda, "max_memory_allocated", lambda *_: 0),
        (torch.cuda, "get_device_name", lambda *_: "NVIDIA H100 80GB HBM3"),
        (torch.cuda, "get_device_properties", lambda *_: properties),
        (torch.cuda, "mem_get_info", lambda *_: (78 * 2**30, 80 * 2**30)),
        (torch.cuda, "Event", Event),
        (torch.cuda, "Stream", Stream),
        (torch.cuda, "stream", STATE.on_stream),
        (torch.cuda, "current_stream", STATE.stream),
        (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        (torch.Tensor, "pin_memory", lambda tensor, *_: pinned(tensor.clone())),
        (torch.Tensor, "to", to_like),
        (torch, "empty", empty_pinned),
        (torch, "autocast", Autocast),
        (threading.Thread, "run", run_with_gpus),
    ]
    precision = torch.get_float32_matmul_precision()
    with contextlib.ExitStack() as stack:
        for owner, name, value in replaced:
            stack.enter_context(mock.patch.object(owner, name, value))
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") is then an operation to see
        try:
            with Mode():
                yield STATE
        finally:
            torch._C._set_only_lift_cpu_tensors(False)
            torch.__future__.set_overwrite_module_params_on_conversion(False)
            torch.set_float32_matmul_precision(precision)
