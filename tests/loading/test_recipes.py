"""Every way from a stored name to a parameter that transformers knows, and every way that ends nowhere.

The reference is the model that the checkpoint was saved from: whatever a test does to names and cuts, the parameters
that come out have to be its parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel, conversion_mapping, core_model_loading
from transformers.core_model_loading import Concatenate, WeightConverter, WeightRenaming

from hf_qlora_fsdp.loading.blueprint import build_quantized_meta_model
from hf_qlora_fsdp.loading.recipes import logical_shape, plan_recipes
from hf_qlora_fsdp.loading.weights import Weights
from hf_qlora_fsdp.packed_linear import PackedLinear4bit
from tests.tiny import make_checkpoint

Tensors = dict[str, torch.Tensor]


class Checkpoint:
    """A tiny checkpoint whose tensors a test may change before the recipes are planned."""

    def __init__(self, folder: Path, model_type: str = "llama", **options: object) -> None:
        self.folder = make_checkpoint(folder, model_type, **options)
        self.file = Path(folder, "model.safetensors")
        self.tensors: Tensors = load_file(self.file)
        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.bfloat16)
        self.original: Tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def rename(self, old: str, new: str) -> None:
        self.tensors = {name.replace(old, new): tensor for name, tensor in self.tensors.items()}

    def build(self) -> PreTrainedModel:
        return build_quantized_meta_model(self.folder, None, torch.bfloat16, hub={})

    def realize(self, key_mapping: dict[str, str] | None = None) -> Tensors:
        save_file(self.tensors, self.file)
        model, weights = self.build(), Weights([str(self.file)])
        recipes = plan_recipes(model, weights, key_mapping)
        assert weights.bytes_read == 0
        made: Tensors = {}
        for recipe in recipes:
            made |= {name: tensor for name, (tensor, scales) in recipe.realize(weights.read).items() if not scales}
            assert recipe.num_bytes(weights) > 0
        used = sum(recipe.num_bytes(weights) for recipe in recipes)
        assert weights.bytes_read == used  # what the progress bar counts is what is read
        return made

    def assert_restored(self, **options: object) -> None:
        made = self.realize(**options)
        tied = set(self.build().all_tied_weights_keys)
        assert set(made) == set(self.original) - tied
        for name, tensor in made.items():
            assert torch.equal(tensor, self.original[name]), name

    def assert_refused(self, message: str, **options: object) -> None:
        with pytest.raises(ValueError, match=message):
            self.realize(**options)


@pytest.fixture
def llama(tmp_path: Path) -> Checkpoint:
    return Checkpoint(tmp_path / "llama")


@pytest.fixture
def tied(tmp_path: Path) -> Checkpoint:
    return Checkpoint(tmp_path / "tied", tie=True)


@pytest.fixture
def mapping() -> Iterator[None]:
    """Forget what a test registers."""
    conversion_mapping.get_checkpoint_conversion_mapping("llama")  # fills the cache
    cache = dict(conversion_mapping._checkpoint_conversion_mapping_cache)
    registered = set(conversion_mapping.USER_REGISTERED_MAPPINGS)
    yield
    conversion_mapping._checkpoint_conversion_mapping_cache = cache
    conversion_mapping.USER_REGISTERED_MAPPINGS.clear()
    conversion_mapping.USER_REGISTERED_MAPPINGS.update(registered)


def register(*rules: WeightRenaming | WeightConverter) -> None:
    conversion_mapping.register_checkpoint_conversion_mapping("llama", list(rules), overwrite=True)


# ---- Names -----------------------------------------------------------------------------------------------------------


def test_names_as_they_are(llama):
    llama.assert_restored()


def test_prefix_is_added(llama):
    """A checkpoint of the base model alone, with a head."""
    llama.rename("model.", "")
    assert "layers.0.mlp.up_proj.weight" in llama.tensors
    llama.assert_restored()


def test_prefix_of_a_larger_model_has_to_be_told(llama):
    llama.rename("model.", "language_model.model.")
    llama.rename("lm_head.", "language_model.lm_head.")
    llama.assert_refused(r"lacks 21 of the tensors")
    llama.assert_restored(key_mapping={r"^language_model\.": ""})


def test_key_mapping(llama):
    llama.rename("self_attn.q_proj", "attention.wq")
    llama.assert_refused(r"lacks 2 of the tensors .*layers\.0\.self_attn\.q_proj\.weight.*pass key_mapping")
    llama.assert_restored(key_mapping={r"attention\.wq": "self_attn.q_proj"})


def test_registered_renaming(llama, mapping):
    register(WeightRenaming(source_patterns=r"\.ffn\.", target_patterns=".mlp."))
    llama.rename(".mlp.", ".ffn.")
    llama.assert_restored()


def test_name_that_is_right_already_is_not_renamed(llama, mapping):
    register(WeightRenaming(source_patterns=r"\.mlp\.", target_patterns=".nowhere."))
    llama.assert_restored()


# ---- Conversions -----------------------------------------------------------------------------------------------------


def test_many_stored_tensors_become_one(tmp_path, mapping):
    phi3 = Checkpoint(tmp_path / "phi3", "phi3")
    rule = WeightConverter(
        source_patterns=["q_proj.weight", "k_proj.weight", "v_proj.weight"],
        target_patterns="qkv_proj.weight",
        operations=[Concatenate(dim=0)],
    )
    conversion_mapping.register_checkpoint_conversion_mapping("phi3", [rule], overwrite=True)
    for name in [name for name in phi3.tensors if "qkv_proj" in name]:
        parts = phi3.tensors.pop(name).split([128, 64, 64])
        phi3.tensors |= {
            name.replace("qkv", letter): part.contiguous() for letter, part in zip("qkv", parts, strict=True)
        }
    phi3.assert_restored()
    # The rule is the one that transformers applies, so what it makes of the checkpoint is the same.
    upstream = AutoModelForCausalLM.from_pretrained(phi3.folder, dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(upstream[name], tensor) for name, tensor in phi3.original.items())


def test_pieces_are_put_together_in_the_order_of_their_numbers(llama, mapping):
    """In the order of the alphabet, piece 10 would come before piece 2."""
    register(WeightConverter("up_parts.*.weight", "up_proj.weight", operations=[Concatenate(dim=0)]))
    for layer in range(2):
        up = f"model.layers.{layer}.mlp.up_"
        for index, part in enumerate(llama.tensors.pop(f"{up}proj.weight").chunk(16)):
            llama.tensors[f"{up}parts.{index}.weight"] = part.contiguous()
    llama.assert_restored()


def fuse_qkv(llama: Checkpoint) -> None:
    for layer in range(2):
        names = [f"model.layers.{layer}.self_attn.{letter}_proj.weight" for letter in "qkv"]
        llama.tensors[names[0].replace("q_proj", "W_pack")] = torch.cat([llama.tensors.pop(name) for name in names])
    register(
        WeightConverter(
            source_patterns="W_pack.weight",
            target_patterns=["q_proj.weight", "k_proj.weight", "v_proj.weight"],
            # It asks the model for the sizes, whose weights are packed by then.
            operations=[core_model_loading.Split(dim=0)],
        )
    )


splitting = pytest.mark.skipif(
    not hasattr(core_model_loading, "Split"), reason="this transformers has no conversion that asks for sizes"
)


@splitting
def test_one_stored_tensor_becomes_many(llama, mapping):
    fuse_qkv(llama)
    llama.assert_restored()


@splitting
def test_shapes_are_checked_after_the_conversion(llama, mapping):
    fuse_qkv(llama)
    name = "model.layers.1.self_attn.W_pack.weight"
    llama.tensors[name] = llama.tensors[name][:, :64].contiguous()
    llama.assert_refused(r"'model\.layers\.1\.self_attn\.W_pack\.weight' gives .*q_proj.*\[128, 64\].*\[128, 128\]")


# ---- Ties ------------------------------------------------------------------------------------------------------------


def test_tied_head_that_is_not_stored(tied):
    assert "lm_head.weight" not in tied.tensors
    tied.assert_restored()


def test_tied_head_that_is_stored_all_the_same(tied):
    tied.tensors["lm_head.weight"] = tied.tensors["model.embed_tokens.weight"].clone()
    tied.assert_restored()


def test_tied_head_that_differs_is_refused(tied):
    head = tied.tensors["model.embed_tokens.weight"].clone()
    head[3, 3] += 1
    tied.tensors["lm_head.weight"] = head
    tied.assert_refused(
        r"ties 'model\.embed_tokens\.weight' and 'lm_head\.weight'.*different.*tie_word_embeddings=False"
    )


def test_tied_embedding_of_which_only_the_head_is_stored(tied):
    tied.rename("model.embed_tokens", "lm_head")
    tied.assert_restored()


def test_untied_head_must_be_stored(llama):
    del llama.tensors["lm_head.weight"]
    llama.assert_refused(r"lacks 1 of the tensors that LlamaForCausalLM needs: lm_head\.weight\. .*random values")


# ---- What does not fit -----------------------------------------------------------------------------------------------


def test_missing_tensors_are_named(llama):
    for name in list(llama.tensors):
        if ".mlp." in name:
            del llama.tensors[name]
    llama.assert_refused(r"lacks 6 of .*: model\.layers\.0\.mlp\.down_proj\.weight, .* and 1 more\..*Download")


def test_unexpected_tensor_is_named(llama):
    llama.tensors["model.layers.0.self_attn.q_norm.weight"] = torch.ones(32)
    llama.assert_refused(
        r"holds 1 tensors .*: model\.layers\.0\.self_attn\.q_norm\.weight\. .*would be dropped.*key_mapping"
    )


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"]
)
def test_misshapen_tensor_is_named_with_both_shapes(llama, name):
    right = list(llama.tensors[name].shape)
    llama.tensors[name] = torch.cat([llama.tensors[name]] * 2)
    wrong = list(llama.tensors[name].shape)
    message = f"{name!r} gives {name!r} the shape {wrong}, but config.json describes {right}. Weights and config"
    llama.assert_refused("".join("\\" + char if char in ".[]" else char for char in message))


def test_one_parameter_stored_under_two_names_is_refused(llama):
    llama.tensors["norm.weight"] = llama.tensors["model.norm.weight"] + 1
    llama.assert_refused(r"holds both 'model\.norm\.weight' and 'norm\.weight', which are 'model\.norm\.weight'")


def test_leftovers_that_are_computed_today_are_ignored(llama):
    for layer in range(2):
        llama.tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
    llama.assert_restored()


def test_what_the_model_says_may_be_missing_or_dropped(llama, monkeypatch):
    from transformers import LlamaForCausalLM

    llama.tensors["mtp.layers.0.weight"] = torch.ones(1)
    del llama.tensors["model.norm.weight"]
    llama.assert_refused("lacks 1 of the tensors")
    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_missing", [r"norm\.weight"])
    llama.assert_refused("holds 1 tensors")
    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"^mtp\."])
    assert set(llama.realize()) == set(llama.original) - {"model.norm.weight"}


def test_logical_shapes_are_those_of_16_bit_weights(llama):
    model = llama.build()
    assert isinstance(model.model.layers[0].mlp.up_proj, PackedLinear4bit)
    assert {name: logical_shape(model, name) for name in model.state_dict()} == {
        name: tuple(tensor.shape) for name, tensor in llama.original.items()
    }
