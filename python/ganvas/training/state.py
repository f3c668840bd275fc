"""Nested training state as named tensors plus JSON, so that it can be stored without pickle.

Optimisers, schedules and generators describe themselves as dicts, lists, tuples, numbers and tensors. Tensors go into
one flat dict (for safetensors); the rest becomes JSON in which ``{"$": kind, ...}`` stands for what JSON lacks: a
tensor, a tuple, a dict with keys that are no strings, NaN and infinities.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

_MARK = "$"


def flatten(tree: Any) -> tuple[dict[str, Tensor], Any]:
    """(tensors by path, JSON tree) of nested dicts, lists, tuples, tensors, strings, numbers, booleans and None.

    The tensors are on the CPU, contiguous, and share no memory with the originals.

    Raises:
        TypeError: something else is in the tree; the message names its path.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _encode(tree, "", tensors)


def unflatten(tensors: dict[str, Tensor], tree: Any) -> Any:
    """The inverse of :func:`flatten`; tensors stay on the CPU and have the memory format they had."""
    if isinstance(tree, list):
        return [unflatten(tensors, item) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if _MARK not in tree:
        return {key: unflatten(tensors, value) for key, value in tree.items()}
    return _DECODERS[tree[_MARK]](tensors, tree)


def _encode(node: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(node, Tensor):
        return _encode_tensor(node, path, tensors)
    if isinstance(node, dict):
        return _encode_dict(node, path, tensors)
    if isinstance(node, (list, tuple)):
        items = [_encode(item, f"{path}/{index}", tensors) for index, item in enumerate(node)]
        return items if isinstance(node, list) else {_MARK: "tuple", "items": items}
    if isinstance(node, float) and not math.isfinite(node):
        return {_MARK: "float", "value": str(node)}
    if node is None or isinstance(node, (bool, int, float, str)):
        return node
    raise TypeError(f"training state must be made of tensors and plain values; {path or 'it'} is {type(node).__name__}")


def _encode_tensor(tensor: Tensor, path: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    name = path.removeprefix("/")
    # contiguous() alone would return the tensor itself: clone, since training writes on into the original.
    tensors[name] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    # A fused optimiser walks parameter and state in step, so the state must come back in the layout of its parameter.
    channels_last = tensor.dim() == 4 and not tensor.is_contiguous() and _is_channels_last(tensor)
    return {_MARK: "tensor", "name": name, **({"channels_last": True} if channels_last else {})}


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last)


def _encode_dict(node: dict, path: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    if all(isinstance(key, str) and key != _MARK for key in node):
        return {key: _encode(value, f"{path}/{key}", tensors) for key, value in node.items()}
    items = [
        [_encode(key, f"{path}/(key)", tensors), _encode(value, f"{path}/{key}", tensors)]
        for key, value in node.items()
    ]
    return {_MARK: "dict", "items": items}


def _decode_tensor(tensors: dict[str, Tensor], tree: dict) -> Tensor:
    tensor = tensors[tree["name"]]
    return tensor.contiguous(memory_format=torch.channels_last) if tree.get("channels_last") else tensor


_DECODERS = {
    "tensor": _decode_tensor,
    "tuple": lambda tensors, tree: tuple(unflatten(tensors, tree["items"])),
    "dict": lambda tensors, tree: {unflatten(tensors, k): unflatten(tensors, v) for k, v in tree["items"]},
    "float": lambda tensors, tree: float(tree["value"]),
}
