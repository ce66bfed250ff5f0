"""Parts that the tiny random checkpoints share: a tokenizer, a language model, vision towers."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% if message['content'] is string %}{{ message['content'] + ' ' }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% elif part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def tokenizer(*special: str, **named: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: any text, 256 tokens and the special ones.

    Those given by name, such as ``video_token="<video>"``, are attributes of the tokenizer too.
    """
    names = ["<pad>", "<s>", "</s>", *special, *named.values()]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*names, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, special=True) for name in names])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        extra_special_tokens=named or list(special),
    )


def llama_config(vocab_size: int) -> LlamaConfig:
    """A language model of two small layers, head dimension 32."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def clip_config(image_size: int) -> CLIPVisionConfig:
    """A CLIP tower of four small layers, 14-pixel patches."""
    return CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=image_size,
        patch_size=14,
    )


def siglip_config(image_size: int) -> SiglipVisionConfig:
    """A SigLIP tower of four small layers, 14-pixel patches."""
    return SiglipVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=image_size,
        patch_size=14,
        vision_use_head=False,
    )


def clip_image_processor(image_size: int) -> CLIPImageProcessorPil:
    """CLIP's: shorter side to ``image_size``, centre crop."""
    return CLIPImageProcessorPil(
        size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size}
    )


def siglip_image_processor(image_size: int) -> SiglipImageProcessorPil:
    """SigLIP's: squeezed to a square."""
    return SiglipImageProcessorPil(size={"height": image_size, "width": image_size})
