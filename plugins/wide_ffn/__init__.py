"""A gated FFN with the norm in front of it and the residual after it, in a few launches; see docs/wide_ffn.md."""
