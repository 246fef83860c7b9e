"""The families of language models that are deployed in tests: decoders, state spaces, encoders, pairs."""

from helpers.zoo_transformers import EXPERTS, SEQUENCES, family

# fmt: off
_GPT2 = {
    "n_embd": 32, "n_layer": 2, "n_head": 2,
}
_T5 = {
    "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 1,
}
_MAMBA = {
    "state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 4, "expand": 2,
}
_LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 16, "n_group":
    1, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 2,
}

DECODERS = (
    family("gpt2", "text", "GPT2Config", "GPT2LMHeadModel", _GPT2),
    family("llama", "padded", "LlamaConfig", "LlamaForCausalLM"),
    family("llama_tied", "text", "LlamaConfig", "LlamaForCausalLM", tie_word_embeddings=True),
    family("qwen3", "text", "Qwen3Config", "Qwen3ForCausalLM"),
    family("qwen3_moe_lm", "text", "Qwen3MoeConfig", "Qwen3MoeForCausalLM", EXPERTS),
    family("qwen2_moe", "text", "Qwen2MoeConfig", "Qwen2MoeForCausalLM", EXPERTS, shared_expert_intermediate_size=16),
    family("mixtral_lm", "text", "MixtralConfig", "MixtralForCausalLM", num_local_experts=4),
    family("gpt_oss", "text", "GptOssConfig", "GptOssForCausalLM", num_local_experts=4, num_experts_per_tok=2),
    family("deepseek_v3", "text", "DeepseekV3Config", "DeepseekV3ForCausalLM", _LATENT),
    family("deepseek_v4", "text", "DeepseekV4Config", "DeepseekV4ForCausalLM", _LATENT, head_dim=16),
    family("gemma", "text", "GemmaConfig", "GemmaForCausalLM"),
    family("gemma2", "text", "Gemma2Config", "Gemma2ForCausalLM"),
    family("gemma3", "text", "Gemma3TextConfig", "Gemma3ForCausalLM"),
    family("opt", "padded", "OPTConfig", "OPTForCausalLM", ffn_dim=64, word_embed_proj_dim=16),
    family("bloom", "text", "BloomConfig", "BloomForCausalLM", n_layer=2, n_head=2),
    family("falcon", "text", "FalconConfig", "FalconForCausalLM"),
    family("phi", "text", "PhiConfig", "PhiForCausalLM"),
    family("phi3", "text", "Phi3Config", "Phi3ForCausalLM"),
    family("mistral", "text", "MistralConfig", "MistralForCausalLM", sliding_window=4),
    family("gpt_neox", "text", "GPTNeoXConfig", "GPTNeoXForCausalLM"),
    family("gptj", "text", "GPTJConfig", "GPTJForCausalLM", _GPT2, rotary_dim=8),
    family("codegen", "text", "CodeGenConfig", "CodeGenForCausalLM", n_embd=64, n_layer=2, n_head=4, rotary_dim=4),
    family("gpt_bigcode", "text", "GPTBigCodeConfig", "GPTBigCodeForCausalLM", _GPT2),
    family("mpt", "text", "MptConfig", "MptForCausalLM", d_model=32, n_layers=2, n_heads=2),
    family("cohere", "text", "CohereConfig", "CohereForCausalLM"),
    family("olmo2", "text", "Olmo2Config", "Olmo2ForCausalLM"),
    family("stablelm", "text", "StableLmConfig", "StableLmForCausalLM"),
    family("xglm", "text", "XGLMConfig", "XGLMForCausalLM", d_model=32, ffn_dim=64, num_layers=2, attention_heads=2),
    family(
        "jetmoe", "text", "JetMoeConfig", "JetMoeForCausalLM", num_local_experts=4, kv_channels=16,
        num_key_value_heads=2,
    ),
    family("granite_moe", "text", "GraniteMoeConfig", "GraniteMoeForCausalLM", num_local_experts=4),
    family("llama4", "text", "Llama4TextConfig", "Llama4ForCausalLM", num_local_experts=4, intermediate_size_mlp=64),
)
STATES = (
    family("mamba", "text", "MambaConfig", "MambaForCausalLM", state_size=8),
    family("mamba2", "text", "Mamba2Config", "Mamba2ForCausalLM", _MAMBA),
    family("falcon_mamba", "text", "FalconMambaConfig", "FalconMambaForCausalLM", state_size=8),
    family(
        "bamba", "text", "BambaConfig", "BambaForCausalLM", attn_layer_indices=[1], mamba_n_heads=4, mamba_d_head=16,
        mamba_d_state=8, mamba_chunk_size=4,
    ),
    family(
        "jamba", "text", "JambaConfig", "JambaForCausalLM", num_experts=2, attn_layer_period=2, attn_layer_offset=1,
        mamba_d_state=8, mamba_dt_rank=4, use_mamba_kernels=False,
    ),
    family("rwkv", "text", "RwkvConfig", "RwkvForCausalLM", context_length=16),
    family(
        "zamba", "text", "ZambaConfig", "ZambaForCausalLM", num_hidden_layers=4, mamba_d_state=8, n_mamba_heads=1,
        mamba_dt_rank=4, attn_layer_period=2, attn_layer_offset=1, layers_block_type=["mamba", "hybrid", "mamba",
        "hybrid"], use_mamba_kernels=False, attention_hidden_size=64, attention_head_dim=32, num_key_value_heads=2,
    ),
    family(
        "zamba2", "text", "Zamba2Config", "Zamba2ForCausalLM", num_hidden_layers=3, mamba_d_state=8, n_mamba_heads=4,
        mamba_ngroups=1, chunk_size=4, num_mem_blocks=1, layers_block_type=["mamba", "hybrid", "hybrid"],
        num_key_value_heads=2,
    ),
    family(
        "recurrent_gemma", "text", "RecurrentGemmaConfig", "RecurrentGemmaForCausalLM", num_hidden_layers=3,
        lru_width=32, attention_window_size=16,
    ),
    family(
        "falcon_h1", "text", "FalconH1Config", "FalconH1ForCausalLM", mamba_d_ssm=64, mamba_n_heads=4,
        mamba_d_head=16, mamba_d_state=8, mamba_chunk_size=4,
    ),
    family(
        "qwen3_next", "text", "Qwen3NextConfig", "Qwen3NextForCausalLM", EXPERTS, shared_expert_intermediate_size=16,
        linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=16, linear_value_head_dim=16,
        layer_types=["linear_attention", "full_attention"],
    ),
    family("xlstm", "text", "xLSTMConfig", "xLSTMForCausalLM", num_heads=2, num_blocks=2, chunk_size=4),
    family(
        "minimax", "text", "MiniMaxConfig", "MiniMaxForCausalLM", num_local_experts=4, block_size=4,
        layer_types=["linear_attention", "full_attention"],
    ),
    family("lfm2", "text", "Lfm2Config", "Lfm2ForCausalLM", layer_types=["conv", "full_attention"]),
)
ENCODERS = (
    family("bert", "padded", "BertConfig", "BertForSequenceClassification"),
    family("roberta", "padded", "RobertaConfig", "RobertaForMaskedLM", pad_token_id=1),
    family(
        "distilbert", "padded", "DistilBertConfig", "DistilBertForMaskedLM", dim=32, hidden_dim=64, n_layers=2,
        n_heads=2,
    ),
    family("albert", "padded", "AlbertConfig", "AlbertForMaskedLM", embedding_size=16),
    family("electra", "padded", "ElectraConfig", "ElectraForPreTraining", embedding_size=16),
    family(
        "deberta", "padded", "DebertaConfig", "DebertaForMaskedLM", relative_attention=True, pos_att_type=["c2p",
        "p2c"],
    ),
    family(
        "deberta_v2", "padded", "DebertaV2Config", "DebertaV2ForSequenceClassification", relative_attention=True,
        pos_att_type=["c2p", "p2c"], position_buckets=8,
    ),
    family("mpnet", "padded", "MPNetConfig", "MPNetModel"),
    family("modernbert", "padded", "ModernBertConfig", "ModernBertForMaskedLM", local_attention=4),
    family("longformer", "text", "LongformerConfig", "LongformerModel", attention_window=[4, 4]),
    family("big_bird", "text", "BigBirdConfig", "BigBirdForMaskedLM", attention_type="original_full"),
    family("xlnet", "text", "XLNetConfig", "XLNetModel", d_model=32, n_layer=2, n_head=2, d_inner=64),
    family("fnet", "text", "FNetConfig", "FNetForMaskedLM"),
    family(
        "funnel", "text", "FunnelConfig", "FunnelModel", block_sizes=[1, 1], d_model=32, n_head=2, d_head=16,
        d_inner=64, num_decoder_layers=1,
    ),
    family("convbert", "text", "ConvBertConfig", "ConvBertModel", conv_kernel_size=3),
    family("squeezebert", "text", "SqueezeBertConfig", "SqueezeBertModel", embedding_size=32),
    family(
        "mobilebert", "text", "MobileBertConfig", "MobileBertModel", intra_bottleneck_size=16, embedding_size=16,
        true_hidden_size=16,
    ),
    family(
        "canine", "text", "CanineConfig", "CanineModel", num_hash_buckets=64, num_hash_functions=2,
        local_transformer_stride=4, downsampling_rate=2,
    ),
    family(
        "nystromformer", "text", "NystromformerConfig", "NystromformerModel", segment_means_seq_len=6, num_landmarks=3,
    ),
    family(
        "reformer", "text", "ReformerConfig", "ReformerModel", attn_layers=["local", "lsh"], attention_head_size=16,
        feed_forward_size=64, axial_pos_shape=[2, 4], axial_pos_embds_dim=[16, 16], local_attn_chunk_length=3,
        lsh_attn_chunk_length=3, num_buckets=2, hash_seed=0,
    ),
    family("tapas", "text", "TapasConfig", "TapasModel"),
    family("rembert", "text", "RemBertConfig", "RemBertForMaskedLM", input_embedding_size=16, output_embedding_size=48),
    family("ibert", "text", "IBertConfig", "IBertModel"),
    family("roformer", "text", "RoFormerConfig", "RoFormerModel"),
)
PAIRS = (
    family("t5", "pairs", "T5Config", "T5ForConditionalGeneration", _T5),
    family("umt5", "pairs", "UMT5Config", "UMT5ForConditionalGeneration", _T5, feed_forward_proj="gated-gelu"),
    family(
        "switch_transformers", "pairs", "SwitchTransformersConfig", "SwitchTransformersForConditionalGeneration", _T5,
        num_experts=2, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_decoder_layers=1,
        expert_capacity=64,
    ),
    family("bart", "pairs", "BartConfig", "BartForConditionalGeneration", SEQUENCES),
    family("pegasus", "pairs", "PegasusConfig", "PegasusForConditionalGeneration", SEQUENCES),
    family("mbart", "pairs", "MBartConfig", "MBartForConditionalGeneration", SEQUENCES),
    family("marian", "pairs", "MarianConfig", "MarianMTModel", SEQUENCES),
    family("m2m_100", "pairs", "M2M100Config", "M2M100ForConditionalGeneration", SEQUENCES),
    family(
        "led", "pairs", "LEDConfig", "LEDForConditionalGeneration", SEQUENCES, attention_window=[4],
        max_encoder_position_embeddings=64, max_decoder_position_embeddings=64,
    ),
    family(
        "prophetnet", "pairs", "ProphetNetConfig", "ProphetNetForConditionalGeneration", num_encoder_layers=1,
        num_decoder_layers=1, encoder_ffn_dim=64, decoder_ffn_dim=64, num_encoder_attention_heads=2,
        num_decoder_attention_heads=2, decoder_start_token_id=1,
    ),
    family(
        "nllb_moe", "pairs", "NllbMoeConfig", "NllbMoeForConditionalGeneration", SEQUENCES, num_experts=4,
        encoder_sparse_step=1, decoder_sparse_step=1, expert_capacity=64,
    ),
)
# fmt: on
