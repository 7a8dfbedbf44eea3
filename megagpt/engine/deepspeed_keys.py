"""What DeepSpeed knows: every key of its JSON, read from DeepSpeed itself, as plain data.

Sections that are pydantic models are described by their fields. For the others DeepSpeedConfig is built
on a dictionary that notes which keys it is asked for, and with what default.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import deepspeed
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.compile.config import CompileConfig
from deepspeed.inference.config import WeightQuantConfig
from deepspeed.monitor.config import DeepSpeedMonitorConfig
from deepspeed.runtime import config as ds
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.tensor_parallel.config import TPTrainingConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig
from pydantic import BaseModel, PydanticSchemaGenerationError, TypeAdapter
from pydantic.errors import PydanticInvalidForJsonSchema

Node = dict[str, Any]

_MODELS: Mapping[str, type[BaseModel]] = {
    "zero_optimization": DeepSpeedZeroConfig,
    "bf16": DeepSpeedBF16Config,
    "fp16": DeepSpeedFP16Config,
    "comms_logger": CommsLoggerConfig,
    "compile": CompileConfig,
    "hybrid_engine": ds.HybridEngineConfig,
    "tensor_parallel": TPTrainingConfig,
    "weight_quantization": WeightQuantConfig,
}
# Read by deepspeed.initialize and by the pipeline's engine, past DeepSpeedConfig (0.19.8).
_READ_ELSEWHERE = ("sequence_parallel_size", "data_parallel_size", "pipeline.use_reentrant")
# What the resolver itself computes with must have the right type, and DeepSpeed gives these no default.
_TYPES: Mapping[str, Node] = {
    "train_batch_size": {"type": "integer", "minimum": 1},
    "train_micro_batch_size_per_gpu": {"type": "integer", "minimum": 1},
    "gradient_accumulation_steps": {"type": "integer", "minimum": 1},
    "gradient_clipping": {"type": "number", "minimum": 0},
    "sequence_parallel_size": {"type": "integer", "minimum": 1},
    "activation_checkpointing.number_checkpoints": {"type": "integer", "minimum": 1},
    "pipeline.stages": {"type": "integer", "minimum": 1},
}
_SPIED = ("activation_checkpointing", "aio", "checkpoint", "data_types", "flops_profiler", "timers", "torch_autocast")
_OPAQUE = ("autotuning", "data_efficiency", "datastates_ckpt", "expert_parallel")  # refused where switched on


class _Spy(dict[str, Any]):
    """A dictionary that notes, per section, each key it is asked for and the default given with it."""

    def __init__(self, values: Mapping[str, Any], section: str, seen: dict[str, Node]) -> None:
        super().__init__(values)
        self._section, self._seen = section, seen

    def _note(self, key: str, default: Any) -> None:
        names = {bool: "boolean", int: "integer", float: "number"}
        node = {"type": names[type(default)]} if type(default) in names else {}
        if self._section not in _OPAQUE and key not in _OPAQUE:
            self._seen.setdefault(f"{self._section}.{key}".lstrip("."), node)

    def get(self, key: str, default: Any = None) -> Any:
        self._note(key, default)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self._note(str(key), None)
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self._note(key, None)
        return super().__getitem__(key)

    def keys(self) -> Any:  # DeepSpeed writes `key in d.keys()`
        return self

    def __copy__(self) -> _Spy:
        return self


def known_keys() -> Node:
    """DeepSpeed's keys as nested {"properties": {name: node}}.

    A leaf is a JSON schema ({} where DeepSpeed names no type); "removed" marks keys that DeepSpeed
    refuses, "deprecated" carries the name to write instead.
    """
    root: Node = {"properties": {}}
    for key, node in _spied().items():
        _put(root, key, node)
    for key in _READ_ELSEWHERE:
        _put(root, key, {})
    for name, model in _MODELS.items():
        _put(root, name, _section(model))
    for name, info in DeepSpeedMonitorConfig.model_fields.items():
        _put(root, name, _section(info.annotation))
    _put(root, "timers.throughput", _section(DeepSpeedThroughputTimerConfig))
    for name in ds.get_pipeline_config({}):
        _put(root, f"pipeline.{name}", {})
    for key, node in _TYPES.items():
        _put(root, key, node)
    for key in _OPAQUE:
        _put(root, key, {})
    _put(root, "bfloat16", {"deprecated": "bf16"})
    for key in getattr(ds, "_REMOVED_TOP_LEVEL_CONFIG_KEYS", {}):
        _put(root, key, {"removed": True})
    for key in getattr(ds, "_REMOVED_ZERO_CONFIG_KEYS", {}):
        _put(root, f"zero_optimization.{key}", {"removed": True})
    return root


def _spied() -> dict[str, Node]:
    seen: dict[str, Node] = {}
    top = _Spy({"train_micro_batch_size_per_gpu": 1}, "", seen)  # holds in a world of any size
    for name in (*_SPIED, *_OPAQUE):
        top[name] = _Spy({}, name, seen)
    top["checkpoint"]["writer"] = _Spy({}, "checkpoint.writer", seen)
    top["checkpoint"]["parallel_write"] = _Spy({}, "checkpoint.parallel_write", seen)
    top["optimizer"] = _Spy({"type": "AdamW"}, "optimizer", seen)
    top["scheduler"] = _Spy({"type": "WarmupDecayLR"}, "scheduler", seen)
    ds.DeepSpeedConfig(top)
    return seen


def _put(root: Node, key: str, node: Node) -> None:
    """Place a node; a section keeps the keys that it has already."""
    *sections, name = key.split(".")
    inner = root
    for section in sections:
        inner = inner["properties"].setdefault(section, {})
        inner.setdefault("properties", {})
    inner["properties"][name] = {**inner["properties"].get(name, {}), **node}


def _section(model: type[BaseModel]) -> Node:
    """The fields of a pydantic model, under every name that it accepts."""
    properties: Node = {}
    for name, info in model.model_fields.items():
        node = _field(info.annotation, info.metadata)
        extra = info.json_schema_extra
        if isinstance(extra, dict) and extra.get("deprecated"):
            node["deprecated"] = extra.get("new_param", "")
        for key in {name, info.alias or name}:
            properties[key] = node
    return {"properties": properties}


def _field(annotation: Any, metadata: list[Any]) -> Node:
    """A model becomes a section; anything else the JSON schema of its type, if it has one."""
    options = list(_options(annotation))
    for option in options:
        if isinstance(option, type) and issubclass(option, BaseModel):
            return {**_section(option), "nullable": type(None) in options}
    annotated: Any = Annotated
    parts = (annotation, *metadata)
    try:
        schema = TypeAdapter(annotated[parts] if metadata else annotation).json_schema()
    except (PydanticInvalidForJsonSchema, PydanticSchemaGenerationError):
        return {}
    return _inlined(schema, schema.get("$defs", {}))


def _options(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) in (Union, UnionType):
        yield from get_args(annotation)
    else:
        yield annotation


def _inlined(node: Any, definitions: Mapping[str, Any]) -> Any:
    """Replace references by what they refer to, so that a node stands alone."""
    if isinstance(node, list):
        return [_inlined(item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        return _inlined(definitions[node["$ref"].rpartition("/")[2]], definitions)
    return {key: _inlined(item, definitions) for key, item in node.items() if key != "$defs"}


def snapshot() -> str:
    """Return the content of config/deepspeed/known_keys.json, for commands that must not import DeepSpeed."""
    return json.dumps({"deepspeed": deepspeed.__version__, "keys": known_keys()}, sort_keys=True)
