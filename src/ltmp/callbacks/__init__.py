"""Callbacks for the trainers of others: a reduced model is trained like any other, and its cost is reported.

`ltmp.callbacks.transformers.TrainerReduction` is for the Trainer of Hugging Face, and
`ltmp.callbacks.lightning.LightningReduction` for Lightning; both need the extra `callbacks`.
"""
