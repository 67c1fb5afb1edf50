from hf_mamba import MoeMambaConfig, MoeMambaForCausalLM, MoeMambaForSequenceClassification, MoeMambaForTokenClassification, MoeMambaModel  # pip install hf-mamba
