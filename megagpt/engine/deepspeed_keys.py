"""List of all keys of DeepSpeed's JSON config as plain data, extracted from DeepSpeed's own code.

Sections that are pydantic models are described by their fields. For all others, DeepSpeedConfig is constructed from a
dictionary that records which keys DeepSpeed reads, and with which defaults.
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
# deepspeed.initialize and PipelineEngine read these keys directly, so DeepSpeedConfig does not know them (0.19.8).
_READ_ELSEWHERE = ("sequence_parallel_size", "data_parallel_size", "pipeline.use_reentrant")
# The resolver computes with the values of these keys, so it has to know their types. DeepSpeed has no defaults from
# which the types could be derived.
_TYPES: Mapping[str, Node] = {
    "train_batch_size": {"type": "integer", "minimum": 1},
    "train_micro_batch_size_per_gpu": {"type": "integer", "minimum": 1},
    "gradient_accumulation_steps": {"type": "integer", "minimum": 1},
    "gradient_clipping": {"type": "number", "minimum": 0},
    "sequence_parallel_size": {"type": "integer", "minimum": 1},
    "activation_checkpointing.number_checkpoints": {"type": "integer", "minimum": 1},
    "pipeline.stages": {"type": "integer", "minimum": 1},
}
_RECORDED = (
    "activation_checkpointing",
    "aio",
    "checkpoint",
    "data_types",
    "flops_profiler",
    "timers",
    "torch_autocast",
)
# The keys inside these sections are not listed. megagpt rejects a config that enables one of these features.
_OPAQUE = ("autotuning", "data_efficiency", "datastates_ckpt", "expert_parallel")


class _RecordingDict(dict[str, Any]):
    """Dictionary for one section of the config that records each key that is read, with the type of its default."""

    def __init__(self, values: Mapping[str, Any], section: str, recorded: dict[str, Node]) -> None:
        super().__init__(values)
        self._section = section
        self._recorded = recorded

    def _record(self, key: str, default: Any) -> None:
        names = {bool: "boolean", int: "integer", float: "number"}
        node = {"type": names[type(default)]} if type(default) in names else {}
        if self._section not in _OPAQUE and key not in _OPAQUE:
            self._recorded.setdefault(f"{self._section}.{key}".lstrip("."), node)

    def get(self, key: str, default: Any = None) -> Any:
        self._record(key, default)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self._record(str(key), None)
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self._record(key, None)
        return super().__getitem__(key)

    def keys(self) -> Any:  # DeepSpeed tests `key in d.keys()`
        return self

    def __copy__(self) -> _RecordingDict:
        return self


def known_keys() -> Node:
    """Return DeepSpeed's keys as nested dictionaries {"properties": {name: node}}.

    Each leaf is a JSON schema, which is {} if DeepSpeed declares no type for the key. A node with "removed" describes a
    key that DeepSpeed rejects. The value of "deprecated" is the name of the key that replaces a deprecated one.
    """
    root: Node = {"properties": {}}
    for key, node in _recorded_keys().items():
        _add(root, key, node)
    for key in _READ_ELSEWHERE:
        _add(root, key, {})
    for name, model in _MODELS.items():
        _add(root, name, _section_node(model))
    for name, info in DeepSpeedMonitorConfig.model_fields.items():
        _add(root, name, _section_node(info.annotation))
    _add(root, "timers.throughput", _section_node(DeepSpeedThroughputTimerConfig))
    for name in ds.get_pipeline_config({}):
        _add(root, f"pipeline.{name}", {})
    for key, node in _TYPES.items():
        _add(root, key, node)
    for key in _OPAQUE:
        _add(root, key, {})
    _add(root, "bfloat16", {"deprecated": "bf16"})
    for key in getattr(ds, "_REMOVED_TOP_LEVEL_CONFIG_KEYS", {}):
        _add(root, key, {"removed": True})
    for key in getattr(ds, "_REMOVED_ZERO_CONFIG_KEYS", {}):
        _add(root, f"zero_optimization.{key}", {"removed": True})
    return root


def _recorded_keys() -> dict[str, Node]:
    recorded: dict[str, Node] = {}
    # DeepSpeed requires a batch size, and this one is valid with every world size.
    top = _RecordingDict({"train_micro_batch_size_per_gpu": 1}, "", recorded)
    for name in (*_RECORDED, *_OPAQUE):
        top[name] = _RecordingDict({}, name, recorded)
    top["checkpoint"]["writer"] = _RecordingDict({}, "checkpoint.writer", recorded)
    top["checkpoint"]["parallel_write"] = _RecordingDict({}, "checkpoint.parallel_write", recorded)
    top["optimizer"] = _RecordingDict({"type": "AdamW"}, "optimizer", recorded)
    top["scheduler"] = _RecordingDict({"type": "WarmupDecayLR"}, "scheduler", recorded)
    ds.DeepSpeedConfig(top)
    return recorded


def _add(root: Node, key: str, node: Node) -> None:
    """Add a node for a dotted key to the tree. Existing entries of the same node are kept."""
    *sections, name = key.split(".")
    inner = root
    for section in sections:
        inner = inner["properties"].setdefault(section, {})
        inner.setdefault("properties", {})
    inner["properties"][name] = {**inner["properties"].get(name, {}), **node}


def _section_node(model: type[BaseModel]) -> Node:
    """Return the node of a pydantic model, which lists each field under all names that the model accepts."""
    properties: Node = {}
    for name, info in model.model_fields.items():
        node = _field_node(info.annotation, info.metadata)
        extra = info.json_schema_extra
        if isinstance(extra, dict) and extra.get("deprecated"):
            node["deprecated"] = extra.get("new_param", "")
        for key in {name, info.alias or name}:
            properties[key] = node
    return {"properties": properties}


def _field_node(annotation: Any, metadata: list[Any]) -> Node:
    """Return the node of a field.

    A field whose type is a pydantic model becomes a section. The node of any other field is the JSON schema of its
    type, or {} if the type has none.
    """
    types = list(_union_members(annotation))
    for member in types:
        if isinstance(member, type) and issubclass(member, BaseModel):
            return {**_section_node(member), "nullable": type(None) in types}
    annotated: Any = Annotated
    parts = (annotation, *metadata)
    try:
        schema = TypeAdapter(annotated[parts] if metadata else annotation).json_schema()
    except (PydanticInvalidForJsonSchema, PydanticSchemaGenerationError):
        return {}
    return _inlined(schema, schema.get("$defs", {}))


def _union_members(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) in (Union, UnionType):
        yield from get_args(annotation)
    else:
        yield annotation


def _inlined(node: Any, definitions: Mapping[str, Any]) -> Any:
    """Return the JSON schema with all references replaced by their definitions."""
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
