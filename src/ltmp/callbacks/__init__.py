"""Callbacks for training a reduced model in other frameworks: thresholds stay fixed, and the cost is logged.

`ltmp.callbacks.transformers.TrainerReduction` is for the Hugging Face Trainer and
`ltmp.callbacks.lightning.LightningReduction` for Lightning; both need the extra `callbacks`.
"""
