"""The options of a run that takes a second."""

TINY = [
    "--steps", "3", "--vocab-size", "270", "--d_model", "16", "--d_k", "8", "--transformer-n-layers", "1",
    "--ssm_n_layers", "1", "--transformer_n_heads", "2", "--m_input_tokens", "6", "--stride=2", "--n_ssm_outputs", "3",
    "--batch_size", "2", "--chunk_length", "16", "--lanes", "2", "--sample_tokens", "4", "--device", "cpu",
]  # fmt: skip
