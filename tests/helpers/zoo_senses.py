"""The families that read images, sound and series, and are deployed in tests."""

from helpers.zoo_transformers import IMAGES, SEQUENCES, family

# fmt: off
_TOWER = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
}
_SOUND = {
    "conv_dim": (16, 16), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
}
_SERIES = {
    "d_model": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "ffn_dim": 32,
}
_FORECAST = {
    "prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2, 4], "num_time_features": 1, "d_model": 16,
    "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2,
}

PICTURES = (
    family(
        "clip", "both", "CLIPConfig", "CLIPModel", text_config=_TOWER | {"eos_token_id": 2}, vision_config=_TOWER |
        IMAGES, projection_dim=16,
    ),
    family("siglip", "both", "SiglipConfig", "SiglipModel", text_config=_TOWER, vision_config=_TOWER | IMAGES),
    family("vit", "images", "ViTConfig", "ViTForImageClassification", IMAGES),
    family("deit", "images", "DeiTConfig", "DeiTModel", IMAGES),
    family("beit", "images", "BeitConfig", "BeitModel", IMAGES, use_relative_position_bias=True),
    family("dinov2", "images", "Dinov2Config", "Dinov2Model", IMAGES),
    family(
        "swin", "images", "SwinConfig", "SwinForImageClassification", image_size=16, patch_size=2, num_channels=3,
        embed_dim=16, depths=[2, 1], num_heads=[2, 2], window_size=4,
    ),
    family(
        "swinv2", "images", "Swinv2Config", "Swinv2ForImageClassification", image_size=16, patch_size=2,
        num_channels=3, embed_dim=16, depths=[2, 1], num_heads=[2, 2], window_size=4,
    ),
    family(
        "convnext", "images", "ConvNextConfig", "ConvNextForImageClassification", hidden_sizes=[16, 32], depths=[1,
        1], num_stages=2,
    ),
    family(
        "convnextv2", "images", "ConvNextV2Config", "ConvNextV2ForImageClassification", hidden_sizes=[16, 32],
        depths=[1, 1], num_stages=2,
    ),
    family(
        "resnet", "images", "ResNetConfig", "ResNetForImageClassification", embedding_size=16, hidden_sizes=[16, 32],
        depths=[1, 1],
    ),
    family(
        "segformer", "images", "SegformerConfig", "SegformerModel", num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2,
        1], hidden_sizes=[16, 32], num_attention_heads=[1, 2], patch_sizes=[3, 3], strides=[2, 2], mlp_ratios=[2, 2],
        decoder_hidden_size=16,
    ),
    family(
        "poolformer", "images", "PoolFormerConfig", "PoolFormerModel", hidden_sizes=[16, 16, 32, 32], depths=[1, 1, 1,
        1],
    ),
)
SIGNALS = (
    family("wav2vec2", "sound", "Wav2Vec2Config", "Wav2Vec2ForCTC", _SOUND),
    family("hubert", "sound", "HubertConfig", "HubertModel", _SOUND),
    family("wavlm", "sound", "WavLMConfig", "WavLMModel", _SOUND),
    family(
        "whisper", "spectra", "WhisperConfig", "WhisperForConditionalGeneration", SEQUENCES, num_mel_bins=16,
        max_source_positions=16, max_target_positions=32, suppress_tokens=None, begin_suppress_tokens=None,
    ),
    family(
        "patchtst", "past", "PatchTSTConfig", "PatchTSTForPrediction", _SERIES, num_input_channels=2,
        context_length=16, patch_length=4, patch_stride=4, prediction_length=4, loss="mse",
    ),
    family(
        "patchtsmixer", "past", "PatchTSMixerConfig", "PatchTSMixerForPrediction", num_input_channels=2,
        context_length=16, patch_length=4, patch_stride=4, prediction_length=4, d_model=16, num_layers=1,
    ),
    family("informer", "foretold", "InformerConfig", "InformerForPrediction", _FORECAST),
    family(
        "time_series_transformer", "foretold", "TimeSeriesTransformerConfig", "TimeSeriesTransformerForPrediction",
        _FORECAST,
    ),
    family(
        "perceiver", "perceived", "PerceiverConfig", "PerceiverModel", num_latents=4, d_latents=32, d_model=16,
        num_blocks=1, num_self_attends_per_block=2, num_self_attention_heads=2, num_cross_attention_heads=2,
    ),
    family(
        "decision_transformer", "decided", "DecisionTransformerConfig", "DecisionTransformerModel", state_dim=8,
        act_dim=3, hidden_size=32, n_layer=2, n_head=2, max_ep_len=16,
    ),
)
# fmt: on
