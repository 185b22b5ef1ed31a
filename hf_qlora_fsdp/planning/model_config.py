"""A model's config, held to what a plan needs of it: every size is written there, and is one."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig

_SIZES = ("hidden_size", "num_hidden_layers")
_DEFAULTED = ("vocab_size", "intermediate_size", "num_attention_heads")
"""Sizes that not every family has, or has under these names. Those that have them have a number for them, too."""
_COUNTS = (*_SIZES, *_DEFAULTED, "num_key_value_heads", "head_dim")


def read_config(model: str | PretrainedConfig, *, trust_remote_code: bool = False, **hub: Any) -> PretrainedConfig:
    """Return a model's config; of a Hub id, nothing else is fetched.

    Raises:
        ValueError: It cannot be had, or does not say how large the model is.
    """
    if isinstance(model, PretrainedConfig):
        return model
    try:
        written = PretrainedConfig.get_config_dict(model, **hub)[0]
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code, **hub)
    except Exception as error:  # there are as many classes of them as ways for a file to be wrong
        said = [line.strip() for line in str(error).strip().split("\n")]
        reason = " ".join(said[:2]) if said[0].endswith(":") else said[0]
        advice = "Give a Hub id that can be reached, the folder of a model, or its config.json."
        if "trust_remote_code" in str(error):
            advice = "Read that code, and if it may run here, give --trust-remote-code."
        raise ValueError(
            f"The config of {model!r} cannot be read ({reason}), and nothing else says how large the model is. {advice}"
        ) from error
    # A class fills in what its first model had, and the plan would be that model's.
    missing = [name for name in _SIZES if not _is_given(name, config, written)]
    missing += [name for name in _DEFAULTED if _has_default(name, config) and not _is_given(name, config, written)]
    if missing:
        raise ValueError(
            f"The config of {model!r} does not say {', '.join(missing)}, from which the sizes of weights follow. Give "
            "the config.json of a causal language model, complete."
        )
    for name in _COUNTS:
        value = getattr(config.get_text_config(), name, None)
        if isinstance(value, int) and value < 1:
            raise ValueError(
                f"The config of {model!r} has {name}={value}, and no weight has such a size. Give the config.json of a "
                "model that exists."
            )
    return config


def _is_given(name: str, config: PretrainedConfig, written: dict[str, Any]) -> bool:
    """Return whether a size is written, in the config or in the one of the text within it.

    What a class computes is as good: Nemotron-H lists its layers, and their number is that of the list.
    """
    text = config.get_text_config()
    if isinstance(getattr(type(text), name, None), property):
        return True
    inner = next((part for part in written.values() if isinstance(part, dict) and _SIZES[0] in part), {})
    return bool({name, text.attribute_map.get(name)} & {**written, **inner}.keys())


def _has_default(name: str, config: PretrainedConfig) -> bool:
    """Return whether a size that is not written would be another model's.

    Configs within configs are written without what is their class's default, so those say nothing by leaving it out.
    """
    text = config.get_text_config()
    return text is config and isinstance(getattr(type(text), text.attribute_map.get(name, name), None), int)
