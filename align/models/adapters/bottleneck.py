"""Bottleneck adapters as a tuner of PEFT, which has none: small layers between those of the base.

    houlsby    h = attention(x);  h + up(f(down(h)))   and the same behind the MLP     (arXiv:1902.00751)
    pfeiffer   behind the MLP alone                                                    (arXiv:2005.00052)
    parallel   mlp(x) + up(f(down(x))), beside the MLP                                 (arXiv:2110.04366)

`up` starts at zero, so a fresh adapter changes nothing. Importing this module makes the method known to PEFT, so that
saving, loading, several named adapters and switching between them are PEFT's own.
"""

from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig as AdapterConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.peft_types import PeftType, register_peft_method
from torch import Tensor, nn
from transformers import PreTrainedModel

from align.config.errors import UserError
from align.config.schema import Placement

NAME = "bottleneck"
MLP_NAMES = ("mlp", "feed_forward", "ffn")
ATTENTION_OUTPUTS = ("o_proj", "out_proj", "c_proj", "dense", "wo")
"""What transformers calls the layer that leads out of attention."""
START_STD = 1e-2
"""Of the way down. Source: arXiv:1902.00751, section 3.6."""


def _known_to_peft(name: str) -> PeftType:
    """The entry of PEFT's list of methods, added if it is not there: `register_peft_method` takes no other names."""
    if name in PeftType.__members__:
        return PeftType[name]
    entry = str.__new__(PeftType, name)
    entry._name_, entry._value_, entry._sort_order_ = name, name, len(PeftType)
    # An enum is closed, and has no public way to add to it.
    type.__setattr__(PeftType, name, entry)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = PeftType._value2member_map_[name] = entry
    return entry


@dataclass
class BottleneckConfig(AdapterConfig):
    """What `adapter_config.json` says of a bottleneck adapter."""

    target_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules that a layer sits behind."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules that are left out."})
    r: int = field(default=16, metadata={"help": "Width of the layers."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout on that width."})
    placement: str = field(default="houlsby", metadata={"help": "houlsby, pfeiffer or parallel."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules that are trained whole."})
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = _known_to_peft(NAME.upper())
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """A module of the base with the layers of each adapter behind it, or beside it."""

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")
    other_param_names = ()

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: BottleneckConfig, width: int) -> None:
        """width: of the hidden states, which the module gives out and, where it is parallel, takes in."""
        super().__init__()
        self.base_layer, self.width = base_layer, width
        self.bottleneck_down, self.bottleneck_up = nn.ModuleDict({}), nn.ModuleDict({})
        self.bottleneck_dropout = nn.ModuleDict({})
        self.parallel: dict[str, bool] = {}
        self._disable_adapters, self.merged_adapters = False, []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: BottleneckConfig) -> None:
        """Add the layers of an adapter."""
        like = next(self.base_layer.parameters())
        # Weights of 4 bits are no numbers to train in.
        options = {"device": like.device, "dtype": like.dtype if like.dtype.is_floating_point else None}
        down, up = nn.Linear(self.width, config.r, **options), nn.Linear(config.r, self.width, **options)
        nn.init.normal_(down.weight, std=START_STD)
        for zeros in (down.bias, up.weight, up.bias):
            nn.init.zeros_(zeros)
        self.bottleneck_down[adapter_name], self.bottleneck_up[adapter_name] = down, up
        self.bottleneck_dropout[adapter_name] = nn.Dropout(config.dropout)
        self.parallel[adapter_name] = config.placement == Placement.parallel.value
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the module gives, (..., width), with what the active adapters make of it or of `x` added."""
        given = out = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return out
        for name in self.active_adapters:
            if name in self.bottleneck_down:
                # Behind each other, as they would be in layers of their own.
                out = out + self._change(name, x if self.parallel[name] else out).to(given.dtype)
        return out

    def _change(self, name: str, hidden: Tensor) -> Tensor:
        down, up = self.bottleneck_down[name], self.bottleneck_up[name]
        inner = nn.functional.gelu(down(self._cast_input_dtype(hidden, down.weight.dtype)))
        return up(self.bottleneck_dropout[name](inner))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raises: ValueError. A layer that bends is no change of a weight."""
        raise ValueError("bottleneck adapters cannot be merged: they are not linear")

    def unmerge(self) -> None:
        """Nothing was merged."""


class BottleneckModel(BaseTuner):
    """Puts `BottleneckLayer` in the place of the modules that a config names."""

    prefix = f"{NAME}_"
    tuner_layer_cls = BottleneckLayer
    target_module_mapping: dict[str, list[str]] = {}

    def _create_and_replace(
        self,
        peft_config: BottleneckConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, BottleneckLayer):
            target.update_layer(adapter_name, peft_config)
            return
        layer = BottleneckLayer(target, adapter_name, peft_config, self.model.config.get_text_config().hidden_size)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        # PEFT's own way also copies weights and hooks, which a module that is no linear layer does not have.
        setattr(parent, target_name, layer)
        layer.train(target.training)


def places(model: PreTrainedModel, placement: Placement) -> list[str]:
    """Names of the modules that adapters of a placement sit at. Raises: UserError if the model has none of them."""
    names = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if not isinstance(module, nn.ModuleList)}
    mlp = [name for name in MLP_NAMES if name in names]
    attention = [name for name in ATTENTION_OUTPUTS if name in names and _leads_out_of_attention(model, name)]
    wanted = [*mlp[:1], *(attention[:1] if placement is Placement.houlsby else [])]
    if len(wanted) != 1 + (placement is Placement.houlsby):
        raise UserError(
            f"peft.placement={placement.value}: {type(model).__name__} calls its attention and MLP something else; "
            "name the modules to sit at in peft.target_modules"
        )
    return wanted


def _leads_out_of_attention(model: PreTrainedModel, name: str) -> bool:
    """Whether a layer of this name is a child of something called attention."""
    return any("attn" in path or "attention" in path for path, _ in model.named_modules() if path.endswith(f".{name}"))


if PeftType.__members__.get(NAME.upper()) is None:
    _known_to_peft(NAME.upper())
    register_peft_method(name=NAME, config_cls=BottleneckConfig, model_cls=BottleneckModel)
