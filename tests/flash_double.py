"""A stand-in for the ``flash_attn`` package in plain PyTorch: for tests without a GPU.

While it is installed, transformers loads models with ``attn_implementation="flash_attention_2"``
on a CPU, in float32 too, and everything that transformers does around the kernels is exercised
for real: 2-D masks, unpadding, packed position ids, sliding windows, caches. The functions keep
to the semantics of flash-attn 2.1 and later:

- where queries and keys differ in number, the last query stands at the last key ("bottom right");
- ``window_size=(left, right)``: the query at position p sees keys p - left to p + right, both
  included, -1 is without end, and ``causal`` makes the right side 0 whatever it was;
- a query that sees no key gives zeros;
- query head h uses key head h // (query heads / key heads).

It is stricter than the package where the package would go on with garbage: sequences longer than
the ``max_seqlen`` that was stated raise, and queries outside every sequence come back as NaN.
Dropout, ALiBi, paged caches and returned probabilities are refused. One corner is as documented
and not as compiled: a window without ``causal`` where there are more queries than keys; the kernel
forgets the end of windows that are longer than the keys.

Use it around a test, or for as long as the process runs::

    with flash_double() as calls:
        model = Model.from_pretrained(path, attn_implementation="flash_attention_2")
        model(**inputs)
    assert calls[0].causal

    install_flash_double()

Both may be nested and mixed; the last that ends puts everything back. Models made before keep
their "flash_attention_2", and fail when called after. Modules that import other parts of
flash-attn when they find it, such as transformers 4.57's ModernBERT, have to be imported outside.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import PreTrainedModel, modeling_flash_attention_utils
from transformers.utils import import_utils

#: the version that the stand-in says it is
VERSION = "2.8.3"


@dataclass(frozen=True)
class FlashCall:
    """One call of a function of the double, as the function was called."""

    #: "flash_attn_func" or "flash_attn_varlen_func"
    function: str
    #: shapes: [B, queries, heads, width], or without B for sequences one behind another
    query: tuple[int, ...]
    key: tuple[int, ...]
    causal: bool
    window: tuple[int, int]
    scale: float | None = None
    softcap: float = 0.0
    cu_seqlens_q: tuple[int, ...] | None = None
    cu_seqlens_k: tuple[int, ...] | None = None
    max_seqlen_q: int | None = None
    max_seqlen_k: int | None = None

    @property
    def packed(self) -> bool:
        """Whether the sequences came one behind another."""
        return self.cu_seqlens_q is not None


_recorders: list[list[FlashCall]] = []


def _record(call: FlashCall) -> None:
    for calls in _recorders:
        calls.append(call)


# ------------------------------------------------------------------------------- attention


def visible_keys(
    queries: int, keys: int, causal: bool, window: tuple[int, int], device: Any = None
) -> Tensor:
    """bool [queries, keys]: which keys each query sees."""
    left, right = window
    if causal:
        right = 0
    at = torch.arange(queries, device=device)[:, None] + (keys - queries)
    key = torch.arange(keys, device=device)[None]
    seen = torch.ones(queries, keys, dtype=torch.bool, device=device)
    if left >= 0:
        seen = seen & (key >= at - left)
    if right >= 0:
        seen = seen & (key <= at + right)
    return seen


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool,
    window: tuple[int, int], softcap: float,
) -> Tensor:  # fmt: skip
    """Attention of q [B, queries, heads, width] to k, v [B, keys, key heads, width]."""
    precise = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[2] // k.shape[2]
    query = q.to(precise).transpose(1, 2)
    key, value = (x.to(precise).repeat_interleave(group, 2).transpose(1, 2) for x in (k, v))
    scores = query @ key.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    unseen = ~visible_keys(q.shape[1], k.shape[1], causal, window, q.device)
    # the least number and not -inf: rows that see nothing would be NaN, and so their gradients
    weights = scores.masked_fill(unseen, torch.finfo(precise).min).softmax(-1)
    return (weights.masked_fill(unseen, 0) @ value).transpose(1, 2).to(q.dtype)


def _check(q: Tensor, k: Tensor, v: Tensor, dims: int, refused: dict[str, Any]) -> None:
    """Raise what the package would raise, or what the double cannot do."""
    for name, value in refused.items():
        if value is not None and not (isinstance(value, int | float) and value == 0):
            raise NotImplementedError(f"the double of flash_attn has no {name} (={value!r})")
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == dims or k.shape != v.shape:
        raise RuntimeError(f"{shapes}: should have {dims} dimensions, k and v the same shape")
    if q.shape[-1] != k.shape[-1] or q.shape[-1] > 256:
        raise RuntimeError(f"{shapes}: heads should be equally wide, at most 256")
    if q.shape[-2] % k.shape[-2]:
        raise RuntimeError(f"{shapes}: heads of keys should divide heads of queries")
    if len({x.dtype for x in (q, k, v)}) > 1 or len({x.device for x in (q, k, v)}) > 1:
        raise RuntimeError(f"{shapes}: should have one dtype and one device")


def _bounds(name: str, cu_seqlens: Tensor, longest: int, total: int) -> list[int]:
    """Where the sequences begin and end, checked."""
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1:
        raise RuntimeError(f"cu_seqlens_{name} should be int32 [sequences + 1]: {cu_seqlens}")
    bounds = cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(bounds)]
    if not lengths or min(lengths) < 0 or bounds[0] < 0 or bounds[-1] > total:
        raise ValueError(f"cu_seqlens_{name}={bounds} should rise from 0 to at most {total}")
    if max(lengths) > longest:
        raise ValueError(f"max_seqlen_{name}={longest} is less than in cu_seqlens_{name}={bounds}")
    return bounds


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None,
    causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:  # fmt: skip
    """Attention within each row of a batch.

    Args:
        q: [B, queries, heads, width].
        k, v: [B, keys, key heads, width].
        softmax_scale: of the products; None: 1 / √width.
        causal, window_size: see :func:`visible_keys`.
        softcap: scores s become softcap · tanh(s / softcap); 0: they stay.
        dropout_p, alibi_slopes, return_attn_probs: refused if set.
        deterministic: without effect.

    Returns:
        [B, queries, heads, width].
    """
    _check(q, k, v, 4, {
        "dropout_p": dropout_p, "alibi_slopes": alibi_slopes,
        "return_attn_probs": return_attn_probs,
    })  # fmt: skip
    if q.shape[0] != k.shape[0]:
        raise RuntimeError(f"q has {q.shape[0]} rows, k {k.shape[0]}")
    _record(FlashCall(
        "flash_attn_func", tuple(q.shape), tuple(k.shape), bool(causal),
        (window_size[0], window_size[1]),
        softmax_scale, softcap,
    ))  # fmt: skip
    return _attend(q, k, v, softmax_scale, causal, window_size, softcap)


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, dropout_p: float = 0.0,
    softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, deterministic: bool = False,
    return_attn_probs: bool = False, block_table: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention within each of several sequences that come one behind another.

    Args:
        q: [queries of all, heads, width].
        k, v: [keys of all, key heads, width].
        cu_seqlens_q, cu_seqlens_k: int32 [sequences + 1]; sequence i has the queries (keys) from
            entry i up to entry i + 1.
        max_seqlen_q, max_seqlen_k: at least the length of the longest sequence.
        block_table: refused if set.

    The others are as in :func:`flash_attn_func`.

    Returns:
        [queries of all, heads, width]; NaN for queries of no sequence.
    """
    _check(q, k, v, 3, {
        "dropout_p": dropout_p, "alibi_slopes": alibi_slopes,
        "return_attn_probs": return_attn_probs, "block_table": block_table,
    })  # fmt: skip
    longest_q, longest_k = int(max_seqlen_q), int(max_seqlen_k)
    bounds_q = _bounds("q", cu_seqlens_q, longest_q, q.shape[0])
    bounds_k = _bounds("k", cu_seqlens_k, longest_k, k.shape[0])
    if len(bounds_q) != len(bounds_k):
        raise RuntimeError(f"cu_seqlens_q={bounds_q} and cu_seqlens_k={bounds_k} differ in length")
    _record(FlashCall(
        "flash_attn_varlen_func", tuple(q.shape), tuple(k.shape), bool(causal),
        (window_size[0], window_size[1]),
        softmax_scale, softcap, tuple(bounds_q), tuple(bounds_k), longest_q, longest_k,
    ))  # fmt: skip
    out = torch.full_like(q, torch.nan)
    for (q0, q1), (k0, k1) in zip(pairwise(bounds_q), pairwise(bounds_k)):
        out[q0:q1] = _attend(
            q[None, q0:q1], k[None, k0:k1], v[None, k0:k1], softmax_scale, causal, window_size,
            softcap,
        )[0]  # fmt: skip
    return out


def flash_attn_with_kvcache(*args: Any, **kwargs: Any) -> Tensor:
    """Refuses: transformers imports it, and uses it with paged caches only."""
    raise NotImplementedError("the double of flash_attn has no flash_attn_with_kvcache")


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """The tokens of a batch that its mask keeps, one behind another.

    Args:
        hidden_states: [B, L, ...].
        attention_mask: [B, L], not 0 for tokens.
        unused_mask: [B, L], not 0 for more tokens to give a place to.

    Returns:
        The tokens [tokens, ...], their indices into B · L, cu_seqlens int32 [B + 1], the length of
        the longest row, and int32 [B] how many tokens ``attention_mask`` keeps.
    """
    used = attention_mask != 0
    kept = used if unused_mask is None else used | (unused_mask != 0)
    indices = kept.flatten().nonzero()[:, 0]
    lengths = kept.sum(1)
    starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int32)
    tokens = hidden_states.flatten(0, 1)[indices]
    return tokens, indices, starts, int(lengths.max()), used.sum(1).to(torch.int32)


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Tokens [tokens, ...] put back to their ``indices`` into [batch, seqlen, ...], else zeros."""
    out = hidden_states.new_zeros(batch * seqlen, *hidden_states.shape[1:])
    out[indices.long()] = hidden_states
    return out.unflatten(0, (batch, seqlen))


# ------------------------------------------------------------------------------- installation


class _Distribution(importlib.metadata.Distribution):
    """What the metadata of an installed flash-attn would say."""

    def read_text(self, filename: str) -> str | None:
        return {
            "METADATA": f"Metadata-Version: 2.1\nName: flash_attn\nVersion: {VERSION}\n",
            "top_level.txt": "flash_attn\n",
        }.get(filename)

    def locate_file(self, path: Any) -> Path:
        return Path(path)


class _Finder(importlib.metadata.DistributionFinder):
    """Adds that metadata to what importlib finds; modules it leaves to others."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        return None

    def find_distributions(self, context: Any = None) -> Iterable[importlib.metadata.Distribution]:
        name = getattr(context, "name", None)
        if name is None or name.lower().replace("_", "-") == "flash-attn":
            yield _Distribution()


def _modules() -> dict[str, ModuleType]:
    """The modules that transformers imports, by name."""
    functions: dict[str, list[Callable[..., Any]]] = {
        "flash_attn": [flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache],
        "flash_attn.bert_padding": [pad_input, unpad_input],
    }
    modules = {}
    for name, members in functions.items():
        module = modules[name] = ModuleType(name, __doc__)
        module.__spec__ = ModuleSpec(name, None, is_package=name == "flash_attn")
        vars(module).update({function.__name__: function for function in members})
    package: Any = modules["flash_attn"]
    package.__path__, package.__version__ = [], VERSION
    package.bert_padding = modules["flash_attn.bert_padding"]
    return modules


def _forget_answers() -> None:
    """Make transformers look again what is installed."""
    for name in (
        "_package_distribution_mapping", "is_flash_attn_2_available",
        "is_flash_attn_greater_or_equal", "is_flash_attn_greater_or_equal_2_10",
    ):  # fmt: skip
        clear = getattr(getattr(import_utils, name, None), "cache_clear", None)
        if clear is not None:
            clear()


def _available(original: Callable[..., bool]) -> Callable[..., bool]:
    """``is_flash_attn_2_available`` without its question for a GPU; modules that import it
    meanwhile keep it, so it has to tell when the double is gone."""

    def is_flash_attn_2_available(*args: Any, **kwargs: Any) -> bool:
        return _users > 0 or original(*args, **kwargs)

    return is_flash_attn_2_available


def _patches() -> Iterator[Any]:
    """What has to change in transformers beside that, as context managers."""
    utils = modeling_flash_attention_utils
    for name in vars(utils):  # the functions it imported before
        if name in ("_loaded_implementation", "_flash_fn", "_flash_varlen_fn", "_pad_fn",
                    "_unpad_fn", "_flash_with_kvcache_fn", "_process_flash_kwargs_fn",
                    "_process_with_kvcache_kwargs_fn"):  # fmt: skip
            yield mock.patch.object(utils, name, None)
    available = _available(import_utils.is_flash_attn_2_available)
    for name, module in list(sys.modules.items()):  # wherever it was imported to
        if name.split(".")[0] == "transformers" and "is_flash_attn_2_available" in vars(module):
            yield mock.patch.object(module, "is_flash_attn_2_available", available)
    # weights on the CPU: refused of models that are already built (set_attn_implementation)
    if hasattr(utils, "FLASH_ATTENTION_COMPATIBILITY_MATRIX"):
        entry = utils.FLASH_ATTENTION_COMPATIBILITY_MATRIX[2]
        devices = (*entry["supported_devices"], (lambda: True, "cpu"))
        changes = {"general_availability_check": available, "supported_devices": devices}
        yield mock.patch.dict(entry, changes)
    if hasattr(PreTrainedModel, "_flash_attn_2_can_dispatch"):
        check = PreTrainedModel._flash_attn_2_can_dispatch

        def early_check(self: Any, is_init_check: bool = False) -> bool:
            return check(self, is_init_check=True)

        yield mock.patch.object(PreTrainedModel, "_flash_attn_2_can_dispatch", early_check)


_users = 0
_undo = ExitStack()


def install_flash_double() -> None:
    """Make transformers find the double until :func:`uninstall_flash_double` is called as often
    as this was."""
    global _users
    if _users > 0:
        _users += 1
        return
    with ExitStack() as stack:
        stack.callback(_forget_answers)
        hidden = {n: m for n, m in sys.modules.items() if n.split(".")[0] == "flash_attn"}
        stack.callback(sys.modules.update, hidden)
        modules = _modules()
        for name in {*hidden, *modules}:
            stack.callback(sys.modules.pop, name, None)
            sys.modules.pop(name, None)
        sys.modules.update(modules)
        finder = _Finder()
        sys.meta_path.insert(0, finder)
        stack.callback(sys.meta_path.remove, finder)
        _forget_answers()
        for patch in list(_patches()):
            stack.enter_context(patch)
        _undo.push(stack.pop_all())
    _users = 1


def uninstall_flash_double() -> None:
    """Take back one :func:`install_flash_double`; the last puts everything back."""
    global _users
    if _users == 0:
        raise RuntimeError("the double of flash_attn is not installed")
    _users -= 1
    if _users == 0:
        _undo.close()


@contextmanager
def flash_double() -> Iterator[list[FlashCall]]:
    """Make transformers find the double for a while.

    Yields:
        The calls made meanwhile, in order; clear it to look at what comes next.
    """
    calls: list[FlashCall] = []
    install_flash_double()
    _recorders.append(calls)
    try:
        yield calls
    finally:
        # by identity: lists of equal calls are equal
        _recorders[:] = [recorder for recorder in _recorders if recorder is not calls]
        uninstall_flash_double()
