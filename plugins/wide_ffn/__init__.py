"""A gated FFN with the norm in front of it and the residual after it, in two launches; see docs/wide_ffn.md."""
