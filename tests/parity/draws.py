"""Recipes and layouts drawn at random from all switches, as layouts.py writes them down.

A draw is a dictionary of switches, so that a failing one can be made simpler switch by switch.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tests.parity import layouts
from tests.parity.layouts import Case

Switches = dict[str, Any]
SECOND = "second."  # prefix of the switches of the layout that a checkpoint is moved to

# What is drawn: the simplest value first, which is drawn half of the time where `_SELDOM` names the switch.
MODEL: Mapping[str, tuple[Any, ...]] = {
    "n_layer": (1, 2, 3, 4, 5, 6),
    "kv_heads": (1, 2, 3, 4),
    "group": (1, 2, 3),  # query heads per key and value head
    "head_dim": (8, 4, 16, 6),
    "d_ff": (None, 24, 60, 128),
    "vocab_size": (128, 61, 96, 129, 260),
    "seq_len": (16, 8, 24, 32),
    "position": ("learned", "rope"),
    "norm": ("layernorm", "rmsnorm"),
    "activation": ("gelu", "swiglu", "relu2"),
    "qk_norm": (False, True),
    "tie_embeddings": (True, False),
    "logit_softcap": (None, 5.0),
    "init": ("normal", "zero_projections"),
}
TRAINING: Mapping[str, tuple[Any, ...]] = {
    "documents": (False, True),
    "labels": ("whole", "ragged", "packed"),
    "optimizer": ("adamw", "muon"),
    "clip": (None, 0.6, 1.2),
    "weight_decay": (0.1, 0.0),
    "betas": ((0.9, 0.95), (0.8, 0.99)),
    "schedule": ("warmup_decay", "warmup_cosine", "wsd"),
    "warmup": (4, 0, 1, 2),
    "floor": (0.0, 1e-4),
    "total": (100, 20, 12),
    "precision": ("fp32", "bf16", "fp16"),
    "global_size": (12, 4, 8),
    "updates": (5, 6, 8),
    "bad": (None, "refused loss", "loss of NaN", "infinite gradient"),
    "evaluate": (False, True),
}
LAYOUT: Mapping[str, tuple[Any, ...]] = {
    "world": (1, 2, 3, 4),
    "stage": (0, 1, 2, 3),
    "pipeline": (1, 2, 3, 4),
    "tensor": (1, 2, 3, 4),
    "sequence": (1, 2, 3, 4),
    "offload": ("none", "optimizer", "both"),
    "pin_memory": (None, False),
    "micro": (None, 1, 2, 3, 4, 6),
    "recomputed": (0, 1, 2, 3, "auto"),
    "on_host": (False, True),
    "initial_scale_power": (None, 12, 18),  # fp16 alone
    "reduce_bucket_size": (None, 1, 5, 300, 20_000),
    "allgather_bucket_size": (None, 0, 1, 2, 300, 20_000),
    "overlap_comm": (None, False, True),
    "contiguous_gradients": (None, False),
    "reduce_scatter": (None, False),
    "allgather_partitions": (None, False),
    "use_multi_rank_bucket_allreduce": (None, False),
    "prescale_gradients": (None, True),
    "gradient_predivide_factor": (None, 2.0),
    "sub_group_size": (None, 1, 50, 5_000),
    "stage3_prefetch_bucket_size": (None, 0, 1, 1_000),
    "stage3_param_persistence_threshold": (None, 0, 200),
    "stage3_model_persistence_threshold": (None, 0, 1_000),
    "stage3_max_live_parameters": (None, 0, 1_000),
    "stage3_max_reuse_distance": (None, 0, 1_000),
    "stage3_module_granularity_threshold": (None, 500),
    "zero_hpz_partition_size": (None, 2, 4),
}
_ZERO = tuple(LAYOUT)[tuple(LAYOUT).index("reduce_bucket_size") :]
_TOP = ("prescale_gradients", "gradient_predivide_factor")  # of the ZeRO switches those that stand outside the section
_SELDOM = {"documents", "qk_norm", "logit_softcap", "init", "d_ff", "weight_decay", "betas", "bad", "total", "floor",
           "precision", "optimizer", "offload", "on_host", "recomputed", "evaluate", "global_size", *_ZERO}  # fmt: skip


def draw(chance: random.Random) -> Switches:
    """One recipe and its layout; in every third draw a second layout, to which a checkpoint is moved."""
    switches = {name: _one(name, values, chance) for name, values in (*MODEL.items(), *TRAINING.items())}
    switches |= _layout(switches, chance)
    if switches["optimizer"] == "muon" and switches["precision"] != "fp32":
        switches["init"] = (
            "normal"  # gradients of zero_projections begin at zero: Muon makes rounding as large as they are
        )
    if chance.random() < 1 / 3:
        switches |= {SECOND + name: value for name, value in _layout(switches, chance).items()}
    return switches


def _one(name: str, values: tuple[Any, ...], chance: random.Random) -> Any:
    return values[0] if name in _SELDOM and chance.random() < 0.6 else chance.choice(values)


def _layout(recipe: Switches, chance: random.Random) -> Switches:
    """A layout that mostly suits the recipe: one in eight is left as it was drawn, and may be refused."""
    layout = {name: _one(name, values, chance) for name, values in LAYOUT.items()}
    world = layout["world"]
    ways = {(1, 1, 1): 3.0}
    for pipeline in range(1, 5):
        for tensor in range(1, 5):
            for sequence in range(1, 5):
                if world % (pipeline * tensor * sequence) == 0:
                    ways[pipeline, tensor, sequence] = 1.0 + (pipeline > 1)
    if chance.random() < 1 / 8:
        return layout
    suited = {way: weight for way, weight in ways.items() if _suits(way, recipe, world)} or {(1, 1, 1): 1.0}
    (way,) = chance.choices(list(suited), list(suited.values()))
    layout |= dict(zip(("pipeline", "tensor", "sequence"), way, strict=True))
    if way[0] > 1:
        layout["stage"] = min(layout["stage"], 1)
    if layout["stage"] < 3:
        layout["zero_hpz_partition_size"] = None
        layout["offload"] = "none" if layout["stage"] == 0 else min(layout["offload"], "optimizer", key=_OFFLOADS.index)
    elif layout["offload"] != "none" or world % (layout["zero_hpz_partition_size"] or 1):
        layout["zero_hpz_partition_size"] = None
    if layout["stage"] > 1 and layout["reduce_scatter"] is None:
        layout |= {"prescale_gradients": None, "gradient_predivide_factor": None}
    if layout["stage"] < 3 and layout["allgather_bucket_size"] == 1:
        layout["allgather_bucket_size"] = 2
    layout["stage3_module_granularity_threshold"] = None  # always refused
    share = recipe["global_size"] // (world // (way[0] * way[1] * way[2]))
    if layout["micro"] and share % layout["micro"]:
        layout["micro"] = chance.choice([count for count in range(1, share + 1) if share % count == 0])
    if isinstance(layout["recomputed"], int):
        layout["recomputed"] = min(layout["recomputed"], recipe["n_layer"])
    layout["on_host"] = layout["on_host"] and layout["recomputed"] != 0
    return layout


_OFFLOADS = LAYOUT["offload"]


def _suits(way: tuple[int, int, int], recipe: Switches, world: int) -> bool:
    pipeline, tensor, sequence = way
    copies = world // (pipeline * tensor * sequence)
    return (
        pipeline <= recipe["n_layer"]
        and recipe["kv_heads"] % (tensor * sequence) == 0
        and recipe["seq_len"] % sequence == 0
        and recipe["global_size"] % copies == 0
    )


def simplest(name: str) -> tuple[Any, ...]:
    """Values of a switch that are simpler than others, the simplest first."""
    return {**MODEL, **TRAINING, **LAYOUT}[name.removeprefix(SECOND)]


def second(switches: Switches) -> Switches | None:
    """The switches with the second layout in place of the first one; None where there is no second one."""
    if SECOND + "world" not in switches:
        return None
    layout = {name: switches[SECOND + name] for name in LAYOUT}
    return {name: value for name, value in switches.items() if not name.startswith(SECOND)} | layout


def case_of(switches: Switches, name: str) -> Case:
    """The recipe and the first layout as a row of layouts.py."""
    return Case(name, switches["world"], _config(switches), tuple(_overrides(switches)))


def _config(switches: Switches) -> dict[str, Any]:
    section: dict[str, Any] = {"stage": switches["stage"]}
    given = {name: switches[name] for name in _ZERO if switches[name] is not None}
    section |= {name: value for name, value in given.items() if name not in _TOP}
    device: dict[str, Any] = {"device": "cpu"}
    if switches["pin_memory"] is not None:
        device["pin_memory"] = switches["pin_memory"]
    if switches["offload"] != "none":
        section["offload_optimizer"] = device
    if switches["offload"] == "both":
        section["offload_param"] = device
    config: dict[str, Any] = {"zero_optimization": section}
    config |= {name: value for name, value in given.items() if name in _TOP}
    if switches["micro"]:
        config["train_micro_batch_size_per_gpu"] = switches["micro"]
    if switches["pipeline"] > 1:
        config["pipeline"] = {"stages": switches["pipeline"]}
    if switches["tensor"] > 1:
        config["tensor_parallel"] = {"autotp_size": switches["tensor"]}
    if switches["sequence"] > 1:
        config["sequence_parallel_size"] = switches["sequence"]
    if switches["recomputed"]:
        config["activation_checkpointing"] = {"number_checkpoints": switches["recomputed"]}
    if switches["on_host"]:
        config.setdefault("activation_checkpointing", {})["cpu_checkpointing"] = True
    if switches["precision"] == "fp16" and switches["initial_scale_power"]:
        config["fp16"] = {"initial_scale_power": switches["initial_scale_power"]}
    return config


def _overrides(switches: Switches) -> Iterator[str]:
    heads = switches["kv_heads"] * switches["group"]
    values: dict[str, Any] = {
        "model.n_layer": switches["n_layer"], "model.n_head": heads, "model.n_kv_head": switches["kv_heads"],
        "model.d_model": heads * switches["head_dim"], "model.d_ff": switches["d_ff"],
        **{f"model.{name}": switches[name] for name in tuple(MODEL)[5:]},
        "optimizer.lr": 1e-3, "optimizer.clip": switches["clip"], "optimizer.weight_decay": switches["weight_decay"],
        "optimizer.betas": list(switches["betas"]), "precision": switches["precision"],
        "schedule.type": switches["schedule"], "schedule.warmup_updates": switches["warmup"],
        "schedule.min_lr": switches["floor"], "length.updates": switches["total"],
        "batch.global_size": switches["global_size"],
    }  # fmt: skip
    if switches["d_ff"] is None:
        del values["model.d_ff"]
    if switches["precision"] != "fp32":
        # AdamW moves a weight whose gradient is rounding alone by the full rate, in a direction of chance
        values["optimizer.eps"] = 1e-3
    if switches["schedule"] == "wsd":
        values["schedule.decay_updates"] = 5
    if switches["optimizer"] == "muon":
        values |= {"optimizer.type": "muon", "optimizer.muon_lr": 2e-3}
    if switches["documents"]:
        values |= {"data.document_mask": True, "data.eod": 5}
    for key, value in values.items():
        if key not in _BASE or _BASE[key] != value:
            yield f"{key}={value if isinstance(value, str) else json.dumps(value)}"


# what layouts.RECIPE and the recipe's defaults have already
_BASE: Mapping[str, Any] = {
    "model.n_layer": 2, "model.n_head": 4, "model.d_model": 64, "model.vocab_size": 128, "model.seq_len": 32,
    "model.position": "learned", "model.norm": "layernorm", "model.activation": "gelu", "model.qk_norm": False,
    "model.tie_embeddings": True, "model.logit_softcap": None, "model.init": "normal", "optimizer.clip": 1.15,
    "optimizer.weight_decay": 0.1, "optimizer.betas": [0.9, 0.95], "precision": "fp32",
    "schedule.type": "warmup_decay", "schedule.warmup_updates": 4, "schedule.min_lr": 0.0, "length.updates": 100,
    "batch.global_size": 12,
}  # fmt: skip

Samples = Callable[[int], "layouts.Samples"]
